"""The tables of `data/` as text; the modules that own a table give its columns their types."""

from __future__ import annotations

import csv

from edgelab.assets import data_dir


def table(file: str) -> list[dict[str, str]]:
    with (data_dir() / file).open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))
