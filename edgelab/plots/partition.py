"""Models cut over several devices: what the parts take, what a cut costs, who works when, and what was predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from edgelab.deployments.partition.baselines import cloud_of
from edgelab.deployments.partition.problem import Problem
from edgelab.deployments.partition.profile import Timings
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.methods import METHOD_COLOURS
from edgelab.plots.style import BASELINE_LINE, GREY, Chart, NothingToDraw, new_chart, stamp, style_axes

PLANNER_NAMES = {
    "edge_solo": "source alone",
    "cloud_edge_even": "half and half",
    "cloud_edge_opt": "best cut",
    "edgeshard": "EdgeShard",
    "exact": "exact",
}


def part_times(timings: Timings, context: int = 128) -> Chart:
    """Milliseconds of every part for a token, with the half of the parts and the half of the time."""
    ms = 1e3 * timings.decode_s(context)
    places = np.arange(len(ms))
    figure = new_chart(9, 3.6)
    axes = figure.subplots()
    axes.bar(places, ms, color=["#009E73", *["#56B4E9"] * (len(ms) - 2), "#E69F00"], width=0.85, zorder=2)
    by_time = int(np.abs(ms.cumsum() - ms.sum() / 2).argmin()) + 1
    blocks = len(ms) - 2
    for place, words, height in (
        (1 + blocks / 2, "half of the blocks", 0.97),
        (by_time, "half of the time", 0.82),
    ):
        axes.axvline(place - 0.5, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(words, (place - 0.5, height), xycoords=("data", "axes fraction"), xytext=(4, 0),
                      textcoords="offset points", fontsize=9, va="top")  # fmt: skip
    shown = range(6, blocks + 1, 5)
    axes.set_xticks(
        [0, *shown, len(ms) - 1], ["embedding", *(f"block {place - 1}" for place in shown), "head"]
    )
    axes.set_ylabel("ms per token")
    times = ms[-1] / np.median(ms[1:-1])
    style_axes(axes, f"The head takes as long as {times:.1f} blocks")
    return stamp(figure)


def every_cut(problem: Problem, rates_mbps: Sequence[float]) -> Chart:
    """Latency of every cut between the source and its cloud, a line for each rate of the link between them."""
    cloud = cloud_of(problem)
    cuts = np.arange(1, problem.layers)
    figure = new_chart(8.5, 4.2)
    axes = figure.subplots()
    alone = 1e3 * problem.cost((0,) * problem.layers, "latency")
    marks, lines = [], []
    for tint, mbps in zip(METHOD_COLOURS, rates_mbps, strict=False):
        found = problem.with_bandwidth(0, cloud, mbps * 1e6 / 8)
        ms = [1e3 * found.cost((0,) * cut + (cloud,) * (problem.layers - cut), "latency") for cut in cuts]
        axes.plot(cuts, ms, color=tint, linewidth=2)
        best = int(np.argmin(ms))
        axes.plot(cuts[best], ms[best], "o", color=tint, markersize=7)
        marks.append(Mark(cuts[-1], ms[-1], f"{mbps:g} Mbps", tint))
        lines.append(np.column_stack([cuts, ms]))
    axes.axhline(alone, **BASELINE_LINE)
    axes.annotate(
        "all on the source", (cuts[0], alone), xytext=(2, 4), textcoords="offset points", fontsize=9
    )
    axes.set_xlabel("Parts on the source")
    axes.set_ylabel("ms per token")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.1)
    style_axes(axes, "Without limits of memory the best cut is at an end")
    label_marks(axes, marks, lines)
    return stamp(figure)


def gantt(tasks: pd.DataFrame, title: str = "Who works when") -> Chart:
    """Stages and links over time, a colour for each request. tasks: as `simulate` gives them, in seconds."""
    if tasks.empty:
        raise NothingToDraw("nothing was simulated: ask for at least one request and one token")
    names = list(dict.fromkeys(tasks.sort_values("place")["name"]))
    figure = new_chart(9, 1.4 + 0.45 * len(names))
    axes = figure.subplots()
    for request, own in tasks.groupby("request"):
        rows = [names.index(name) for name in own["name"]]
        width = 1e3 * (own["end"] - own["start"])
        colour = METHOD_COLOURS[int(request) % len(METHOD_COLOURS)]
        axes.barh(rows, width, left=1e3 * own["start"], height=0.7, color=colour, edgecolor="white", linewidth=0.6,
                  zorder=2, label=f"request {int(request) + 1}")  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    handles = axes.get_legend_handles_labels()[0] if tasks["request"].nunique() > 1 else ()
    style_axes(axes, title, handles)
    return stamp(figure)


def over_bandwidth(lines: Mapping[str, Sequence[float]], rates_mbps: Sequence[float]) -> Chart:
    """Latency in ms of planners over the rate of the link between source and cloud. lines: by planner, NaN for none."""
    figure = new_chart(8.5, 4.2)
    axes = figure.subplots()
    marks, drawn = [], []
    for tint, (planner, ms) in zip(METHOD_COLOURS, lines.items(), strict=False):
        values = np.asarray(ms, dtype=float)
        if not np.isfinite(values).any():
            continue
        axes.plot(rates_mbps, values, "o-", color=tint, linewidth=2, markersize=4)
        last = int(np.flatnonzero(np.isfinite(values))[-1])
        marks.append(Mark(rates_mbps[last], values[last], PLANNER_NAMES.get(planner, planner), tint))
        drawn.append(np.column_stack([rates_mbps, values]))
    if not marks:
        raise NothingToDraw("no planner finds a plan that fits")
    axes.set_xscale("log")
    axes.set_xticks(rates_mbps, [f"{rate:g}" for rate in rates_mbps])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(x=0.12)
    axes.set_xlabel("Link between source and cloud (Mbps)")
    axes.set_ylabel("ms per token")
    style_axes(axes, "What a faster link is worth")
    label_marks(axes, marks, drawn)
    return stamp(figure)


def predicted_executed(rows: pd.DataFrame) -> Chart:
    """Milliseconds per token, predicted and executed, beside each other. rows: name, predicted_ms, executed_ms."""
    if rows.empty:
        raise NothingToDraw("no run to compare; run a partition first")
    places = np.arange(len(rows))
    figure = new_chart(8, 3.6)
    axes = figure.subplots()
    for shift, column, colour in ((-0.2, "predicted_ms", "#b0b0b0"), (0.2, "executed_ms", "#56B4E9")):
        axes.bar(places + shift, rows[column], width=0.38, color=colour, zorder=2,
                 label=column.removesuffix("_ms"))  # fmt: skip
    for place, row in zip(places, rows.itertuples(), strict=True):
        off = 100 * (row.executed_ms / row.predicted_ms - 1)
        axes.annotate(f"{off:+.0f} %", (place + 0.2, row.executed_ms), xytext=(0, 3), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
    axes.set_xticks(places, rows["name"])
    axes.set_ylabel("ms per token")
    style_axes(
        axes,
        "Predicted from the parts, executed through workers and links",
        axes.get_legend_handles_labels()[0],
    )
    return stamp(figure)


def published_cells(cells: pd.DataFrame) -> Chart:
    """EdgeShard's table beside what its planners give here. cells: as `published.compared` gives them."""
    shown = cells[cells["published_ms"].notna() & cells["planned_ms"].notna()]
    if shown.empty:
        raise NothingToDraw("no cell of the table has both numbers")
    figure = new_chart(8, 4.2)
    axes = figure.subplots()
    reach = (
        0.8 * shown[["published_ms", "planned_ms"]].min().min(),
        1.3 * shown[["published_ms", "planned_ms"]].max().max(),
    )
    axes.plot(reach, reach, **BASELINE_LINE)
    marks = []
    for tint, (model, own) in zip(METHOD_COLOURS, shown.groupby("model"), strict=False):
        axes.plot(own["published_ms"], own["planned_ms"], "o", color=tint, markersize=8)
        marks += [
            Mark(
                row.published_ms,
                row.planned_ms,
                f"{model.removeprefix('Llama-2-')} {PLANNER_NAMES[row.planner]}",
                tint,
            )
            for row in own.itertuples()
        ]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Published (ms per token)")
    axes.set_ylabel("Planned here (ms per token)")
    style_axes(axes, "One efficiency, fitted on one cell; on the line, both agree")
    label_marks(axes, marks)
    return stamp(figure)
