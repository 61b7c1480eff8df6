"""The road a user goes: warm `load()`, and `edgelab compare` to its first row and to its last."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from edgelab import assets, lab, ledger, recipes

LOAD = (
    "import time, edgelab.reference as r; t = time.perf_counter(); r.load(); print(time.perf_counter() - t)"
)


KNOWN = {  # first 32 windows of wiki under edgelab-512: recipe -> bound
    "none": "21.70 ± 0.05",
    "quantize.bf16": "within 0.5 % of the baseline",
    "quantize.rtn:bits=8,group_size=0": "within 0.5 % of the baseline",
    "quantize.rtn:bits=4,group_size=64": "28.3 ± 0.4",
}


MODULES = "el.plots, el.rows, el.devices; import edgelab.widgets.side_by_side"
QUICK = {  # command -> seconds it may take
    ("-c", "import edgelab"): 0.1,
    ("-m", "edgelab.cli", "--help"): 0.3,
    ("-m", "edgelab.cli", "ledger", "show", "--reference"): 1.0,
    ("-c", f"import edgelab as el; {MODULES}"): 2.0,
}
PLANNED = 10_000


def rows() -> Iterator[tuple[str, str, str]]:
    loads = [float(subprocess.check_output([sys.executable, "-c", LOAD])) for _ in range(3)]
    yield "warm load(), fresh process, median of 3, s", f"{statistics.median(loads):.2f}", "under 2"
    empty = min(_seconds("-c", "pass") for _ in range(5))
    for command, bound in QUICK.items():
        spent = statistics.median(_seconds(*command) for _ in range(5)) - empty
        yield f"`{' '.join(command)}`, beyond an empty interpreter, s", f"{spent:.2f}", f"{bound:g}"
    assets.fetch()
    with tempfile.TemporaryDirectory() as home:  # an empty ledger and cache, with the assets that are there
        (Path(home) / "assets").symlink_to(assets.home() / "assets")
        environment = os.environ | {"EDGELAB_HOME": home, "TQDM_DISABLE": "1"}
        yield from _comparison(environment)
        yield from _answers(environment)
        yield from _planning(environment)


def _seconds(*arguments: str, environment: dict[str, str] | None = None) -> float:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - started


def _comparison(environment: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "edgelab.cli", "compare", "--json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        found = [(json.loads(line), time.perf_counter() - started) for line in run.stdout]
    if run.returncode or len(found) != len(lab.DEFAULT_SET):
        raise RuntimeError(f"edgelab compare ended with {run.returncode} after {len(found)} rows")
    yield "edgelab compare to the first row, s", f"{found[0][1]:.0f}", "60"
    yield f"edgelab compare, all {len(found)} rows, s", f"{found[-1][1]:.0f}", "300"
    for row, _ in found:
        if row["recipe"] in KNOWN:
            yield f"perplexity, 32 windows, `{row['recipe']}`", f"{row['ppl']:.3f}", KNOWN[row["recipe"]]


def _answers(environment: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """A row that is known, one of speed alone, and the tasks of one recipe, each as a command of its own."""
    measure = ("-m", "edgelab.cli", "measure")
    recipe = lab.DEFAULT_SET[3]
    _seconds(*measure, recipe, environment=environment)  # compared with nothing: another question than above
    known = statistics.median(_seconds(*measure, recipe, environment=environment) for _ in range(5))
    yield "a row that is known, s", f"{known:.2f}", "under 1.5"
    speed = (*measure, recipe, "--only", "speed", "--force")
    spent = statistics.median(_seconds(*speed, environment=environment) for _ in range(3))
    yield "a row of speed alone, s", f"{spent:.1f}", "at most 8"
    yield (
        "story cloze and samples of one recipe, s",
        f"{_seconds(*measure, 'none', '--only', 'tasks', environment=environment):.0f}",
        "at most 90",
    )


def _planning(environment: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Planning thousands of different questions whose answers the ledger has; the answers are copies of one row."""
    os.environ["EDGELAB_HOME"] = environment["EDGELAB_HOME"]
    known = lab.planned(["none"])[0].row
    texts = [
        f"quantize.rtn:bits={bits},group_size={size}" for bits in range(2, 9) for size in range(1, 1429 + 1)
    ]
    texts = [str(recipes.parse(text)) for text in texts[:PLANNED]]
    made_by = json.dumps(json.loads(known.made_by) | {"techniques": "1"})
    for text in texts:
        ledger.add(replace(known, recipe=text, row_id=uuid.uuid4().hex, made_by=made_by, decode_ratio=1.0))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        steps = lab.planned(texts)
        times.append(time.perf_counter() - started)
    if not all(step.is_known for step in steps):
        raise RuntimeError("an answer of the ledger was not found")
    yield f"planning {len(texts):,} known questions, s", f"{statistics.median(times):.2f}", "under 2"
