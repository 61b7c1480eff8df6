"""Where rows are kept: SQLite in WAL mode, one transaction per row, asked in SQL.

Several writers and a killed process leave whole rows. Rows that the project measured itself are committed as JSONL.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.ledger.row import FIELDS, Row, strict_json, value_types

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {int: "INTEGER", bool: "INTEGER", float: "REAL"}  # everything else is text
TYPES = value_types()
AS_JSON = [name for name, kind in TYPES.items() if kind in (list, dict)]
NAMES = ", ".join(f'"{name}"' for name in TYPES)
NUMBERS = [name for name, kind in TYPES.items() if kind in (int, float)]


class LedgerError(EdgeLabError):
    """The ledger cannot be read or written, or an export has no known form."""


def path() -> Path:
    """The reader's own ledger."""
    return assets.home() / "ledger.sqlite"


@contextmanager
def _open(writing: bool = False) -> Iterator[sqlite3.Connection]:
    """A connection in one transaction, with every column there."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path(), timeout=60)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            with connection:
                if writing:
                    connection.execute("BEGIN IMMEDIATE")
                _ensure(connection)
                yield connection
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(
            f"The ledger {path()} cannot be used ({error}); set EDGELAB_HOME to a folder that can be written."
        ) from None


def _ensure(connection: sqlite3.Connection) -> None:
    present = {one[1] for one in connection.execute("PRAGMA table_info(rows)")}
    if not present:
        columns = ", ".join(f'"{name}" {COLUMNS.get(kind, "TEXT")}' for name, kind in TYPES.items())
        connection.execute(f"CREATE TABLE IF NOT EXISTS rows ({columns}, PRIMARY KEY (row_id))")
    for name in TYPES.keys() - present if present else ():  # a ledger that an earlier version wrote
        connection.execute(f'ALTER TABLE rows ADD COLUMN "{name}" {COLUMNS.get(TYPES[name], "TEXT")}')
    connection.execute("CREATE INDEX IF NOT EXISTS by_recipe ON rows (recipe, model_sha)")


def add(row: Row) -> Row:
    """Write one row, in a transaction of its own.

    A verdict of the parity gate belongs to a variant and its export: rows of the same pair that have none get it.
    """
    values = vars(row) | {name: _as_json(getattr(row, name)) for name in AS_JSON}
    marks = ", ".join("?" * len(FIELDS))
    with _open(writing=True) as connection:
        connection.execute(
            f"INSERT OR REPLACE INTO rows ({NAMES}) VALUES ({marks})", [values[name] for name in FIELDS]
        )
        if row.parity and row.variant:
            connection.execute(
                "UPDATE rows SET parity = ?, parity_detail = ? WHERE parity IS NULL AND status = 'ok' "
                "AND variant = ? AND runtime = ? AND json_extract(made_by, '$.export') IS ? "
                "AND json_extract(made_by, '$.gate') IS ?",
                (row.parity, row.parity_detail, row.variant, row.runtime, *_judged(row).values()),
            )
    return row


def _as_json(value: Any) -> str | None:
    return strict_json(value) if value else None


def _judged(row: Row) -> dict[str, int | None]:
    """The versions that a verdict of the gate belongs to."""
    made_by = json.loads(row.made_by or "{}")
    return {f"made_by.{name}": made_by.get(name) for name in ("export", "gate")}


def own(last: int | None = None) -> list[Row]:
    """The reader's rows, oldest first; the newest `last` of them."""
    if not path().exists():
        return []
    with _open() as connection:
        found = connection.execute(
            f"SELECT {NAMES} FROM rows ORDER BY started_at DESC, rowid DESC LIMIT ?",
            (-1 if last is None else last,),
        ).fetchall()
    return [_decoded(values) for values in reversed(found)]


def _decoded(values: tuple) -> Row:
    return row_of(dict(zip(FIELDS, values, strict=True)))


def row_of(values: dict[str, Any]) -> Row:
    """A row from its values by name, JSON among them; names that this version does not know are left out."""
    known = {name: value for name, value in values.items() if name in FIELDS and value is not None}
    for name in known.keys() & set(AS_JSON):
        if isinstance(known[name], str):
            known[name] = json.loads(known[name])
    return Row(**known | {"fast": bool(known.get("fast"))})


