"""The road a user goes: warm `load()`, and `edgelab compare` to its first row and to its last."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from edgelab import assets, lab

LOAD = (
    "import time, edgelab.reference as r; t = time.perf_counter(); r.load(); print(time.perf_counter() - t)"
)


KNOWN = {  # first 32 windows of wiki under edgelab-512: recipe -> bound
    "none": "21.70 ± 0.05",
    "quantize.bf16": "within 0.5 % of the baseline",
    "quantize.rtn:bits=8,group_size=0": "within 0.5 % of the baseline",
    "quantize.rtn:bits=4,group_size=64": "28.3 ± 0.4",
}


def rows() -> Iterator[tuple[str, str, str]]:
    loads = [float(subprocess.check_output([sys.executable, "-c", LOAD])) for _ in range(3)]
    yield "warm load(), fresh process, median of 3, s", f"{statistics.median(loads):.2f}", "under 2"
    assets.fetch()
    with tempfile.TemporaryDirectory() as home:  # an empty ledger and cache, with the assets that are there
        (Path(home) / "assets").symlink_to(assets.home() / "assets")
        started = time.perf_counter()
        command = [sys.executable, "-m", "edgelab.cli", "compare", "--json"]
        environment = os.environ | {"EDGELAB_HOME": home}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as run:
            marks = [time.perf_counter() - started for _ in run.stdout]
    if run.returncode or len(marks) != len(lab.DEFAULT_SET):
        raise RuntimeError(f"edgelab compare ended with {run.returncode} after {len(marks)} rows")
    yield "edgelab compare to the first row, s", f"{marks[0]:.0f}", "60"
    yield f"edgelab compare, all {len(marks)} rows, s", f"{marks[-1]:.0f}", "300"
    for row in lab.stream(KNOWN, only="quality", windows=32, force=True):
        yield f"perplexity, 32 windows, `{row.recipe}`", f"{row.ppl:.3f}", KNOWN[row.recipe]
