"""The cache below `home()`: variants with their exports, hidden states, sensitivities and compiled code.

Everything in it can be made again. What was unused for longest goes first when the whole is over its limit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from edgelab import assets
from edgelab.errors import EdgeLabError

KINDS = {
    "variants": "packed weights, and what engines made of them",
    "states": "what references and teachers made of texts",
    "sensitivity": "sensitivities of layers",
    "training": "runs of training that were stopped",
    "inductor": "compiled code",
}
DEFAULT_LIMIT_GB = 20.0
DRAFT = re.compile(r"\.(?P<pid>\d+)-\w+\.part$")  # as `assets.staged` names what is not whole yet


class CacheError(EdgeLabError):
    """The limit of the cache is no number, or too small for what is asked."""


@dataclass(frozen=True)
class Entry:
    """One thing in the cache: a folder or a file, what it is, its bytes on disk and when it was last used."""

    path: Path
    what: str
    n_bytes: int
    used: float


def place(kind: str) -> Path:
    """The folder of one kind of KINDS."""
    return assets.home() / kind


def locked(path: Path) -> FileLock:
    """A lock that other processes respect while one of them makes `path`; the system frees it with its process."""
    locks = assets.home() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise assets.unwritable(assets.home(), error) from None
    return FileLock(locks / f"{path.name}.lock")


def entries() -> list[Entry]:
    """Everything in the cache, longest unused first."""
    paths = [path for kind in KINDS for path in place(kind).glob("[!.]*")]
    found = [entry for entry in map(_entry, paths) if entry is not None]
    return sorted(found, key=lambda entry: entry.used)


def _entry(path: Path) -> Entry | None:
    """None where another process has removed it meanwhile."""
    try:
        return Entry(path, _what(path), tree_bytes(path), path.stat().st_mtime)
    except FileNotFoundError:
        return None


def _what(path: Path) -> str:
    """In words, for variants the recipe and model that they say they are."""
    if path.parent.name != "variants":
        return KINDS[path.parent.name]
    try:
        about = json.loads((path / "variant.json").read_text())
        return f"{about['recipe']} of {about['model']}"
    except (OSError, ValueError, KeyError):
        return "a damaged variant"


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of the files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def touch(path: Path) -> None:
    """Note that something was used now; a cache that cannot be written can still be read."""
    try:
        os.utime(path)
    except OSError:
        return


def trim(*keep: Path) -> None:
    """Remove what was unused for longest until the cache is within $EDGELAB_CACHE_GB (default 20), but not `keep`.

    Drafts of processes that have ended go too.
    """
    for draft in drafts():
        _remove(draft)
    limit = _limit_gb() * 1e9
    found = entries()
    total = sum(entry.n_bytes for entry in found)
    for entry in found:
        if total <= limit:
            break
        if entry.path not in keep:
            _remove(entry.path)
            total -= entry.n_bytes


def _limit_gb() -> float:
    text = os.environ.get("EDGELAB_CACHE_GB") or DEFAULT_LIMIT_GB
    try:
        return float(text)
    except ValueError:
        raise CacheError(f"EDGELAB_CACHE_GB={text} is no number of gigabytes, such as 20.") from None


def drafts() -> Iterator[Path]:
    """What processes that have ended left unfinished."""
    for kind in KINDS:
        for path in (*place(kind).glob(".*.part"), *place(kind).glob("*/exports/.*.part")):
            named = DRAFT.search(path.name)
            if named and not psutil.pid_exists(int(named["pid"])):
                yield path


def clear() -> int:
    """Empty the cache; returns the bytes it freed. Model, texts and ledger are no part of it."""
    freed = sum(tree_bytes(place(kind)) for kind in KINDS if place(kind).exists())
    for kind in KINDS:
        shutil.rmtree(place(kind), ignore_errors=True)
    return freed


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
