"""What the source files say, kept on disk for processes to come while none of the files has changed.

Answering a question that the ledger knows takes no technique and no measurement, only their names and versions; reading
those from here spares the import of torch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from edgelab import assets, plugins
from edgelab.keys import key

_LOADED_NS = time.time_ns()


def recall(name: str) -> Any | None:
    """What `keep` wrote under a name, or None where a source file has changed since."""
    try:
        saved = json.loads(_file(name).read_text())
    except (OSError, ValueError):
        return None
    return saved["value"] if saved["stamp"] == _stamp(_files()) else None


def keep(name: str, value: Any) -> None:
    """Write a JSON-able value, unless a source file is newer than what this process has imported."""
    files = _files()
    if max(path.stat().st_mtime_ns for path in files) < _LOADED_NS:
        with assets.staged(_file(name)) as draft:
            draft.write_text(json.dumps({"stamp": _stamp(files), "value": value}))


def _file(name: str) -> Path:
    return assets.home() / "sources" / f"{name}.json"


def _files() -> list[Path]:
    return [*sorted(Path(__file__).parent.rglob("*.py")), *plugins.files()]


def _stamp(files: list[Path]) -> str:
    states = ((str(path), path.stat()) for path in files)
    return key("sources", *([path, stat.st_size, stat.st_mtime_ns] for path, stat in states))
