"""The ledger: all rows. One row is one measurement: flat, units in the names, null where nothing was measured.

SQLite in WAL mode, one transaction per row, so that several writers and a killed process leave whole rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import sqlite3
import subprocess
import typing
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pandas as pd
import psutil

from edgelab import assets
from edgelab.errors import EdgeLabError


class LedgerError(EdgeLabError):
    """The ledger cannot be read or written, or an export has no known form."""


@dataclass
class Row:
    """One measurement. MB is 10^6 bytes, NLL in nats, rates in tokens per second; see README for every field."""

    recipe: str
    # identity
    family: str = "baseline"
    model: str = ""
    model_sha: str = ""
    runtime: str = "torch"
    kernel: str | None = None
    badge: str | None = None
    seed: int = 0
    fast: bool = False
    status: str = "ok"
    error: str | None = None
    # quality
    protocol: str | None = None
    corpus: str | None = None
    windows: int | None = None
    n_tokens: int | None = None
    nll_sum: float | None = None
    ppl: float | None = None
    bits_per_byte: float | None = None
    delta_nll: float | None = None
    delta_nll_low: float | None = None
    delta_nll_high: float | None = None
    kld_mean: float | None = None
    top1_agreement: float | None = None
    # size
    parameters: int | None = None
    weights_mb: float | None = None
    linear_mb: float | None = None
    embedding_mb: float | None = None
    scales_mb: float | None = None
    bits_per_weight: float | None = None
    file_mb: float | None = None
    kv_cache_mb_per_1k: float | None = None
    peak_rss_mb: float | None = None
    # speed
    export_s: float | None = None  # writing the engine's file, once for each variant
    load_s: float | None = None
    compile_s: float | None = None  # less where compiled code of an earlier run is on disk
    prefill_tokens: int | None = None
    decode_tokens: int | None = None
    ttft_ms_p50: float | None = None
    prefill_tok_s: float | None = None
    tpot_ms_p50: float | None = None
    tpot_ms_p95: float | None = None
    decode_tok_s: float | None = None
    iterations: int | None = None
    prefill_ratio: float | None = None  # to the baseline in turns with it, as decode_ratio is
    decode_ratio: float | None = None
    decode_ratio_low: float | None = None
    decode_ratio_high: float | None = None
    # cost of making it
    apply_s: float | None = None
    train_tokens: int | None = None
    calibration_tokens: int | None = None
    notes: str | None = None  # what a technique has to say about this run
    # energy
    energy_j_per_token: float | None = None
    energy_basis: str | None = None
    # parity
    parity: str | None = None
    parity_detail: str | None = None
    # provenance
    host: str | None = None
    cpu: str | None = None
    cores: int | None = None
    threads: int | None = None
    ram_gb: float | None = None
    os: str | None = None
    python: str | None = None
    versions: str | None = None
    git_sha: str | None = None
    started_at: str | None = None
    duration_s: float | None = None
    row_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    window_nll: list[float] | None = None  # mean NLL of each window, for paired differences

    def flat(self) -> dict[str, object]:
        """The row without its windows: one value per field."""
        return {name: value for name, value in vars(self).items() if name != "window_nll"}


FIELDS = [one.name for one in dataclasses.fields(Row)]
_BOOLS = {"fast"}


def path() -> Path:
    """The reader's own ledger."""
    return assets.home() / "ledger.sqlite"


def _types() -> dict[str, str]:
    names = {int: "INTEGER", bool: "INTEGER", float: "REAL"}
    hints = typing.get_type_hints(Row)
    return {name: names.get((typing.get_args(hints[name]) or (hints[name],))[0], "TEXT") for name in FIELDS}


@contextmanager
def _open() -> Iterator[sqlite3.Connection]:
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path(), timeout=60)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            with connection:
                yield connection
        finally:
            connection.close()
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(
            f"The ledger {path()} cannot be used ({error}); set EDGELAB_HOME to a folder that can be written."
        ) from None


def _ensure(connection: sqlite3.Connection) -> None:
    columns = ", ".join(f'"{name}" {kind}' for name, kind in _types().items())
    connection.execute(f"CREATE TABLE IF NOT EXISTS rows ({columns}, PRIMARY KEY (row_id))")
    present = {one[1] for one in connection.execute("PRAGMA table_info(rows)")}
    for name, kind in _types().items():
        if name not in present:  # a ledger written by an earlier version
            connection.execute(f'ALTER TABLE rows ADD COLUMN "{name}" {kind}')


