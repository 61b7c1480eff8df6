"""Memory: the peak of a process that loads a variant and generates, without what it needs to load nothing."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from edgelab.measure import Subject, measurement

MMAP_THRESHOLD = -3, 1 << 18  # of glibc's mallopt: M_MMAP_THRESHOLD, bytes


@measurement("peak memory", part="memory", needs="process", fields=("peak_rss_mb",))
def peak_memory(subject: Subject) -> dict[str, Any]:
    """`subject.nothing_mb` is the peak of the process before it loaded anything."""
    if subject.session.elsewhere:
        return {}
    return {"peak_rss_mb": peak_rss_mb() - subject.nothing_mb}


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM starts anew with the process; ru_maxrss is inherited from the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def give_back_at_once() -> bool:
    """Let this process return what it frees to the system, tensors at least; False where the C library cannot.

    glibc keeps freed blocks of up to 32 MB for later, and what it keeps is full of holes: the peak of a training step
    is then that of its habits, by a third more than what lived at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(*MMAP_THRESHOLD) == 1
