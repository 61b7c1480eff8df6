"""Killed at any moment and started again, and two at once: every row once, nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from edgelab import assets, ledger
from edgelab.storage import cache

RECIPES = (
    "none",
    "quantize.bf16",
    "quantize.rtn:bits=4,group_size=32",
    "quantize.hqq:bits=4 + quantize.embedding",
)
KILLS = 12


@pytest.fixture
def comparison(tiny, tmp_path, story):
    """Starts `edgelab compare` of some recipes on the tiny model."""
    file = tmp_path / "story.txt"
    file.write_text(story.text, encoding="utf-8")
    options = [
        "--model",
        str(tiny),
        "--corpus",
        str(file),
        "--windows",
        "2",
        "--threads",
        "1",
        "--only",
        "quality",
    ]

    def start(*recipes: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "edgelab.cli", "compare", *recipes, "--json", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"EDGELAB_FAST": "1", "TQDM_DISABLE": "1"},
        )

    return start


def ours() -> list[psutil.Process]:
    """Living processes that measure in this test's home."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("EDGELAB_HOME") == os.environ["EDGELAB_HOME"]
            if mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_alone() -> None:
    deadline = time.monotonic() + 30
    while ours():
        assert time.monotonic() < deadline, [process.cmdline() for process in ours()]
        time.sleep(0.1)


def test_killed_at_a_dozen_moments_it_ends_with_every_row_once(comparison):
    moments = random.Random(0)
    for _ in range(KILLS):
        run = comparison(*RECIPES)
        try:
            run.wait(moments.uniform(1.5, 6))  # before, it only imports
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        wait_until_alone()
    run = comparison(*RECIPES)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and len(said.splitlines()) == len(RECIPES)
    rows = ledger.own()
    assert [row.status for row in rows] == ["ok"] * len(RECIPES)
    assert len({row.recipe for row in rows}) == len(rows)
    wait_until_alone()
    run = comparison("quantize.fp16")  # a new variant tidies up behind the killed ones
    run.communicate(timeout=300)
    assert run.returncode == 0
    assert list(cache.drafts()) == [] and not list(assets.home().rglob("*.part"))


def test_two_at_once_on_one_new_recipe_both_succeed(comparison):
    recipes = ["quantize.rtn:bits=4", "quantize.hqq:bits=2", "quantize.hqq:bits=5"]
    for recipe in recipes:
        runs = [comparison("none", recipe) for _ in range(2)]
        for run in runs:
            said, errors = run.communicate(timeout=300)
            assert run.returncode == 0, errors
            assert [json.loads(line)["status"] for line in said.splitlines()] == ["ok", "ok"]
    assert len(list(cache.place("variants").glob("[!.]*"))) == 1 + len(recipes)