def add(row: Row) -> Row:
    """Write one row, in a transaction of its own."""
    values = vars(row) | {"window_nll": None if row.window_nll is None else json.dumps(row.window_nll)}
    names = ", ".join(f'"{name}"' for name in FIELDS)
    with _open() as connection:
        connection.execute("BEGIN IMMEDIATE")
        _ensure(connection)
        marks = ", ".join("?" * len(FIELDS))
        connection.execute(
            f"INSERT OR REPLACE INTO rows ({names}) VALUES ({marks})", [values[n] for n in FIELDS]
        )
    return row


def own() -> list[Row]:
    """The reader's rows, oldest first."""
    if not path().exists():
        return []
    with _open() as connection:
        _ensure(connection)
        names = ", ".join(f'"{name}"' for name in FIELDS)
        found = connection.execute(f"SELECT {names} FROM rows ORDER BY started_at, rowid").fetchall()
    return [_row(dict(zip(FIELDS, values, strict=True))) for values in found]


def _row(values: dict[str, object]) -> Row:
    windows = values.get("window_nll")
    values["window_nll"] = json.loads(windows) if isinstance(windows, str) else windows
    return Row(
        **{name: bool(value) if name in _BOOLS else value for name, value in values.items() if name in FIELDS}
    )


def read(file: Path) -> list[Row]:
    """Rows of a JSONL file."""
    try:
        return [_row(json.loads(line)) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise LedgerError(
            f"{file} holds no rows ({error}); give a JSONL file that `edgelab ledger export` wrote."
        ) from None


def reference() -> list[Row]:
    """Rows measured by the project itself, committed under data/reference."""
    return [row for file in sorted((assets.data_dir() / "reference").glob("*.jsonl")) for row in read(file)]


def find(**wanted: object) -> Row | None:
    """The newest of the reader's rows with these values."""
    return next(
        (row for row in reversed(own()) if all(getattr(row, k) == v for k, v in wanted.items())), None
    )


def frame(rows: Iterable[Row] | None = None, source: str = "reader") -> pd.DataFrame:
    """Rows as a table with a column `source`; without rows: the project's reference rows and the reader's own."""
    if rows is None:
        parts = [frame(reference(), "reference"), frame(own(), "reader")]
        return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    table = pd.DataFrame([vars(row) for row in rows], columns=FIELDS)
    numbers = [name for name, kind in _types().items() if kind != "TEXT" and name not in _BOOLS]
    table[numbers] = table[numbers].apply(pd.to_numeric)  # a column of nothing but null holds numbers, too
    return table.assign(source=source)


def export(rows: list[Row], file: Path) -> Path:
    """Write rows to .csv, .parquet (flat) or .jsonl (with the windows), whole or not at all."""
    draft = file.with_name(f".{file.name}.part")
    table = pd.DataFrame(
        [row.flat() for row in rows], columns=[name for name in FIELDS if name != "window_nll"]
    )
    writers = {
        ".csv": lambda: table.to_csv(draft, index=False),
        ".parquet": lambda: table.to_parquet(draft, index=False),
        ".jsonl": lambda: draft.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows)),
    }
    if file.suffix not in writers:
        raise LedgerError(f"Rows are exported to {', '.join(writers)}, not to '{file.suffix or file.name}'.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writers[file.suffix]()
        draft.replace(file)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise LedgerError(
            f"Cannot write {file} ({error.strerror}); choose a place that can be written."
        ) from None
    return file


def provenance(threads: int, packages: Iterable[str] = (), export: int | None = None) -> dict[str, object]:
    """Machine, versions (those of `packages` and of an engine's `export` too) and time: where a row comes from.

    `host` is a hash, so that rows can be shared.
    """
    machine = hashlib.sha256(f"{platform.node()} {_cpu()}".encode()).hexdigest()[:10]
    return {
        "host": machine,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(packages, export),
        "git_sha": _git_sha(),
        "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def versions(packages: Iterable[str] = (), export: int | None = None) -> str:
    """What decides the numbers, an engine's `packages` and `export` among it, as JSON text; null: not installed."""
    names = ("edgelab", "torch", "transformers", "numpy", *packages)
    found = {name: version(name) for name in names}
    return json.dumps(found | ({} if export is None else {"export": str(export)}))


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        if found:
            return found
    return platform.processor() or platform.machine()


def _git_sha() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
