"""How soon a measured process answers, forked from the server and as a fresh interpreter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from unittest import mock

from edgelab.measure import forking
from edgelab.measure.isolation import Isolated

ROUNDS = 10


def rows() -> Iterator[tuple[str, str, str]]:
    yield "a server of processes from its start to the first answer, s", f"{_first_answer():.2f}", ""
    forked = [_first_answer() for _ in range(ROUNDS)]
    yield (
        f"first answer of a forked process, median of {ROUNDS}, s",
        f"{statistics.median(forked):.3f}",
        "under 0.5",
    )
    with mock.patch.object(forking, "SUPPORTED", False):
        spawned = [_first_answer() for _ in range(3)]
    yield "first answer of a fresh interpreter, median of 3, s", f"{statistics.median(spawned):.2f}", ""


def _first_answer() -> float:
    started = time.perf_counter()
    with Isolated("edgelab.lab.bench:Bench", threads=2, recipe="none", model="embedded", seed=0) as process:
        process.call("pid")
        return time.perf_counter() - started
