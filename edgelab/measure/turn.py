"""Never two timings at once on one host: a lock that all processes of a user share."""

from __future__ import annotations

import getpass
import tempfile
from pathlib import Path

from filelock import FileLock


def timing_lock() -> FileLock:
    """A context manager: whoever holds it is timed, the others wait. The system frees it with its process."""
    return FileLock(Path(tempfile.gettempdir()) / f"edgelab-timing-{getpass.getuser()}.lock")
