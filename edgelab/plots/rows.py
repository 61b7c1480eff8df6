"""Pictures of ledger rows: functions from rows to a matplotlib `Figure`, without pyplot state.

Rows are a DataFrame with the ledger's columns, a list of Row dataclasses, or a list of dictionaries. Failed
rows are never drawn but counted in a note. Every plot raises NothingToDraw where no row holds what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from edgelab.measure.intervals import mean_interval
from edgelab.plots.choosing import named, within_sense
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import (
    BADGE_SIGNS,
    BASELINE_LINE,
    FAMILY_COLOURS,
    GREY,
    PALE,
    SAME_QUALITY,
    SAME_SIZE,
    SAME_SPEED,
    SIZE_PARTS,
    NothingToDraw,
    Rows,
    as_frame,
    cautions,
    colour,
    draw_bar,
    draw_point,
    drawable,
    inner,
    label,
    legend_handles,
    new_chart,
    row_names,
    scale_axis,
    stamp,
    style_axes,
)
from edgelab.rows import (
    BASELINE,
    PROTOCOL,
    compared_by,
    find_metric,
    interval_ends,
    pareto_front,
    tokens_per_unit,
)

if TYPE_CHECKING:  # measuring imports torch, drawing does not need it
    from edgelab.measure.perplexity import Perplexity
    from edgelab.measure.protocols import Protocol

STALL = (
    1.6  # of the slowest median: a whisker ends there, or one stall of the machine would squeeze all others
)


def tradeoff(rows: Rows, x: str = "weights_mb", y: str = "ppl", highlight: str | None = None) -> Figure:
    """Each row as a point of the fields `x` and `y`, with the Pareto front and the baseline as lines.

    Bars through points are 95 % intervals of quality, the spread of a ratio, or reach to a p95.
    Rows that cannot be compared (other protocol or text; other machine, for times) never share a front.
    `highlight` is a canonical recipe or a row_id and gets a ring.
    """
    frame = as_frame(rows)
    horizontal, vertical = find_metric(x), find_metric(y)
    metrics = horizontal, vertical
    timed = "speed" in {metric.group for metric in metrics}
    measured, notes = drawable(frame, [x, y], "quality and latency" if timed else "quality and size")
    measured["ring"] = (measured["recipe"] == highlight) | (measured["row_id"] == highlight)
    if highlight and not measured["ring"].any():
        notes.append(f"Nothing measured yet for {highlight}.")
    drawn, left_out = within_sense(measured, x, y)
    drawn = drawn.sort_values(["reader", "ring"], kind="stable")  # the reader's rows come over the others

    figure = new_chart()
    axes = figure.subplots()
    scale_axis(axes, "x", drawn[x])
    scale_axis(axes, "y", drawn[y])
    axes.margins(0.08)
    lines = []  # what labels keep away from, each (corners, 2)
    marks = []
    within = {metric.within for metric in metrics}
    machine_bound = "machine" in within
    keys = [*compared_by((x, y)), *(["host"] if machine_bound else [])]
    drawn["front"] = False
    for which, group in drawn.groupby(keys, dropna=False):
        # Outputs that are not the reference's earn no rank in speed.
        front = pareto_front(group[~group["hollow"] & ~group["ungated"]] if machine_bound else group, x, y)
        drawn.loc[front.index, "front"] = True
        lines.append(_stairs(front[[x, y]].to_numpy(), horizontal.better == "lower"))
        axes.plot(*lines[-1].T, color="#9a9a9a", linewidth=1.2, zorder=1)
        same = measured[keys].eq(list(which)) | (measured[keys].isna() & pd.isna(list(which)))
        baseline = measured[(measured["recipe"] == BASELINE) & same.all(axis=1)]
        for _, row in baseline.tail(1).iterrows():
            value = row[y] if vertical.baseline is None else vertical.baseline
            axes.axhline(value, **BASELINE_LINE)
            lines.append(np.array([[drawn[x].min(), value], [drawn[x].max(), value]]))
            if row.name not in drawn.index:
                text = f"baseline: {row[x]:{horizontal.form or ',.3g'}} {horizontal.unit}".rstrip()
                marks.append(Mark(drawn[x].max(), value, text, colour(row["family"])))

    ends = (interval_ends(drawn, x), interval_ends(drawn, y))
    with_label = named(drawn)
    for (index, row), ends_x, ends_y in zip(drawn.iterrows(), *ends, strict=True):
        bars = [np.column_stack([ends_x, [row[y]] * 2]), np.column_stack([[row[x]] * 2, ends_y])]
        for bar, cap in zip(bars, "|_", strict=True):
            if np.isfinite(bar).all():
                lines.append(draw_bar(axes, row, bar, cap))
        draw_point(axes, row[x], row[y], row)
        if row["ring"]:
            axes.scatter(row[x], row[y], s=260, facecolor="none", edgecolor="black", linewidth=1.6, zorder=5)
        if with_label[index]:
            rank = (not row["ring"], not row["reader"], not row["front"])
            look = {
                "colour": colour(row["family"]),
                "wanted": row["ring"] or row["reader"],
                "bold": row["ring"],
            }
            marks.append(Mark(row[x], row[y], label(row["recipe"]), rank=rank, **look))

    axes.set_xlabel(f"{horizontal.with_unit}, {horizontal.direction}", fontsize=9.5)
    axes.set_ylabel(f"{vertical.with_unit}, {vertical.direction}", fontsize=9.5)
    style_axes(axes, f"{vertical.label} against {inner(horizontal.label)}", legend_handles(drawn))
    stamp(figure, frame, [*left_out, *notes, *cautions(drawn, (x, y))])
    label_marks(axes, marks, lines)
    return figure


def size_bars(rows: Rows) -> Figure:
    """Stored weights of each recipe in MB (10^6 bytes), by part, with effective bits per weight and badge."""
    frame = as_frame(rows)
    drawn, notes = drawable(frame, ["weights_mb"], "sizes", SAME_SIZE)
    drawn = drawn.sort_values("weights_mb")
    parts = drawn[list(SIZE_PARTS)]
    rest = (drawn["weights_mb"] - parts.sum(axis=1)).clip(lower=0)
    uncounted = parts.isna().all(axis=1)
    stack = [
        *((SIZE_PARTS[column], parts[column].fillna(0), {"alpha": alpha})
          for column, alpha in zip(SIZE_PARTS, (1.0, 0.55, 0.3), strict=True)),
        ("norms and other", rest.where(~uncounted, 0), {"alpha": 0.12}),
        ("not counted", rest.where(uncounted, 0), {"alpha": 0.12, "hatch": "////"}),
    ]  # fmt: skip
    figure = new_chart(height=1.7 + 0.36 * len(drawn))
    axes = figure.subplots()
    positions, left, legend = np.arange(len(drawn)), np.zeros(len(drawn)), []
    for name, width, look in stack:
        if width.any():
            axes.barh(positions, width, 0.66, left, color=drawn["family"].map(colour), linewidth=0, **look)
            legend.append(Patch(facecolor=GREY, label=name, **look))
        left += width.to_numpy()
    for position, (_, row) in enumerate(drawn.iterrows()):
        bits = f", {row['bits_per_weight']:.2f} bits/weight" if np.isfinite(row["bits_per_weight"]) else ""
        text = f"{row['weights_mb']:,.1f} MB{bits}" + (f" ({row['badge']})" if row["badge"] else "")
        look = {"fontsize": 8, "va": "center", "textcoords": "offset points"}
        axes.annotate(text, (row["weights_mb"], position), (5, 0), **look)
    axes.set_yticks(positions, row_names(drawn), parse_math=False)
    axes.set_ylim(-0.6, len(drawn) - 0.4)
    axes.set_xlim(0, drawn["weights_mb"].max() * 1.02)  # the layout makes room for the words on the right
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("Stored weights (MB of 10⁶ bytes), lower is better", fontsize=9.5)
    style_axes(axes, "Size, by what it is made of", legend, columns=3)
    axes.grid(axis="y", visible=False)
    return stamp(figure, frame, notes)


def latency(rows: Rows) -> Figure:
    """Time per output token (p50, whisker to p95), time to first token, decoding rate over the baseline's.

    The ratio comes from runs interleaved with the baseline and is the one to compare by; its bar is its
    spread. Machines stand apart, the reader's on top.
    """
    frame = as_frame(rows)
    drawn, notes = drawable(frame, ["tpot_ms_p50"], "latency", SAME_SPEED)
    drawn = drawn.sort_values(["reader", "host", "tpot_ms_p50"], ascending=[True, True, False])
    borders = np.flatnonzero(drawn["host"].ne(drawn["host"].shift()))[1:] - 0.5
    prompts = " or ".join(f"{tokens:.0f}" for tokens in drawn["prefill_tokens"].dropna().unique())
    titles = {
        "tpot_ms_p50": "Time per output token (ms)\np50, whisker to p95",
        "ttft_ms_p50": "Time to first token (ms)\np50" + (f", {prompts} prompt tokens" if prompts else ""),
        "decode_ratio": "Decoding speed relative to the baseline\nsame run: compare these",
    }
    figure = new_chart(9.5, 1.9 + 0.36 * len(drawn))
    panels = figure.subplots(1, 3, sharey=True, width_ratios=[1.2, 1, 1.2])
    stalls = []
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        bars = interval_ends(drawn, metric)
        reach = STALL * drawn[metric].max()
        for position, (_, row) in enumerate(drawn.iterrows()):
            if not np.isfinite(row[metric]):
                continue
            ends = bars[position]
            if np.isfinite(ends).all():
                draw_bar(axes, row, np.column_stack([ends.clip(max=reach), [position] * 2]), "|")
                if ends[1] > reach:
                    axes.scatter(reach, position, marker=">", s=20, color=colour(row["family"]), zorder=4)
                    stalls.append(f"{label(row['recipe'])} {ends[1]:,.0f} ms")
            draw_point(axes, row[metric], position, row)
            text = f"{row[metric]:.2f}" if metric == "decode_ratio" else f"{row[metric]:.3g}"
            look = {"fontsize": 7, "color": GREY, "ha": "center", "textcoords": "offset points"}
            written = axes.annotate(text, (row[metric], position), (0, 5), **look)
            written.set_path_effects([withStroke(linewidth=2, foreground="white")])
        baseline = drawn.loc[drawn["recipe"] == "none", metric].tail(1) if not len(borders) else []
        for value in [1.0] if metric == "decode_ratio" else baseline:
            axes.axvline(value, **BASELINE_LINE)
        for border in borders:
            axes.axhline(border, color=GREY, linewidth=0.8)
        axes.margins(x=0.15)
        axes.autoscale_view()
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        style_axes(axes)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(find_metric(metric).direction, fontsize=8.5)
    panels[0].set_yticks(range(len(drawn)), row_names(drawn, always="host"), parse_math=False)
    panels[0].set_ylim(-0.6, len(drawn) - 0.35)
    badges = [f"{sign} {badge}" for badge, sign in BADGE_SIGNS.items() if badge in set(drawn["badge"])]
    if stalls:
        notes.append(f"The machine stalled; the p95 of these is outside the plot: {', '.join(stalls)}.")
    return stamp(figure, frame, ["   ".join(badges), *notes, *cautions(drawn, ["tpot_ms_p50"])])


def window_delta(rows: Rows, baseline: str = "none") -> Figure:
    """NLL of every window minus the NLL of the recipe `baseline` on the same window, in nats per token.

    One point per window, and the mean with its 95 % interval: the recorded one where the row was compared
    with the uncompressed baseline, else Student's interval of the mean over windows.
    """
    frame = as_frame(rows)
    drawn, notes = drawable(frame, ["ppl"], "quality", SAME_QUALITY)
    drawn = drawn.loc[[np.ndim(windows) == 1 and len(windows) > 0 for windows in drawn["window_nll"]]]
    pairs = []
    for _, row in drawn[drawn["recipe"] != baseline].iterrows():
        same = drawn[(drawn["recipe"] == baseline) & (drawn[PROTOCOL] == row[PROTOCOL]).all(axis=1)]
        same = same.loc[[len(windows) == len(row["window_nll"]) for windows in same["window_nll"]]]
        for windows in same["window_nll"].tail(1):
            pairs.append((row, np.asarray(row["window_nll"], float) - np.asarray(windows, float)))
    if not pairs:
        raise NothingToDraw(
            f"no row has per-window NLL beside {baseline!r} under the same model, protocol and text: measure "
            f'both first, for instance with el.compare(["{baseline}", "quantize.rtn:bits=4,group_size=64"])'
        )
    pairs.sort(key=lambda pair: -pair[1].mean())

    figure = new_chart(height=1.9 + 0.62 * len(pairs))
    axes = figure.subplots()
    for position, (row, delta) in enumerate(pairs):
        # Multiples of the golden ratio spread neighbouring windows over the strip without chance.
        heights = position - 0.02 - 0.26 * (np.arange(len(delta)) * 0.618034 % 1)
        axes.scatter(delta, heights, s=12, color=colour(row["family"]), alpha=0.35, linewidth=0)
        mean, low, high = row[["delta_nll", "delta_nll_low", "delta_nll_high"]].astype(float)
        if baseline != "none" or not np.isfinite([mean, low, high]).all():
            found = mean_interval(delta)
            mean, low, high = found.mean, found.low, found.high
        axes.plot([low, high], [position + 0.14] * 2, color="black", linewidth=2, marker="|", markersize=8)
        axes.plot(mean, position + 0.14, marker="D", color="black", markersize=5)
        times = math.exp(mean * tokens_per_unit(row.to_frame().T).item())
        text = f"mean {mean:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}], perplexity × {times:.3f}"
        place = {"xycoords": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.annotate(text, (0.995, position + 0.32), fontsize=7.5, color=GREY, **place)
    axes.axvline(0, **BASELINE_LINE)
    shown = pd.DataFrame([row for row, _ in pairs])
    axes.set_yticks(range(len(pairs)), row_names(shown), parse_math=False)
    axes.set_ylim(-0.5, len(pairs) - 0.4)
    axes.margins(x=0.1)
    axes.set_xlabel(f"NLL minus that of {label(baseline)} (nats per token), lower is better", fontsize=9.5)
    windows = " or ".join(str(length) for length in sorted({len(delta) for _, delta in pairs}))
    style_axes(axes, f"Difference to {label(baseline)}: {windows} windows and their mean")
    return stamp(figure, frame, notes + cautions(shown.assign(hollow=False), ["delta_nll"]))


def protocols(
    results: Mapping[str, Perplexity], rules: Mapping[str, Protocol], chosen: str | None = None
) -> Figure:
    """Which tokens each protocol scores, and what perplexity and bits per byte follow for the same weights.

    `results` and `rules` hold the protocols by name; `chosen` stands out, by default all do.
    """
    span = max(rules[name].window for name in results)
    bos = FAMILY_COLOURS["hybrid"]
    figure = new_chart(9.5, 1.5 + 0.5 * len(results))
    strips, perplexities, bits = figure.subplots(1, 3, sharey=True, width_ratios=[2.2, 1, 1])
    for position, (name, found) in enumerate(results.items()):
        rule, dark = rules[name], FAMILY_COLOURS["baseline"] if chosen in (name, None) else PALE
        skipped = {"all": 1, "half": rule.window // 2 + 1, "rolling": 0}[rule.scored]
        for begin in range(0, span, rule.window):
            look = {"height": 0.5, "linewidth": 0}
            strips.barh(position, rule.window - 6, left=begin + 3, color="#e6e6e6", **look)
            strips.barh(position, rule.window - skipped - 6, left=begin + skipped + 3, color=dark, **look)
            if rule.bos == "always" and begin == 0:
                strips.barh(position, 16, left=begin + 3, color=bos, **look)
        for axes, value, digits in ((perplexities, found.ppl, 2), (bits, found.bits_per_byte, 3)):
            axes.barh(position, value, 0.5, color=dark, linewidth=0)
            look = {"fontsize": 8, "va": "center", "textcoords": "offset points"}
            look["fontweight"] = "bold" if name == chosen else "normal"
            axes.annotate(f"{value:.{digits}f}", (value, position), (4, 0), **look)
    strips.set_yticks(range(len(results)), list(results), parse_math=False)
    strips.set_ylim(len(results) - 0.5, -0.5)
    strips.set_xlabel(f"Tokens of the text (the first {span:,})", fontsize=8.5)
    parts = [(FAMILY_COLOURS["baseline"], "scores"), ("#e6e6e6", "context only"), (bos, "BOS token")]
    for axes in (strips, perplexities, bits):
        style_axes(axes, legend=[Patch(facecolor=face, label=text) for face, text in parts if axes is strips])
        axes.grid(visible=False)
    strips.set_title("What a window scores", loc="left", fontsize=10, fontweight="bold", pad=22)
    for axes, title in (
        (perplexities, "Perplexity\nper token or word"),
        (bits, "Bits per byte\nof the scored text"),
    ):
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("lower is better", fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return stamp(figure)


def _stairs(front: np.ndarray, lower_is_better: bool) -> np.ndarray:
    """Corners of the stairs through `front`, (points, 2) sorted by x: nothing better is known in between."""
    doubled = front.astype(float).repeat(2, axis=0)
    ahead, behind = doubled[1:], doubled[:-1]
    x, y = (ahead, behind) if lower_is_better else (behind, ahead)
    return np.column_stack([x[:, 0], y[:, 1]])
