"""What the roofline predicts: beside published rates, for one model on many devices, and inside one decode step."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.roofline import roofline
from edgelab.plots.style import (
    BASELINE_LINE,
    GREY,
    NothingToDraw,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)

CLASS_COLOURS = {"CPU": "#0072B2", "phone": "#D55E00", "GPU": "#009E73"}
READING_TOK_S = 5  # about 230 words a minute
BAND = 0.35  # relative error that the project allows itself
PRECISION_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
LABELS_MAX = 12
BOUND_COLOURS = {"memory": "#0072B2", "compute": "#E69F00", "overhead": GREY}


def seconds(value_s: float) -> str:
    """The value with two digits, from 10 s on in whole seconds: 0.21 s, 3.4 s, 42 s, 1,112 s."""
    return f"{value_s:,.0f} s" if value_s >= 10 else f"{value_s:.2g} s"


def published_rates(check: pd.DataFrame, named: Collection[str] = ()) -> Figure:
    """Predicted over measured decoding rate of every row of `published_check`, with a band of 35 % around equality.

    Labels name the points outside the band and those of the devices in `named`; of more than a dozen, the worst.
    Raises NothingToDraw without rows.
    """
    if check.empty:
        raise NothingToDraw("there are no published rates: pass the table of published_check()")
    figure = new_chart(8.5, 7.5)
    axes = figure.subplots()
    ends = np.array(
        [
            check[["measured", "predicted"]].min().min() / 1.5,
            check[["measured", "predicted"]].max().max() * 1.5,
        ]
    )
    axes.fill_between(ends, ends * (1 - BAND), ends * (1 + BAND), color="#eeeeee", linewidth=0, zorder=0)
    axes.plot(ends, ends, **BASELINE_LINE)
    marks = []
    outside = check["error"].abs() > BAND
    errors = check.loc[outside | check["device"].isin(named), "error"].abs()
    labelled = set(errors.nlargest(LABELS_MAX).index)
    for index, row in check.iterrows():
        tint = CLASS_COLOURS.get(row["runs_on"], GREY)
        axes.scatter(
            row["measured"], row["predicted"], s=24, color=tint, edgecolor="white", linewidth=0.5, zorder=4
        )
        if index in labelled:
            name = f"{_short(row['device'])}, {row['model']} {row['precision']}".strip()
            text = f"{name} {row['error']:+.0%}"
            marks.append(Mark(row["measured"], row["predicted"], text, tint, bold=outside[index]))
    for side in "xy":
        axes.set(**{f"{side}lim": ends})
        scale_axis(axes, side, pd.Series(ends))
    axes.set_xlabel("Published decoding rate (tokens/s)", fontsize=9.5)
    axes.set_ylabel("Predicted without rates of the same board (tokens/s)", fontsize=9.5)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=tint, label=name)
        for name, tint in CLASS_COLOURS.items()
        if name in set(check["runs_on"])
    ]
    handles.append(Patch(color="#eeeeee", label=f"within {BAND:.0%}"))
    within = (check["error"].abs() <= BAND).sum()
    style_axes(
        axes, f"Predicted (analytic) against published: {within} of {len(check)} within {BAND:.0%}", handles
    )
    label_marks(axes, marks)
    return figure


def device_rates(table: pd.DataFrame, title: str = "") -> Figure:
    """Decoding rates of one model from `fits_and_speed`: a group of points for each device, one for each precision.

    Raises NothingToDraw where no row has a rate, or the table holds several models.
    """
    drawn = table.dropna(subset="decode_tok_s")
    if drawn.empty:
        raise NothingToDraw("no device of this table holds the model and has a known bandwidth")
    if table["model"].nunique() > 1:
        raise NothingToDraw("this picture shows one model; select the rows of one")
    precisions = list(dict.fromkeys(table["precision"]))
    devices = list(drawn.groupby("device")["decode_tok_s"].max().sort_values().index)
    figure = new_chart(8.5, 1.4 + 0.16 * len(devices) * (len(precisions) + 1))
    axes = figure.subplots()
    height = 0.8 / len(precisions)
    for place, precision in enumerate(precisions):
        tint = PRECISION_COLOURS[place % len(PRECISION_COLOURS)]
        rates = drawn[drawn["precision"] == precision].set_index("device")["decode_tok_s"]
        for position, device in enumerate(devices):
            middle = position + 0.4 - (place + 0.5) * height
            if device not in rates:
                axes.text(
                    drawn["decode_tok_s"].min() * 0.55,
                    middle,
                    "does not fit",
                    va="center",
                    fontsize=7,
                    color=GREY,
                )
                continue
            axes.scatter(rates[device], middle, s=22, color=tint, linewidth=0, zorder=4)
            axes.text(rates[device] * 1.07, middle, f"{rates[device]:.3g}", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(drawn["decode_tok_s"].min() * 0.5, drawn["decode_tok_s"].max() * 1.6)
    axes.set_ylim(-0.6, len(devices) - 0.4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.set_yticks(range(len(devices)), devices, parse_math=False)
    axes.set_xlabel("Decoding (tokens/s), higher is better", fontsize=9.5)
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            color=PRECISION_COLOURS[place % len(PRECISION_COLOURS)],
            label=name,
        )
        for place, name in enumerate(precisions)
    ]
    style_axes(
        axes, f"{title or drawn['model'].iloc[0]}: analytic, from published shares of bandwidth", handles
    )
    axes.grid(axis="y", visible=False)
    return figure


def step_operations(work: pd.DataFrame, title: str = "One decode step") -> Figure:
    """Operations of a step by time, from `step`: the colour says what bounds each, the text its share and bytes.

    Raises NothingToDraw without operations.
    """
    if work.empty:
        raise NothingToDraw("there are no operations: pass the table of step()")
    ordered = work.sort_values("ms")
    total = ordered["ms"].sum()
    figure = new_chart(8.5, 1.2 + 0.28 * len(ordered))
    axes = figure.subplots()
    for position, (_, row) in enumerate(ordered.iterrows()):
        axes.barh(position, row["ms"], height=0.7, color=BOUND_COLOURS[row["bound"]], linewidth=0)
        runs = f" in {row['times']} runs" if row["times"] > 1 else ""
        read = f", {row['mb']:,.3g} MB{runs}" if row["bound"] != "overhead" else ""
        axes.text(
            row["ms"] + 0.01 * ordered["ms"].max(),
            position,
            f"{row['ms'] / total:.0%}{read}",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(ordered)), ordered.index)
    axes.set_xlim(0, ordered["ms"].max() * 1.35)
    axes.set_xlabel("Milliseconds, all layers together", fontsize=9.5)
    handles = [
        Patch(color=tint, label=f"bound by {bound}" if bound != "overhead" else bound)
        for bound, tint in BOUND_COLOURS.items()
        if bound in set(ordered["bound"])
    ]
    style_axes(axes, f"{title}: {total:.3g} ms (analytic)", handles)
    axes.grid(axis="y", visible=False)
    return figure


def bench_roofline(points: pd.DataFrame, peak_gb_s: float, gflop_s: float) -> Figure:
    """Tests of llama-bench under the roofline of a device, from the `points` of `fit_bench`; a line for each model.

    peak_gb_s: of the memory. gflop_s: the arithmetic rate that prefill has reached. Raises NothingToDraw without
    points.
    """
    figure = roofline(points, peak_gb_s, {"best prefill": gflop_s})
    title = "Tests of llama-bench under the roofline"
    figure.axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold")
    return figure


def rates_that_fit(table: pd.DataFrame, room_gb: float, title: str = "What fits, and how fast") -> Figure:
    """Decoding rate over the memory that a model needs, from `what_fits`: a point for each model and kind of file.

    Bars are the spread of the lines that calibrated the device. The dashed line is the room that the device leaves;
    models that are too large in every kind are named below. Raises NothingToDraw where nothing fits.
    """
    drawn = table.dropna(subset="decode_tok_s")
    if drawn.empty:
        raise NothingToDraw(
            f"no model of this table fits {room_gb:g} GB: choose fewer bits or a shorter context"
        )
    drawn = drawn.assign(need_gb=(drawn["file_mb"] + drawn["kv_cache_mb"]) / 1000)
    kinds = list(dict.fromkeys(table["kind"]))
    tints = dict(zip(kinds, PRECISION_COLOURS * len(kinds), strict=False))
    figure = new_chart(8.5, 5.0)
    axes = figure.subplots()
    marks = []
    for _, row in drawn.iterrows():
        place, tint = (row["need_gb"], row["decode_tok_s"]), tints[row["kind"]]
        axes.plot(
            [place[0]] * 2, [row["slow_tok_s"], row["fast_tok_s"]], color=tint, linewidth=1.2, alpha=0.6
        )
        axes.scatter(*place, s=30, color=tint, edgecolor="white", linewidth=0.6, zorder=4)
        first = row["kind"] == drawn.loc[drawn["model"] == row["model"], "kind"].iloc[-1]
        if first:  # of each model, the kind with the fewest bits
            marks.append(Mark(*place, f"{row['model']} {row['decode_tok_s']:.3g}", tint, wanted=False))
    axes.axvline(room_gb, **BASELINE_LINE)
    axes.axhline(READING_TOK_S, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlim(0, room_gb * 1.08)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.set_xlabel("File and KV cache (GB of 10⁹ bytes)", fontsize=9.5)
    axes.set_ylabel("Decoding (tokens/s), higher is better", fontsize=9.5)
    handles = [Patch(color=tints[kind], label=kind) for kind in kinds]
    handles.append(Line2D([], [], **BASELINE_LINE, label=f"room for a model: {room_gb:.3g} GB"))
    handles.append(
        Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label=f"a reader: {READING_TOK_S} tokens/s")
    )
    style_axes(axes, f"{title} (analytic, calibrated on llama-bench)", handles)
    left = table[~table["fits"]].groupby("model")["kind"].agg(list)
    never = [name for name, missing in left.items() if len(missing) == len(kinds)]
    stamp(figure, notes=[f"Too large in every kind: {', '.join(never)}."] if never else [])
    label_marks(axes, marks)
    return figure


def _short(device: str) -> str:
    """A device's name without the words that the colour or the number already says."""
    for words in ("Phone, ", "GeForce ", "Raspberry ", "Jetson ", "MacBook ", "Intel "):
        device = device.removeprefix(words)
    return device
