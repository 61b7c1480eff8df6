"""Adapters to try: rank and places, over saved rows, and one that is trained live while its loss is drawn."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets
import pandas as pd

from edgelab import ledger, rows
from edgelab.ledger import Row
from edgelab.plots import training_curve
from edgelab.recipes import Context, Recipe, parse
from edgelab.reference import EMBEDDED, Source, resolve
from edgelab.storage import variants
from edgelab.storage.checkpoints import Point
from edgelab.training import Trained
from edgelab.widgets import WIDE, Picture
from edgelab.widgets.live import Live

RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = {"all linear layers": "all", "attention": "attention", "queries and values": "q_proj/v_proj"}


def adapter_trials(
    steps: int = 40,
    corpus: str = "stories",
    windows: int = 8,
    saved: pd.DataFrame | None = None,
    model: str = EMBEDDED,
) -> ipywidgets.VBox:
    """Choose a rank and where the adapter sits: see the row where there is one, or train it now and watch.

    A run that is stopped is kept, and goes on from there when it is started again. steps: of every run. corpus: to
    train on, and whose first `windows` windows are scored. saved: as `ledger.frame()`, which is the default.
    """
    saved, source = ledger.frame() if saved is None else saved, resolve(model)
    rank = ipywidgets.SelectionSlider(options=RANKS, value=8, description="Rank", **WIDE)
    targets = ipywidgets.Dropdown(options=TARGETS, description="Next to", **WIDE)
    answer, image = ipywidgets.HTML(), Picture()
    measured: list[Row] = []

    def chosen() -> str:
        settings = f"rank={rank.value},targets={targets.value},corpus={corpus},steps={steps}"
        return str(parse(f"lora:{settings}"))

    def redraw(change: dict | None = None) -> None:
        known = [part for part in (saved, ledger.frame(measured)) if len(part)] or [saved]
        frame = rows.first_windows(pd.concat(known, ignore_index=True), windows, corpus, source.name)
        found = frame[frame["recipe"] == chosen()]
        answer.value = (
            trial_sentence(found.iloc[-1], frame)
            if len(found)
            else f"{chosen()} has not been trained yet. The button trains it and draws its loss on the way."
        )
        draw()

    def draw() -> None:
        points = curve_of(parse(chosen()), source)
        if points:
            image.draw(training_curve({f"rank {rank.value}": points}, "Cross-entropy", 5))
        else:
            image.value = ""

    def add(new: list[Row]) -> None:
        measured.extend(new)
        redraw()

    controls = (rank, targets)
    live = Live(
        lambda: [rows.BASELINE, chosen()],
        add,
        controls,
        on_tick=_when_it_grows(lambda: curve_of(parse(chosen()), source), draw),
        only="quality",
        windows=windows,
        corpus=corpus,
        model=model,
    )
    for control in controls:
        control.observe(redraw, "value")
        control.observe(lambda change: live.offer(), "value")
    redraw()
    live.offer()
    return ipywidgets.VBox([*controls, live.box, answer, image])


def _when_it_grows(points: Callable[[], list[Point]], draw: Callable[[], None]) -> Callable[[], None]:
    """Draw, but only where there are more points than before: a picture takes longer than a look."""
    before = 0

    def look() -> None:
        nonlocal before
        count = len(points())
        if count != before:
            before = count
            draw()

    return look


def curve_of(recipe: Recipe, source: Source, seed: int = 0) -> list[Point]:
    """The curve of a recipe that trains once: of a finished variant, or as far as a run of it has come."""
    folder = variants.address(recipe, source, seed)
    if variants.is_whole(folder):
        return variants.read_about(folder)["record"]["curve"]
    stages = variants.stage_keys(recipe, source, seed)
    for stage, technique in zip(stages, recipe.techniques, strict=False):  # the last stage is the result
        if isinstance(technique, Trained):
            return technique.checkpoint(Context(seed=seed, stage=stage)).points()
    return []


def trial_sentence(row: pd.Series, frame: pd.DataFrame) -> str:
    """HTML: what an adapter gives and takes; its perplexity is also in `data-ppl`."""
    baseline = frame.loc[frame["recipe"] == rows.BASELINE, "ppl"].tail(1)
    before = f", from {baseline.item():.2f} without it" if len(baseline) else ""
    return (
        f'<span class="edgelab-trial" data-ppl="{row["ppl"]:.6f}">Perplexity <b>{row["ppl"]:.2f}</b>{before}; '
        f"{row['adapter_mb']:.2f} MB of adapter; {row['apply_s']:.0f} s of training.</span>"
    )
