"""The course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.methods import METHOD_COLOURS
from edgelab.plots.style import GREY, NothingToDraw, new_chart, scale_axis, stamp, style_axes

LOOK = "validation_loss"

Curve = Sequence[Mapping[str, float]]


def training_curve(
    curves: Mapping[str, Curve], loss: str = "KL to the reference", mean_of: int = 9
) -> Figure:
    """Loss over training tokens, a colour for each run: a dot for every step, a line for the mean around it.

    curves: by name, points {"step", "tokens", "seconds", "loss"} as `training.train` returns them and `variant.json`
    keeps them under record; the loss in nats, of the batches of a step before it. Where a run looked at held-out text,
    "validation_loss" is drawn as a square. loss: what the axis calls it. mean_of: steps in the mean, half of them
    before and half after; fewer at the ends. Raises NothingToDraw where no run has a point.
    """
    runs = {name: pd.DataFrame(list(curve)) for name, curve in curves.items() if len(curve)}
    if not runs:
        raise NothingToDraw(
            "no run has a point of training: measure a recipe that trains, such as qat:bits=3"
        )
    if mean_of < 1:
        raise NothingToDraw(f"mean_of={mean_of} batches have no mean; use 1 or more")
    figure = new_chart(8.5, 4.6)
    axes = figure.subplots()
    scale_axis(axes, "x", pd.Series([0.0]))
    drawn = [run[name].dropna() for run in runs.values() for name in ("loss", LOOK) if name in run]
    scale_axis(axes, "y", pd.concat(drawn))
    axes.margins(0.08)
    marks, lines, looked = [], [], False
    for position, (name, run) in enumerate(runs.items()):
        tint = METHOD_COLOURS[position % len(METHOD_COLOURS)]
        mean = run["loss"].rolling(mean_of, min_periods=1, center=True).mean()
        axes.scatter(run["tokens"], run["loss"], s=14, color=tint, alpha=0.4, linewidth=0, zorder=2)
        axes.plot(run["tokens"], mean, color=tint, linewidth=1.8, zorder=3)
        if LOOK in run:
            looked = True
            looks = run.dropna(subset=[LOOK])
            axes.plot(looks["tokens"], looks[LOOK], "s:", color=tint, markersize=5, linewidth=1, zorder=4)
        lines.append(pd.DataFrame({"x": run["tokens"], "y": mean}).to_numpy())
        minutes = run["seconds"].iloc[-1] / 60
        text = f"{name}: {run['step'].iloc[-1]:.0f} steps, {minutes:.1f} min"
        marks.append(Mark(run["tokens"].iloc[-1], mean.iloc[-1], text, tint))
    axes.set_xlim(left=0)
    axes.set_xlabel("Tokens of training text", fontsize=9.5)
    axes.set_ylabel(f"{loss} (nats per token)", fontsize=9.5)
    legend = [
        Line2D([], [], linestyle="", marker="o", color=GREY, alpha=0.5, markersize=4, label="a batch"),
        Line2D([], [], color=GREY, linewidth=1.8, label=f"mean of {mean_of} batches"),
    ]
    legend = legend[: 2 if mean_of > 1 else 1]
    if looked:
        legend.append(
            Line2D([], [], linestyle=":", marker="s", color=GREY, markersize=5, label="held-out text")
        )
    style_axes(axes, "Loss while training, lower is better", legend)
    stamp(figure)
    label_marks(axes, marks, lines)
    return figure
