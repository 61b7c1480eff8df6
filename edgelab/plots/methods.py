"""Methods of quantization beside each other: perplexity over bits, a line for each method and group size."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import BASELINE_LINE, NothingToDraw, new_chart, scale_axis, stamp, style_axes

METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b")
GROUP_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def method_lines(points: pd.DataFrame, baseline: float | None = None, highlight: str | None = None) -> Figure:
    """Perplexity over bits; colour says the method, the dash of a line the group size.

    points: recipe, method, bits, group_size (0 for a whole row), ppl, fast. baseline: perplexity of the reference.
    highlight: a recipe that gets a ring. Raises NothingToDraw without points.
    """
    if points.empty:
        raise NothingToDraw("no row of a method with bits and group_size has a perplexity: measure one first")
    methods = list(dict.fromkeys(points["method"]))
    sizes = sorted(set(points["group_size"]), key=lambda size: (size == 0, size))
    figure = new_chart(8.5, 5.0)
    axes = figure.subplots()
    scale_axis(axes, "y", points["ppl"] if baseline is None else pd.Series([*points["ppl"], baseline]))
    axes.margins(0.1)
    marks, lines = [], []
    for (method, size), line in points.groupby(["method", "group_size"], sort=False):
        tint = METHOD_COLOURS[methods.index(method) % len(METHOD_COLOURS)]
        dash = GROUP_LINES[sizes.index(size) % len(GROUP_LINES)]
        line = line.sort_values("bits")
        axes.plot(
            line["bits"], line["ppl"], color=tint, linestyle=dash, linewidth=1.4, marker="o", markersize=5
        )
        lines.append(line[["bits", "ppl"]].to_numpy())
        name = f"{method.rpartition('.')[2]}, {f'g{size}' if size else 'per row'}"
        first = line.iloc[0]
        marks.append(Mark(first["bits"], first["ppl"], name, tint))
    ring = points[points["recipe"] == highlight]
    axes.scatter(
        ring["bits"], ring["ppl"], s=190, facecolor="none", edgecolor="black", linewidth=1.5, zorder=5
    )
    if baseline is not None:
        axes.axhline(baseline, **BASELINE_LINE)
        marks.append(Mark(points["bits"].max(), baseline, "baseline", "black"))
    axes.set_xticks(range(int(points["bits"].min()), math.ceil(points["bits"].max()) + 1))
    axes.set_xlabel("Bits of a weight, without its scales", fontsize=9.5)
    axes.set_ylabel("Perplexity, lower is better", fontsize=9.5)
    style_axes(axes, "Perplexity over bits, by method and group size")
    stamp(figure, points)
    label_marks(axes, marks, lines)
    return figure
