"""Which layer got how much, how sensitive each is, what predicts that, and whether the predicted loss came true."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import (
    BASELINE_LINE,
    FAMILY_COLOURS,
    GREY,
    PALE,
    NothingToDraw,
    Rows,
    as_frame,
    label,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)
from edgelab.rows import PROTOCOL, newest

# Dark for few bits; even steps for readers with any kind of colour blindness
BIT_COLOURS = colormaps["viridis"]
FEWEST, MOST = 2, 8
WHITE_BELOW = 6  # bits whose colour is dark enough for white digits
SMALLEST = 1e-6  # nats per token; less is drawn as this


def bit_allocation(layers: pd.DataFrame, title: str = "Bits of each layer") -> Figure:
    """Bits of every layer, blocks along x and one row per kind of layer; under it the sensitivity of the same layers.

    layers: a row per layer with block (0, 1, ...), kind (q_proj, ...), bits, and sensitivity: nats per token where
    that layer alone has 4 bits. Raises NothingToDraw without layers.
    """
    if layers.empty:
        raise NothingToDraw("the table has no layers: compute sensitivities first, with quantize.mixed")
    present = sorted(set(layers["bits"]))
    legend = [Patch(facecolor=_shade(width), label=f"{width} bits") for width in present]
    below = "Sensitivity: predicted KL divergence when only this layer is at 4 bits"
    return _two_maps(layers, "bits", (FEWEST, MOST, WHITE_BELOW), title, below, legend)


def sparsity_allocation(layers: pd.DataFrame, title: str = "Sparsity of each layer (%)") -> Figure:
    """Sparsity of every layer in percent, as `bit_allocation` draws bits; under it the sensitivity of the layers.

    layers: a row per layer with block, kind, sparsity from 0 to 1, and sensitivity: nats per token where half of that
    layer alone is removed. Raises NothingToDraw without layers.
    """
    if layers.empty:
        raise NothingToDraw("the table has no layers: compute sensitivities first, with prune.wanda")
    below = "Sensitivity: predicted KL divergence when half of this layer alone is removed"
    percent = layers.assign(percent=100 * layers["sparsity"])
    return _two_maps(percent, "percent", (0, 100, 70), title, below)


def _two_maps(
    layers: pd.DataFrame,
    column: str,
    shades: tuple[float, float, float],
    title: str,
    below: str,
    legend: Sequence[Patch] = (),
) -> Figure:
    """A column of `layers` as numbers on colours, over a map of their sensitivity.

    shades: the values of the darkest and the brightest colour, and below which digits are white.
    """
    kinds = list(dict.fromkeys(layers["kind"]))
    values, sensitivity = (
        layers.pivot(index="kind", columns="block", values=each).loc[kinds]
        for each in (column, "sensitivity")
    )
    figure = new_chart(max(6.5, 2.2 + 0.29 * values.shape[1]), 1.9 + 0.5 * len(kinds))
    upper, lower = figure.subplots(2, 1, sharex=True)
    low, high, dark = shades
    lines = {"edgecolor": "white", "linewidth": 0.6}
    upper.pcolormesh(*_edges(values), values, cmap=BIT_COLOURS, vmin=low, vmax=high, **lines)
    for (row, place), value in np.ndenumerate(values.to_numpy(float)):
        if np.isfinite(value):
            ink = "white" if value < dark else "black"
            look = {"ha": "center", "va": "center", "fontsize": 7}
            upper.text(values.columns[place], row, f"{value:.0f}", color=ink, **look)
    drawn = sensitivity.clip(lower=SMALLEST)
    norm = LogNorm(drawn.min().min(), max(drawn.max().max(), 1.01 * drawn.min().min()))
    colours = lower.pcolormesh(*_edges(values), drawn, cmap="Oranges", norm=norm, **lines)
    bar = figure.colorbar(colours, ax=lower, pad=0.01, aspect=12)
    bar.set_label("nats per token", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    style_axes(upper, title, legend)
    style_axes(lower)
    lower.set_title(below, loc="left", fontsize=9)
    lower.set_xlabel("Block", fontsize=9.5)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        _name_rows(axes, kinds)
    return figure


def _shade(bits: float) -> tuple[float, ...]:
    return BIT_COLOURS((bits - FEWEST) / (MOST - FEWEST))


def _edges(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return np.append(table.columns, table.columns[-1] + 1) - 0.5, np.arange(len(table) + 1) - 0.5


def _name_rows(axes: Axes, kinds: list[str]) -> None:
    axes.set_yticks(range(len(kinds)), kinds, parse_math=False)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(visible=False)


def predictions(rows: Rows) -> pd.DataFrame:
    """Rows with a predicted KL divergence that measured it as well: name, predicted, measured, fast.

    Of rows of one recipe, model and protocol the newest counts. Raises NothingToDraw where there is none.
    """
    frame = as_frame(rows).rename(columns={"predicted_kld": "predicted", "kld_mean": "measured"})
    frame = frame[(frame["status"] == "ok") & np.isfinite(frame[["predicted", "measured"]]).all(axis=1)]
    frame = newest(frame, ["recipe", *PROTOCOL])
    if frame.empty:
        raise NothingToDraw(
            "no row has a predicted and a measured KL divergence: measure the quality of a recipe such as "
            'quantize.mixed:bits=4, with el.compare(["none", "quantize.mixed:bits=4"])'
        )
    frame = frame.assign(name=frame["recipe"].map(label))
    return frame[["name", "predicted", "measured", "fast"]].reset_index(drop=True)


def largest_factor(points: pd.DataFrame) -> float:
    """By how much the worst prediction is off, as a factor of at least 1. Only points above zero count."""
    points = points[(points[["predicted", "measured"]] > 0).all(axis=1)]
    return math.exp(np.log(points["predicted"] / points["measured"]).abs().max()) if len(points) else math.nan


def predicted_measured(points: pd.DataFrame, title: str = "Predicted divergence against measured") -> Figure:
    """Predicted KL divergence along x, measured along y; on the dashed line the prediction came true.

    points: columns name, predicted and measured, in nats per token; a name may be empty. The grey band holds every
    point that is off by no more than the worst factor, which the title says. Points at or below zero are counted in
    a note. Raises NothingToDraw where no point is left.
    """
    positive = (points[["predicted", "measured"]] > 0).all(axis=1)
    shown = points[positive]
    if shown.empty:
        raise NothingToDraw("no point has a predicted and a measured divergence above zero")
    factor = largest_factor(shown)
    blue = FAMILY_COLOURS["quantize"]
    figure = new_chart(6.6, 5.4)
    axes = figure.subplots()
    both = shown[["predicted", "measured"]].stack()
    for side in "xy":
        scale_axis(axes, side, both)
    span = np.array([both.min() / 1.4, both.max() * 1.4])
    axes.fill_between(span, span / factor, span * factor, color=PALE, alpha=0.25, linewidth=0, zorder=0)
    axes.plot(span, span, **BASELINE_LINE)
    many = len(shown) > 40
    axes.scatter(
        shown["predicted"], shown["measured"], s=14 if many else 42, color=blue, edgecolor="white", linewidth=0.5,
        alpha=0.7 if many else 1, zorder=3,
    )  # fmt: skip
    axes.set(xlim=span, ylim=span)
    axes.set_xlabel("Predicted: sum over layers rounded alone (nats per token)", fontsize=9.5)
    axes.set_ylabel("Measured: KL divergence of the whole model (nats per token)", fontsize=9.5)
    legend = [
        Line2D([], [], label="as predicted", **BASELINE_LINE),
        Patch(facecolor=PALE, alpha=0.25, label="off by the worst factor at most"),
    ]
    style_axes(axes, f"{title}: within a factor of {factor:.2f}", legend)
    left_out = int((~positive).sum())
    notes = [f"Not drawn, because not above zero: {left_out}."] if left_out else []
    stamp(figure, points.reindex(columns=["fast"]).eq(True), notes)
    names = shown["name"] if "name" in shown else pd.Series("", shown.index)
    label_marks(
        axes,
        [
            Mark(x, y, name, blue)
            for x, y, name in zip(shown["predicted"], shown["measured"], names, strict=True)
            if name
        ],
        [np.column_stack([span, span])],
    )
    return figure


PREDICTORS = {
    "fisher": "gradients of outputs (Fisher)",
    "gradient": "|weight x gradient| of what goes",
    "activation": "(|weight| x input norm)² of what goes",
    "magnitude": "weight² of what goes",
}


def rank_correlations(layers: pd.DataFrame) -> pd.Series:
    """Spearman's correlation of each predictor with the measured divergence, the best first.

    layers: columns kl and those of `PREDICTORS`, a row per layer, at one sparsity.
    """
    there = [name for name in PREDICTORS if name in layers]
    return layers[there].corrwith(layers["kl"], method="spearman").sort_values(ascending=False)


def predictors_measured(layers: pd.DataFrame, sparsity: float, title: str = "") -> Figure:
    """What cheap predictors say of each layer along x, and the divergence measured along y; a panel for each.

    layers: as `edgelab.techniques.pruning.measured.sensitivity` gives them. sparsity: of those in it. The best order of
    layers comes first, and is coloured; a label says Spearman's correlation. Raises NothingToDraw where no layer has
    that sparsity.
    """
    at = layers[np.isclose(layers["sparsity"], sparsity)]
    if at.empty:
        there = ", ".join(f"{each:g}" for each in sorted(set(layers["sparsity"])))
        raise NothingToDraw(f"no layer was measured at sparsity {sparsity:g}, only at {there or 'none'}")
    found = rank_correlations(at)
    figure = new_chart(2.75 * len(found), 3.6)
    for place, (axes, (name, value)) in enumerate(
        zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True)
    ):
        shown = at[(at[[name, "kl"]] > 0).all(axis=1)]
        tint = FAMILY_COLOURS["prune"] if place == 0 else GREY
        axes.scatter(shown[name], shown["kl"], s=14, color=tint, edgecolor="white", linewidth=0.3, alpha=0.75)
        axes.set(xscale="log", yscale="log")
        style_axes(axes)
        axes.set_title(f"{name}: Spearman {value:.2f}", loc="left", fontsize=9.5, color=tint)
        axes.set_xlabel(PREDICTORS[name], fontsize=8)
    figure.axes[0].set_ylabel(
        f"KL divergence when {100 * sparsity:g} % of\nthis layer alone are removed (nats)", fontsize=8.5
    )
    title = title or f"{found.index[0].capitalize()} orders layers most as the measurement does"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure
