"""Engines beside each other: quality, bytes and decoding rate of recipes on runtimes in one picture."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
from edgelab.rows import find_metric

RUNTIME_COLOURS = {
    "torch": "#000000",
    "compiled": "#6b6b6b",
    "onnxruntime": "#0072B2",
    "openvino": "#D55E00",
    "llamacpp": "#009E73",
    "litert": "#E69F00",
    "executorch": "#CC79A7",
}
AREA = 1.1  # points² of a marker for each MB


def engines(rows: Rows, y: str = "ppl") -> Figure:
    """Quality over decoding rate ÷ baseline's; colour says the runtime, the area of a point its bytes of weights.

    The baseline is the row that others were timed in turns with: it stands at 1. A hollow point has failed the
    parity gate. Raises NothingToDraw where no row has the quality, the rate and the bytes.
    """
    frame = as_frame(rows)
    frame.loc[frame["recipe"] == "none", "decode_ratio"] = 1.0
    drawn, notes = drawable(
        frame, ["decode_ratio", y, "weights_mb"], "quality and speed of recipes on runtimes"
    )
    figure = new_chart(9.5, 5.4)
    axes = figure.subplots()
    scale_axis(axes, "y", drawn[y])
    axes.axvline(1, **BASELINE_LINE)
    marks = []
    for _, row in drawn.iterrows():
        tint = RUNTIME_COLOURS.get(row["runtime"], GREY)
        axes.scatter(
            row["decode_ratio"],
            row[y],
            s=AREA * row["weights_mb"],
            facecolor="none" if row["hollow"] else tint,
            edgecolor=tint if row["hollow"] else "white",
            alpha=0.75,
            zorder=4,
        )
        name = f"{label(row['recipe']).partition(' @ ')[0]}, {row['weights_mb']:.0f} MB"
        marks.append(Mark(row["decode_ratio"], row[y], name, tint))
    names = [name for name in RUNTIME_COLOURS if name in set(drawn["runtime"])]
    handles = [
        Line2D([], [], linestyle="", marker="o", color=RUNTIME_COLOURS[name], label=name) for name in names
    ]
    axes.margins(0.12)
    metric = find_metric(y)
    axes.set_xlabel("Decoding rate ÷ PyTorch eager float32, in turns with it; higher is better", fontsize=9.5)
    axes.set_ylabel(f"{metric.with_unit}, {metric.direction}", fontsize=9.5)
    style_axes(axes, "Recipes on runtimes: area is bytes of weights", handles)
    stamp(figure, frame, [*notes, *cautions(drawn, [y, "decode_ratio"])])
    label_marks(axes, marks)
    return figure
