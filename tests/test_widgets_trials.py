"""Adapters to try: saved rows answer at once, a live run is drawn while it trains, and one that is stopped goes on."""

import re
import time

import pytest

from edgelab import assets, ledger
from edgelab.recipes import parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.widgets.trials import adapter_trials, curve_of

SECONDS = 120  # more than anything here takes, on a busy machine


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


CORPUS = "stories"
REAL = assets.home() / "assets"  # before a test has a home of its own


@pytest.fixture(autouse=True)
def texts(home):
    """The embedded texts, in the home of the test."""
    home.mkdir(exist_ok=True)
    (home / "assets").symlink_to(REAL)


def box_of(tiny, steps):
    """The widget and its parts by name."""
    box = adapter_trials(steps=steps, corpus=CORPUS, windows=2, model=str(tiny))
    rank, targets, live, answer, image = box.children
    start, stop, _ = live.children[0].children
    return {"rank": rank, "targets": targets, "start": start, "stop": stop, "said": live.children[1],
            "answer": answer, "image": image}  # fmt: skip


def recipe(steps, rank=8):
    return str(parse(f"lora:rank={rank},corpus={CORPUS},steps={steps}"))


def test_one_is_trained_and_its_row_answers(tiny):
    parts = box_of(tiny, 3)
    assert "has not been trained yet" in parts["answer"].value and not parts["image"].value
    parts["start"].click()
    until(lambda: not parts["start"].disabled)
    row = next(row for row in ledger.own() if row.recipe == recipe(3))
    shown = float(re.search(r'data-ppl="([\d.]+)"', parts["answer"].value)[1])
    assert shown == pytest.approx(row.ppl) and f"{row.adapter_mb:.2f} MB" in parts["answer"].value
    assert parts["image"].value.startswith("<img")
    parts["rank"].value = 16
    assert "has not been trained yet" in parts["answer"].value and not parts["image"].value
    parts["rank"].value = 8
    assert "data-ppl" in parts["answer"].value


def test_one_that_is_stopped_goes_on(tiny):
    steps, source = 400, resolve(str(tiny))
    parts = box_of(tiny, steps)
    asked = parse(recipe(steps))
    parts["start"].click()
    until(lambda: len(curve_of(asked, source)) >= 3)
    until(lambda: parts["image"].value.startswith("<img"))  # drawn while it trains
    parts["stop"].click()
    until(lambda: not parts["start"].disabled)
    reached = len(curve_of(asked, source))
    assert parts["said"].value.startswith("Stopped") and 3 <= reached < steps
    assert not variants.is_whole(variants.address(asked, source, 0))
    parts["start"].click()
    until(lambda: len(curve_of(asked, source)) > reached)
    parts["stop"].click()
    until(lambda: not parts["start"].disabled)
    steps_seen = [point["step"] for point in curve_of(asked, source)]
    assert steps_seen == list(range(1, len(steps_seen) + 1))
