"""Single weights that go: which of them, what that costs by sparsity, and what the zeros buy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.methods import METHOD_COLOURS
from edgelab.plots.style import (
    BASELINE_LINE,
    FAMILY_COLOURS,
    PALE,
    NothingToDraw,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)

CEILING = 20  # times the baseline; a perplexity above says no more than that the model is broken


def kept_weights(
    weight: np.ndarray,
    norm: np.ndarray,
    one: np.ndarray,
    other: np.ndarray,
    names: tuple[str, str] = ("magnitude", "Wanda"),
) -> Figure:
    """Weights of a row over the size of their inputs, by which of two masks keeps them.

    weight, norm: (in_features,), a weight and the norm of its input. one, other: (in_features,) bool, True where a
    weight stays; `names` says whose masks they are. Weights or norms of zero have no place on a logarithmic axis, and
    are counted in a note.
    """
    shown = (weight != 0) & (norm > 0)
    parts = {
        "both keep it": (one & other, FAMILY_COLOURS["baseline"], "o"),
        f"only {names[1]} keeps it": (~one & other, FAMILY_COLOURS["quantize"], "^"),
        f"only {names[0]} keeps it": (one & ~other, FAMILY_COLOURS["prune"], "v"),
        "both remove it": (~one & ~other, PALE, "."),
    }
    figure = new_chart(8.0, 4.8)
    axes = figure.subplots()
    legend = []
    for name, (those, tint, marker) in parts.items():
        look = {"marker": marker, "color": tint}
        axes.scatter(norm[those & shown], np.abs(weight[those & shown]), s=22, linewidth=0, alpha=0.8, **look)
        legend.append(Line2D([], [], linestyle="", markersize=5, label=f"{name}: {those.sum()}", **look))
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("Root mean square of the input over tokens", fontsize=9.5)
    axes.set_ylabel("Magnitude of the weight", fontsize=9.5)
    style_axes(axes, f"Where {names[0]} and {names[1]} disagree", legend, columns=4)
    left_out = int((~shown).sum())
    return stamp(figure, notes=[f"Not drawn, because zero: {left_out}."] if left_out else [])


def sparsity_lines(points: pd.DataFrame, baseline: float) -> Figure:
    """Perplexity over sparsity, a line for each method, all of which begin at the baseline.

    points: method, sparsity (0 to 1), ppl, fast, as `rows.by_sparsity` gives them. baseline: perplexity of the
    reference. What is above CEILING times the baseline is named in a note. Raises NothingToDraw without points.
    """
    points = points[np.isfinite(points["ppl"].astype(float))]
    if points.empty:
        raise NothingToDraw(
            "no row of a pruning method with a sparsity has a perplexity: measure prune.wanda first"
        )
    shown = points[points["ppl"] <= CEILING * baseline]
    figure = new_chart(8.0, 4.8)
    axes = figure.subplots()
    scale_axis(axes, "y", pd.Series([*shown["ppl"], baseline]))
    axes.margins(0.08)
    marks, lines = [Mark(0, baseline, "baseline", "black")], []
    for place, (method, line) in enumerate(shown.groupby("method", sort=False)):
        tint = METHOD_COLOURS[place % len(METHOD_COLOURS)]
        course = np.array([(0, baseline), *sorted(zip(100 * line["sparsity"], line["ppl"], strict=True))])
        axes.plot(*course.T, color=tint, linewidth=1.4, marker="o", markersize=5)
        lines.append(course)
        marks.append(Mark(*course[-1], method.rpartition(".")[2], tint))
    axes.axhline(baseline, **BASELINE_LINE)
    axes.set_xlabel("Weights removed from each layer (%)", fontsize=9.5)
    axes.set_ylabel("Perplexity, lower is better", fontsize=9.5)
    style_axes(axes, "Perplexity over sparsity, by method")
    above = [
        f"{row.method.rpartition('.')[2]} at {100 * row.sparsity:g} %: {row.ppl:,.0f}"
        for row in points.drop(shown.index).sort_values(["method", "sparsity"]).itertuples()
    ]
    stamp(figure, points, [f"Above {CEILING} times the baseline: {', '.join(above)}."] if above else [])
    label_marks(axes, marks, lines)
    return figure


def break_even(values: pd.DataFrame) -> float:
    """The sparsity from which the second column is below the first up to the end; NaN where it is not.

    values: by sparsity, ascending. Between two sparsities both columns are taken to be straight.
    """
    gap = (values.iloc[:, 1] - values.iloc[:, 0]).to_numpy(float)
    if gap[-1] >= 0:
        return math.nan
    above = np.flatnonzero(gap >= 0)
    if not len(above):
        return float(values.index[0])
    last = above[-1]
    return float(np.interp(0, [gap[last + 1], gap[last]], [values.index[last + 1], values.index[last]]))


def what_zeros_buy(bits: pd.DataFrame, times: Mapping[str, pd.DataFrame]) -> Figure:
    """Left what a weight takes in each storage, then a panel of milliseconds for each of `times`, all over sparsity.

    bits: bits per weight, a column for each storage, by sparsity (0 to 1). times: by what is multiplied, two columns
    of milliseconds each, the dense product and the sparse one, by sparsity. The titles say where sparse wins.
    """
    figure = new_chart(4.6 + 3.6 * len(times), 4.2)
    panels = figure.subplots(1, 1 + len(times), squeeze=False, width_ratios=[1.3, *[1] * len(times)])[0]
    _over_sparsity(panels[0], bits, "Bits of a weight", "What a weight takes")
    for axes, (name, ms) in zip(panels[1:], times.items(), strict=True):
        found = break_even(ms)
        wins = (
            f"from {100 * found:.0f} % zeros"
            if math.isfinite(found)
            else f"not up to {100 * ms.index[-1]:.0f} %"
        )
        _over_sparsity(axes, ms, "Milliseconds", f"{name}:\nfaster {wins}")
    return stamp(figure)


def _over_sparsity(axes: Axes, values: pd.DataFrame, unit: str, title: str) -> None:
    """A line for each column, named in the legend."""
    legend = []
    for place, (name, column) in enumerate(values.items()):
        look = {"color": METHOD_COLOURS[place % len(METHOD_COLOURS)], "linewidth": 1.6}
        axes.plot(100 * values.index, column, **look)
        legend.append(Line2D([], [], label=name, **look))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Zeros (%)", fontsize=9.5)
    axes.set_ylabel(f"{unit}, lower is better", fontsize=9.5)
    style_axes(axes, title, legend, columns=2)
