"""The ledger: all rows. One row is one measurement: flat, units in the names, null where nothing was measured."""

from edgelab.ledger.provenance import machine, provenance, version, versions
from edgelab.ledger.row import (
    FIELDS,
    Field,
    Row,
    UndeclaredField,
    ValueNotFinite,
    declare,
    every_field,
    strict_json,
)
from edgelab.ledger.store import (
    LedgerError,
    add,
    export,
    find,
    frame,
    newest,
    own,
    path,
    read,
    reference,
    verdict,
)

__all__ = [
    "FIELDS",
    "Field",
    "LedgerError",
    "Row",
    "UndeclaredField",
    "ValueNotFinite",
    "add",
    "declare",
    "every_field",
    "export",
    "find",
    "frame",
    "machine",
    "newest",
    "own",
    "path",
    "provenance",
    "read",
    "reference",
    "strict_json",
    "verdict",
    "version",
    "versions",
]
