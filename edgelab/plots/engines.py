"""Engines beside each other: quality, bytes and decoding rate of recipes on runtimes in one picture."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from edgelab.plots.choosing import within_sense
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import (
    BASELINE_LINE,
    GREY,
    Rows,
    as_frame,
    cautions,
    drawable,
    label,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)
from edgelab.rows import BASELINE, find_metric, pareto_front

RUNTIME_COLOURS = {
    "torch": "#000000",
    "compiled": "#6b6b6b",
    "onnxruntime": "#0072B2",
    "openvino": "#D55E00",
    "llamacpp": "#009E73",
    "litert": "#E69F00",
    "executorch": "#CC79A7",
}


def engines(rows: Rows, y: str = "ppl") -> Figure:
    """Quality over decoding rate ÷ baseline's, both logarithmic where they span much; colour says the runtime.

    The baseline is the row that others were timed in turns with: it stands at 1. A hollow point has failed the
    parity gate. Named are the fastest recipe of each runtime and those that no other beats in rate and quality, with
    their bytes. Raises NothingToDraw where no row has the quality, the rate and the bytes.
    """
    frame = as_frame(rows)
    frame.loc[frame["recipe"] == BASELINE, "decode_ratio"] = 1.0
    drawn, notes = drawable(
        frame, ["decode_ratio", y, "weights_mb"], "quality and speed of recipes on runtimes"
    )
    drawn, left_out = within_sense(drawn.assign(ring=False), "decode_ratio", y)
    passed = drawn[~drawn["hollow"]]
    fastest = passed.loc[passed.groupby("runtime")["decode_ratio"].idxmax()].index
    of_note = {*fastest, *pareto_front(passed, "decode_ratio", y).index}
    figure = new_chart(9.5, 5.4)
    axes = figure.subplots()
    axes.set_xscale("log")
    scale_axis(axes, "x", drawn["decode_ratio"])
    scale_axis(axes, "y", drawn[y])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, **BASELINE_LINE)
    marks = []
    for index, row in drawn.iterrows():
        tint = RUNTIME_COLOURS.get(row["runtime"], GREY)
        look = {
            "facecolor": "none" if row["hollow"] else tint,
            "edgecolor": tint if row["hollow"] else "white",
        }
        axes.scatter(row["decode_ratio"], row[y], s=46, alpha=0.85, zorder=4, **look)
        if index in of_note:
            weights = row["recipe"].partition(" @ ")[0]  # `native.int4` keeps its family: not our 4 bits
            name = weights if weights.startswith("native.") else label(weights)
            text = f"{name}, {row['weights_mb']:.0f} MB"
            marks.append(Mark(row["decode_ratio"], row[y], text, tint, rank=(-row["decode_ratio"],)))
    names = [name for name in RUNTIME_COLOURS if name in set(drawn["runtime"])]
    handles = [
        Line2D([], [], linestyle="", marker="o", color=RUNTIME_COLOURS[name], label=name) for name in names
    ]
    axes.margins(0.12)
    metric = find_metric(y)
    axes.set_xlabel("Decoding rate ÷ PyTorch eager float32, in turns with it; higher is better", fontsize=9.5)
    axes.set_ylabel(f"{metric.with_unit}, {metric.direction}", fontsize=9.5)
    style_axes(axes, f"{metric.label} and decoding rate of recipes on runtimes", handles)
    stamp(figure, frame, [*left_out, *notes, *cautions(drawn, [y, "decode_ratio"])])
    ends = [drawn[y].min(), drawn[y].max()]
    label_marks(axes, marks, [np.column_stack([[1, 1], ends])])
    return figure