def newest(questions: Iterable[tuple[dict[str, Any], Iterable[str]]]) -> list[Row | None]:
    """For each question the newest row that answers it whole, None where none does.

    A question is the values that a row must have, and the names of fields that must not be null. A name such as
    "made_by.export" is a part of a field that holds JSON.
    """
    if not path().exists():
        return [None for _ in questions]
    with _open() as connection:
        return [_newest(connection, wanted, present) for wanted, present in questions]


def _newest(connection: sqlite3.Connection, wanted: dict[str, Any], present: Iterable[str]) -> Row | None:
    found = connection.execute(_asking(tuple(wanted), tuple(present)), list(wanted.values())).fetchone()
    return None if found is None else _decoded(found)


@cache
def _asking(wanted: tuple[str, ...], present: tuple[str, ...]) -> str:
    conditions = [
        *(f"{_place(name)} IS ?" for name in wanted),
        *(f"{_place(name)} IS NOT NULL" for name in present),
    ]
    return f"SELECT {NAMES} FROM rows WHERE {' AND '.join(conditions)} ORDER BY started_at DESC, rowid DESC LIMIT 1"


def _place(name: str) -> str:
    field, dot, part = name.partition(".")
    return f'json_extract("{field}", \'$."{part}"\')' if dot else f'"{field}"'


def find(**wanted: Any) -> Row | None:
    """The newest of the reader's rows with these values."""
    return newest([(wanted, ())])[0]


def verdict(row: Row) -> tuple[str | None, str | None]:
    """The newest verdict of the parity gate on the variant and export of a row, with its numbers; None for none."""
    pair = {"variant": row.variant, "runtime": row.runtime, "status": "ok"} | _judged(row)
    (found,) = newest([(pair, ["parity"])])
    return (found.parity, found.parity_detail) if found else (None, None)


def read(file: Path) -> list[Row]:
    """Rows of a JSONL file."""
    try:
        return [row_of(json.loads(line)) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(
            f"{file} holds no rows ({error}); give a JSONL file that `edgelab ledger export` wrote."
        ) from None


def reference() -> list[Row]:
    """Rows measured by the project itself, committed under data/reference."""
    return [row for file in sorted((assets.data_dir() / "reference").glob("*.jsonl")) for row in read(file)]


def frame(rows: Iterable[Row] | None = None, source: str = "reader") -> pd.DataFrame:
    """Rows as a table with a column `source`; without rows: the project's reference rows and the reader's own.

    Fields of strangers' measurements are columns too.
    """
    import pandas as pd

    if rows is None:
        parts = [frame(reference(), "reference"), frame(own(), "reader")]
        return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    rows = list(rows)
    table = pd.DataFrame([vars(row) for row in rows], columns=list(FIELDS))
    numbers = table[NUMBERS].apply(pd.to_numeric)  # a column of nothing but null holds numbers, too
    others = pd.DataFrame([row.extra for row in rows], index=table.index)
    sources = pd.Series(source, table.index, str, "source")
    parts = pd.concat([table.drop(columns=["extra", *NUMBERS]), numbers, others, sources], axis=1)
    found = parts[[*(name for name in FIELDS if name != "extra"), *others.columns, "source"]]
    return found.copy()  # in few blocks of memory, so that columns can be added


def export(rows: list[Row], file: Path) -> Path:
    """Write rows to .csv, .parquet (flat) or .jsonl (with the windows), whole or not at all."""
    import pandas as pd

    table = pd.DataFrame([row.flat() for row in rows])
    writers = {
        ".csv": lambda draft: table.to_csv(draft, index=False),
        ".parquet": lambda draft: table.to_parquet(draft, index=False),
        ".jsonl": lambda draft: draft.write_text("".join(strict_json(vars(row)) + "\n" for row in rows)),
    }
    if file.suffix not in writers:
        raise LedgerError(f"Rows are exported to {', '.join(writers)}, not to '{file.suffix or file.name}'.")
    with assets.staged(file, "choose a place that can be written") as draft:
        writers[file.suffix](draft)
    return file
