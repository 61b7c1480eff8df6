"""CSV files that people write, line by line as text; who reads one gives its columns their types."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from edgelab.errors import EdgeLabError


def lines(
    file: Path,
    error: type[EdgeLabError],
    columns: Sequence[str] = (),
    needed: Sequence[str] = (),
    unique: str = "",
) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each line stands ("links.csv, line 2") and its cells by column; "" for one that the line leaves out.

    Empty cells behind the last column are none: spreadsheets write them. columns: those there may be; any where none
    are given. needed: those that have to be there. unique: one of the needed, whose cells are not empty and differ from
    each other. Raises `error` in one sentence, with line and column, for a file that is otherwise or cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as reason:
        said = getattr(reason, "strerror", None) or "it is not UTF-8 text"
        raise error(f"{file.name} cannot be read ({said}); give a CSV file.") from None
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    rows = _rows(reader, file.name, error)
    head, first = next(rows, (f"{file.name}, line 1", []))
    there, seen = _without_empty_end(first), set()
    if unknown := [name for name in there if columns and name not in columns]:
        raise error(
            f"{head}: no column is called {unknown[0]!r}; there are {', '.join(columns)}, with commas between them."
        )
    if lacking := [name for name in needed if name not in there]:
        raise error(f"{head}: the column {lacking[0]} is missing; a first line is {','.join(needed)}.")
    if doubled := [name for name in there if there.count(name) > 1]:
        raise error(f"{head}: the column {doubled[0]} is there twice; leave one out.")
    for where, row in rows:
        row = _without_empty_end(row)
        if len(row) > len(there):
            raise error(
                f"{where}: there are {len(row)} cells for {len(there)} columns; put a text with a comma into quotes, "
                "and write a number with a full stop."
            )
        cells = dict(zip_longest(there, row, fillvalue=""))
        if unique and not cells[unique]:
            raise error(f"{where}, column {unique}: it is empty; write one that no other line has.")
        if unique and cells[unique] in seen:
            raise error(f"{where}, column {unique}: {cells[unique]!r} is there twice; leave one out.")
        seen.add(cells.get(unique))
        yield where, cells


def _without_empty_end(row: list[str]) -> list[str]:
    cells = [text.strip() for text in row]
    while cells and not cells[-1]:
        del cells[-1]
    return cells


def _rows(reader: Any, name: str, error: type[EdgeLabError]) -> Iterator[tuple[str, list[str]]]:
    """Lines with something in them, and where each begins."""
    while True:
        where = f"{name}, line {reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as reason:
            raise error(
                f"{where}: {reason}; end a text in quotes with a quote, and write two for one."
            ) from None
        if row is None:
            return
        if any(row):
            yield where, row


def figure(text: str) -> float | None:
    """The number that a text is, None where it is none. Python would read 1_000, too, which nobody writes there."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def number(cells: Mapping[str, str], column: str, where: str, error: type[EdgeLabError]) -> float:
    """The finite number in a cell. Raises `error` with line and column for anything else."""
    text = cells[column]
    value = figure(text)
    if value is None or not math.isfinite(value):
        how = "with a full stop, not a comma" if "," in text else "without its unit"
        raise error(f"{where}, column {column}: {text!r} is no number; write one such as 8 or 25.6, {how}.")
    return value
