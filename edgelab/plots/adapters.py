"""What low rank holds, of weights and of their change by training; and what adapters of each rank give."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.methods import METHOD_COLOURS
from edgelab.plots.style import (
    BASELINE_LINE,
    FAMILY_COLOURS,
    GREY,
    Chart,
    NothingToDraw,
    new_chart,
    stamp,
    style_axes,
)


def held_by_rank(singular_values: np.ndarray) -> np.ndarray:
    """The share of the sum of squares of a matrix that its best approximation of each rank holds, 0 to 1.

    singular_values: (..., ranks), largest first; the first share is that of rank 1. Eckart and Young 1936.
    """
    squares = np.square(np.asarray(singular_values, dtype=np.float64)).cumsum(-1)
    return squares / squares[..., -1:]


def rank_lines(spectra: Mapping[str, np.ndarray], marked: int = 8) -> Chart:
    """How much of matrices each rank holds: a line for the mean over layers, a band for the quarter on each side.

    spectra: by name, singular values (layers, ranks), largest first. marked: a rank that a line is drawn at. Raises
    NothingToDraw where there is no matrix.
    """
    if not spectra or not all(len(one) for one in spectra.values()):
        raise NothingToDraw("there are no singular values to draw: decompose some layers")
    figure = new_chart(8.5, 4.4)
    axes = figure.subplots()
    marks, lines, at = [], [], {}
    for tint, (name, values) in zip(METHOD_COLOURS, spectra.items(), strict=False):
        held = pd.DataFrame(100 * held_by_rank(values))
        ranks = np.arange(1, held.shape[1] + 1)
        low, middle, high = (held.quantile(share).to_numpy() for share in (0.25, 0.5, 0.75))
        axes.fill_between(ranks, low, high, color=tint, alpha=0.18, linewidth=0)
        axes.plot(ranks, middle, color=tint, linewidth=2)
        place = len(ranks) // 6
        marks.append(Mark(ranks[place], middle[place], name, tint))
        lines.append(np.column_stack([ranks, middle]))
        at[name] = middle[min(marked, len(ranks)) - 1]
    axes.axvline(marked, color=GREY, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 102)
    axes.set_xlabel("Rank")
    axes.set_ylabel("Share of the sum of squares held (%)")
    title = f"Rank {marked} holds " + ", ".join(f"{share:.0f} % of {name}" for name, share in at.items())
    style_axes(axes, title)
    label_marks(axes, marks, lines)
    return stamp(figure)


def rank_sweep(points: pd.DataFrame, levels: Mapping[str, float]) -> Chart:
    """Perplexity over the rank of an adapter, with its megabytes at each point.

    points: columns rank, ppl, adapter_mb. levels: perplexities to draw as lines, by name, such as that of the model
    without an adapter and of one whose weights were all trained. Raises NothingToDraw where there is no point.
    """
    if points.empty:
        raise NothingToDraw("no adapter has been measured at any rank: measure lora:rank=8")
    points = points.sort_values("rank")
    figure = new_chart(8.5, 4.4)
    axes = figure.subplots()
    axes.plot(points["rank"], points["ppl"], "o-", color=FAMILY_COLOURS["lora"], linewidth=2, markersize=7)
    for _, row in points.iterrows():
        axes.annotate(
            f"{row['adapter_mb']:.1f} MB", (row["rank"], row["ppl"]), (0, 10), textcoords="offset points",
            ha="center", fontsize=8.5,
        )  # fmt: skip
    for name, level in levels.items():
        axes.axhline(level, **BASELINE_LINE)
        axes.text(
            1, level, f" {name}: {level:.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8.5
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.margins(y=0.18)
    axes.set_xlabel("Rank of the adapter, with its bytes")
    axes.set_ylabel("Perplexity, lower is better")
    best = points.loc[points["ppl"].idxmin()]
    style_axes(axes, f"Rank {best['rank']:.0f} is best here, in {best['adapter_mb']:.1f} MB")
    return stamp(figure)


def rate_lines(points: pd.DataFrame, baseline: float) -> Chart:
    """Perplexity over the learning rate, a line for each way to train.

    points: columns way, learning_rate, ppl. baseline: before training. Raises NothingToDraw where there is no point.
    """
    if points.empty:
        raise NothingToDraw("no run has been measured at any learning rate")
    figure = new_chart(8.5, 4.2)
    axes = figure.subplots()
    marks, lines, best = [], [], {}
    for tint, (way, of_way) in zip(METHOD_COLOURS, points.groupby("way", sort=False), strict=False):
        of_way = of_way.sort_values("learning_rate")
        axes.plot(of_way["learning_rate"], of_way["ppl"], "o-", color=tint, linewidth=2)
        lowest = of_way.loc[of_way["ppl"].idxmin()]
        axes.plot(lowest["learning_rate"], lowest["ppl"], "o", color=tint, markersize=11)
        best[way] = lowest["learning_rate"]
        marks.append(Mark(lowest["learning_rate"], lowest["ppl"], way, tint))
        lines.append(of_way[["learning_rate", "ppl"]].to_numpy())
    axes.axhline(baseline, **BASELINE_LINE)
    axes.text(
        0.01, baseline, "before training", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8.5
    )
    axes.set_xscale("log")
    axes.margins(0.12)
    axes.set_xlabel("Learning rate")
    axes.set_ylabel("Perplexity, lower is better")
    style_axes(axes, "Best learning rate: " + ", ".join(f"{rate:g} for {way}" for way, rate in best.items()))
    label_marks(axes, marks, lines)
    return stamp(figure)
