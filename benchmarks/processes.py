"""Processes: how long the fork server takes to start, and what a measured process then takes to answer."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from edgelab.measure.isolation import Isolated

START = (
    "import time; from edgelab.measure.isolation import Isolated, get_ready; t = time.perf_counter(); get_ready(2);"
    "process = Isolated('builtins:str', 2); process.call('upper'); print(time.perf_counter() - t); process.close()"
)
ANSWERS = 10


def rows() -> Iterator[tuple[str, str, str]]:
    starts = [float(subprocess.check_output([sys.executable, "-c", START])) for _ in range(3)]
    yield "first answer, with the start of the server, median of 3, s", f"{statistics.median(starts):.1f}", ""
    _answer_s()
    answers = statistics.median(_answer_s() for _ in range(ANSWERS))
    yield f"first answer of a forked process, median of {ANSWERS}, s", f"{answers:.2f}", "under 0.5"


def _answer_s() -> float:
    started = time.perf_counter()
    with Isolated("builtins:str", threads=2) as process:
        process.call("upper")
        return time.perf_counter() - started
