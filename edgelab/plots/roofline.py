"""Measured speed under the limits of a machine: decoding under its bandwidth, layers under its roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import (
    BASELINE_LINE,
    GREY,
    SAME_SPEED,
    NothingToDraw,
    Rows,
    as_frame,
    cautions,
    colour,
    draw_point,
    drawable,
    label,
    legend_handles,
    new_chart,
    stamp,
    style_axes,
)

LINE_COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")


def limit_tok_s(weights_mb: float, read_gb_s: float) -> float:
    """Tokens per second where every token reads all weights once: bandwidth over bytes."""
    return 1e3 * read_gb_s / weights_mb


def decode_limit(rows: Rows, read_gb_s: float) -> Figure:
    """Decoding rate of each row over the MB it reads for a token, under the line bandwidth / bytes.

    The bytes are those of the stored weights, scales included; each point says which share of the limit it reaches.
    Raises NothingToDraw where no row has a decoding rate, or the bandwidth is not positive.
    """
    frame = as_frame(rows)
    if not read_gb_s > 0:
        raise NothingToDraw(f"a bandwidth of {read_gb_s:g} GB/s limits nothing: measure it with read_gb_s()")
    drawn, notes = drawable(frame, ["weights_mb", "decode_tok_s"], "latency and size", SAME_SPEED)
    figure = new_chart(8.5, 5.0)
    axes = figure.subplots()
    megabytes = np.geomspace(drawn["weights_mb"].min() / 1.4, drawn["weights_mb"].max() * 1.4, 99)
    limit = np.column_stack([megabytes, limit_tok_s(megabytes, read_gb_s)])
    axes.plot(*limit.T, **BASELINE_LINE)
    marks = [Mark(*limit[49], f"{read_gb_s:.3g} GB/s ÷ bytes", "black")]
    for name, (_, row) in zip(_names(drawn), drawn.iterrows(), strict=True):
        draw_point(axes, row["weights_mb"], row["decode_tok_s"], row)
        share = row["decode_tok_s"] / limit_tok_s(row["weights_mb"], read_gb_s)
        text = f"{name}, {share:.0%}"
        marks.append(Mark(row["weights_mb"], row["decode_tok_s"], text, colour(row["family"])))
    _logarithmic(axes)
    axes.margins(0.06)
    axes.set_xlabel("Weights read for each token (MB of 10⁶ bytes), lower is better", fontsize=9.5)
    axes.set_ylabel("Decoding (tokens/s), higher is better", fontsize=9.5)
    style_axes(axes, "Decoding, and the limit that bandwidth sets", legend_handles(drawn))
    stamp(figure, frame, [*notes, *cautions(drawn, ["decode_tok_s"])])
    label_marks(axes, marks, [limit])
    return figure


def _names(drawn: pd.DataFrame) -> list[str]:
    """A label for each row; rows of one recipe on several runtimes need no more than the runtime."""
    names = [label(recipe) for recipe in drawn["recipe"]]
    weights = [name.partition(" @ ")[0] for name in names]
    repeated = {name for name in weights if weights.count(name) > 1}
    if len(repeated) != 1:
        return names
    zipped = zip(names, weights, drawn["runtime"], strict=True)
    return [runtime if of in repeated else name for name, of, runtime in zipped]


def roofline(points: pd.DataFrame, read_gb_s: float, gflop_s: Mapping[str, float]) -> Figure:
    """Arithmetic rate over arithmetic intensity: a line for each name, below bandwidth x intensity and the rates.

    points: name, tokens, flop_per_byte, gflop_s, as `layer_points` measures them. gflop_s: a roof for each dtype.
    Raises NothingToDraw without points.
    """
    if points.empty:
        raise NothingToDraw("there are no points: measure layers first, for instance with layer_points()")
    figure = new_chart(8.5, 5.0)
    axes = figure.subplots()
    ridge = max(gflop_s.values()) / read_gb_s
    left = min(points["flop_per_byte"].min(), ridge) / 1.6  # so that some of the bandwidth's line is seen
    right = points["flop_per_byte"].max() * 1.6
    intensity = np.geomspace(left, max(left, min(ridge, right)), 99)
    lines = [np.column_stack([intensity, read_gb_s * intensity])]
    axes.plot(*lines[0].T, **BASELINE_LINE)
    marks = [Mark(*lines[0][20], f"{read_gb_s:.3g} GB/s", "black")]
    for name, rate in gflop_s.items():
        start = max(left, rate / read_gb_s)
        if start < right:
            lines.append(np.array([[start, rate], [right, rate]]))
            axes.plot(*lines[-1].T, color=GREY, linewidth=0.9)
            marks.append(Mark(math.sqrt(start * right), rate, f"{name} {rate:,.0f}", GREY))
    for place, (name, line) in enumerate(points.groupby("name", sort=False)):
        tint = LINE_COLOURS[place % len(LINE_COLOURS)]
        line = line.sort_values("tokens")
        axes.plot(line["flop_per_byte"], line["gflop_s"], color=tint, marker="o", markersize=4.5)
        lines.append(line[["flop_per_byte", "gflop_s"]].to_numpy())
        for row in (line.iloc[0], line.iloc[-1]):
            text = f"{name}, {row['tokens']:.0f} token{'s' if row['tokens'] > 1 else ''}"
            marks.append(Mark(row["flop_per_byte"], row["gflop_s"], text, tint))
    _logarithmic(axes)
    axes.set_xlabel("Arithmetic intensity (operations per byte of weights)", fontsize=9.5)
    axes.set_ylabel("Rate (GFLOP/s), higher is better", fontsize=9.5)
    style_axes(axes, "Layers under the roofline")
    stamp(figure)
    label_marks(axes, marks, lines)
    return figure


def _logarithmic(axes: Axes) -> None:
    """Both axes logarithmic, with plain numbers."""
    for side in "xy":
        axes.set(**{f"{side}scale": "log"})
        axis = getattr(axes, f"{side}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
