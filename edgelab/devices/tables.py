"""The tables of `data/` as text; the modules that own a table give its columns their types."""

from __future__ import annotations

from collections.abc import Sequence

from edgelab import csv_files
from edgelab.assets import data_dir
from edgelab.errors import EdgeLabError


class TableError(EdgeLabError):
    """A table of `data/` that cannot be read, named by line and column."""


def table(
    file: str,
    error: type[EdgeLabError] = TableError,
    columns: Sequence[str] = (),
    needed: Sequence[str] = (),
    unique: str = "",
) -> list[tuple[str, dict[str, str]]]:
    """The lines of a table of `data/` and where they stand, as `csv_files.lines` reads them."""
    return list(csv_files.lines(data_dir() / file, error, columns, needed, unique))
