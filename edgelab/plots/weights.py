"""Weights on their grids."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgelab.plots.style import FAMILY_COLOURS, PALE, new_chart, style_axes

WEIGHT = "#D55E00"  # a weight before rounding, beside the blue of its grid
NEAR_WEIGHTS = 48  # of a weight row, this many are shown from nearby


def weight_grid(weights: np.ndarray, rounded: np.ndarray, levels: np.ndarray, title: str = "") -> Figure:
    """A weight row on its grid: the levels of each group, where every weight was and where it went.

    weights, rounded: (in_features,). levels: (groups, 2**bits), what the integers of each group stand for.
    The lower panel shows the neighbourhood of the largest error, with a line from each weight to its level.
    """
    blue = FAMILY_COLOURS["quantize"]
    inputs = np.arange(len(weights))
    worst = int(np.abs(rounded - weights).argmax())
    first = max(0, min(worst - NEAR_WEIGHTS // 2, len(weights) - NEAR_WEIGHTS))
    near = inputs[first : first + NEAR_WEIGHTS]
    borders = np.linspace(0, len(weights), len(levels) + 1) - 0.5  # (groups + 1,)
    crowded = min(1, 16 / levels.shape[1]) ** 0.5  # thinner lines stay a grid instead of a wall

    figure = new_chart(8.5, 5.4)
    whole, detail = figure.subplots(2, 1, height_ratios=[1, 1.25])
    whole.axvspan(near[0] - 1, near[-1] + 1, color="#eeeeee", zorder=0)
    for axes, shown, size, width in ((whole, inputs, 4, 0.5), (detail, near, 26, 0.9)):
        starts, ends = (edge.repeat(levels.shape[1]) for edge in (borders[:-1], borders[1:]))
        axes.hlines(levels.ravel(), starts, ends, color=blue, alpha=0.5, linewidth=width * crowded, zorder=1)
        axes.vlines(borders[1:-1], 0, 1, transform=axes.get_xaxis_transform(), color=PALE, linewidth=0.8)
        axes.vlines(shown, weights[shown], rounded[shown], color=WEIGHT, linewidth=1.3 * width, zorder=2)
        axes.scatter(shown, rounded[shown], s=size, marker="s", color=blue, linewidth=0, zorder=3)
        axes.scatter(shown, weights[shown], s=0.6 * size, color=WEIGHT, linewidth=0, zorder=3)
        axes.set_xlim(shown[0] - 1, shown[-1] + 1)
        axes.set_ylabel("Weight", fontsize=9.5)
    middle = (weights[worst] + rounded[worst]) / 2
    detail.scatter(worst, middle, s=220, facecolor="none", edgecolor="black", linewidth=1.3, zorder=4)
    ends = np.concatenate([weights[near], rounded[near]])
    margin = 0.14 * (np.ptp(ends) or 1)
    detail.set_ylim(ends.min() - margin, ends.max() + margin)
    legend = [
        Line2D([], [], linestyle="", marker="o", color=WEIGHT, markersize=4, label="weight"),
        Line2D([], [], linestyle="", marker="s", color=blue, markersize=5, label="rounded"),
        Line2D([], [], color=blue, linewidth=0.8, label="levels of the grid"),
        Line2D([], [], color=PALE, linewidth=0.8, label="border of a group"),
    ]
    style_axes(whole, title, legend[: 4 if len(levels) > 1 else 3])
    style_axes(detail)
    detail.set_title(
        "The shaded part from nearby; the ring is around the largest error", loc="left", fontsize=9
    )
    detail.set_xlabel("Input of the row", fontsize=9.5)
    for axes in (whole, detail):
        axes.grid(visible=False)
    return figure
