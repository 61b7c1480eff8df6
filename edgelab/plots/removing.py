"""What can be removed whole: what that costs and buys by recipe, block and width, and chosen against random."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgelab.plots.choosing import FAR, far_off
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.methods import METHOD_COLOURS
from edgelab.plots.style import (
    BADGE_SIGNS,
    BASELINE_LINE,
    FAMILY_COLOURS,
    GREY,
    PALE,
    NothingToDraw,
    Rows,
    as_frame,
    cautions,
    colour,
    draw_bar,
    draw_point,
    label,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)
from edgelab.rows import (
    BASELINE,
    NotMeasured,
    comparable,
    find_metric,
    interval_ends,
    newest,
    without_recovery,
)

PANELS = ("bits_per_byte", "weights_mb", "prefill_ratio", "decode_ratio")
RATIOS = ["prefill_ratio", "decode_ratio", "decode_ratio_low", "decode_ratio_high"]
OF_BASELINE = ["prefill_ratio", *["decode_ratio"] * 3]  # what each of them is divided by
OF_SPEED = [*RATIOS, "host"]
UNCHANGED = rf"{BASELINE}(?: @ .*)?$"
SMALLER = 0.99  # of the baseline's bytes
TOKEN_BYTES = 4  # of text, about: what makes a perplexity of bits per byte
WAYS = ("nsmallest", "nlargest")


def truth_table(rows: Rows) -> Figure:
    """A line for each recipe: bits per byte before and after recovery, MB, and both speeds over the baseline's.

    rows: with the baseline; `comparable` chooses the text, and of several rows of a recipe the newest counts, the
    reader's before the project's. An engine's speeds are those over the same engine's baseline, `none @ engine`, and
    are left out without that row. The title says how many recipes are smaller and how many write faster. Triangles are
    the same recipe with `recover` at its end. Rows far off are named in a note. Raises NothingToDraw where the baseline
    or all else is missing.
    """
    frame = as_frame(rows)
    known = _known(frame)
    baseline, removed = known.loc[BASELINE], known[~known["recipe"].str.match(UNCHANGED)]
    is_after = (removed["before"] != removed["recipe"]) & removed["before"].isin(removed["recipe"])
    after, removed = removed[is_after], removed[~is_after].sort_values("bits_per_byte", ascending=False)
    far = far_off(2 ** (TOKEN_BYTES * removed["bits_per_byte"])) & ~removed["recipe"].isin(after["before"])
    names = [f"{label(row['recipe'])} ({row['bits_per_byte']:.2f})" for _, row in removed[far].iterrows()]
    removed = removed[~far]
    if removed.empty:
        raise NothingToDraw(
            "only the baseline has bits per byte and weights_mb: measure prune.layers:keep=20 first"
        )
    figure = new_chart(11, 1.9 + 0.3 * len(removed))
    panels = figure.subplots(1, len(PANELS), sharey=True, width_ratios=[1.5, 1, 1, 1])
    for axes, name in zip(panels, PANELS, strict=True):
        _draw_field(axes, removed, name)
        level = find_metric(name).baseline or baseline[name]
        axes.axvline(level, **BASELINE_LINE)
        about = find_metric(name)
        axes.set_xlabel(textwrap.fill(f"{about.with_unit}, {about.direction}", 26), fontsize=8.5)
        axes.margins(x=0.12)
        style_axes(axes)
    for before, points in after.sort_values("train_tokens").groupby("before"):
        place = removed.index.get_loc(before)
        course = [removed.loc[before, "bits_per_byte"], *points["bits_per_byte"]]
        tint = colour(removed.loc[before, "family"])
        panels[0].plot(course, [place] * len(course), color=tint, linewidth=1.2, zorder=2)
        look = {"marker": "<", "color": tint, "edgecolor": "black", "linewidth": 0.8, "zorder": 5}
        panels[0].scatter(course[1:], [place] * len(points), s=46, **look)
    panels[0].set_yticks(range(len(removed)), removed["recipe"].map(label), parse_math=False)
    panels[0].set_ylim(-0.6, len(removed) - 0.4)
    style_axes(panels[0], _smaller_and_faster(removed, baseline["weights_mb"]))
    signs = [f"{sign} {badge}" for badge, sign in BADGE_SIGNS.items() if badge in set(removed["badge"])]
    tokens = " or ".join(f"{count:,.0f}" for count in sorted(set(after["train_tokens"].dropna())))
    signs += [f"◀ after recovery on {tokens} tokens"] if len(after) else []
    notes = [f"Too far off in bits per byte to be drawn: {', '.join(names)}."] if names else []
    if removed["recipe"].str.contains(" @ ").any():
        notes.append("Speeds of an engine are relative to the same engine without removing.")
    return stamp(figure, known, ["   ".join(signs), *notes, *cautions(known, PANELS)])


def _known(frame: pd.DataFrame) -> pd.DataFrame:
    """The newest row of each recipe on one text, by recipe, with its newest speed; `before` is it without recovery."""
    try:
        scored = comparable(frame.dropna(subset="bits_per_byte"))
    except NotMeasured:
        scored = frame.iloc[:0]
    if BASELINE not in set(scored["recipe"]):
        raise NothingToDraw(
            "the baseline has no bits per byte and weights_mb here: measure it and what you removed first, with "
            'el.compare(["none", "prune.layers:keep=20"])'
        )
    timed = frame[
        (frame["status"] == "ok") & frame["decode_ratio"].notna() & frame["model"].isin(scored["model"])
    ]
    known, timed = (newest(one, ["recipe"]).set_index("recipe", drop=False) for one in (scored, timed))
    known[OF_SPEED] = timed[OF_SPEED].reindex(known.index)
    engine = known["recipe"].str.partition(" @ ")[2]
    own = known.reindex(f"{BASELINE} @ {name}" for name in engine)
    for name, by in zip(RATIOS, OF_BASELINE, strict=True):
        known[name] = known[name].where(engine == "", known[name] / own[by].to_numpy())
    return known.assign(before=without_recovery(known["recipe"]))


def _draw_field(axes: Axes, removed: pd.DataFrame, name: str) -> None:
    """A point for each row that has the field, with its interval."""
    for place, ((_, row), ends) in enumerate(
        zip(removed.iterrows(), interval_ends(removed, name), strict=True)
    ):
        if np.isfinite(row[name]):
            if np.isfinite(ends).all():
                draw_bar(axes, row, np.column_stack([ends, [place] * 2]), "|")
            draw_point(axes, row[name], place, row)


def _smaller_and_faster(removed: pd.DataFrame, baseline_mb: float) -> str:
    small = (removed["weights_mb"] < SMALLER * baseline_mb).sum()
    timed = removed.dropna(subset="decode_ratio")
    fast = (timed["decode_ratio_low"].fillna(timed["decode_ratio"]) > 1).sum()
    text = f"{small} of {len(removed)} recipes are smaller"
    return f"{text}, {fast} of {len(timed)} that were timed write faster" if len(timed) else text


def influence_and_loss(blocks: pd.DataFrame, most: int = 4) -> Figure:
    """Each block by its influence along x and by the loss without it along y; the title says Spearman's correlation.

    blocks: by number, columns influence (1 - cosine) and loss: nats per token above that of all blocks when this one
    alone is removed. Numbers are written on the `most` blocks that matter most and least in either. Values that are
    not above zero have no place on a logarithmic axis, and are counted in a note.
    """
    shown = blocks[(blocks[["influence", "loss"]] > 0).all(axis=1)]
    if shown.empty:
        raise NothingToDraw("no block has an influence and a loss above zero: measure them first")
    found = blocks["influence"].corr(blocks["loss"], method="spearman")
    tint = FAMILY_COLOURS["prune"]
    figure = new_chart(6.6, 4.8)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    axes.scatter(
        shown["influence"], shown["loss"], s=34, color=tint, edgecolor="white", linewidth=0.5, zorder=3
    )
    axes.margins(0.1)
    axes.set_xlabel("Influence: 1 - cosine of the states before and after the block", fontsize=9.5)
    axes.set_ylabel("Loss without this block (nats per token above all)", fontsize=9.5)
    style_axes(axes, f"Do blocks that change little cost little? Spearman {found:.2f}")
    left_out = len(blocks) - len(shown)
    stamp(figure, notes=[f"Not drawn, because not above zero: {left_out}."] if left_out else [])
    ends = [getattr(shown[name], way)(most).index for name in shown[["influence", "loss"]] for way in WAYS]
    chosen = shown.loc[sorted({place for those in ends for place in those})]
    marks = [Mark(row.influence, row.loss, f"block {place}", tint) for place, row in chosen.iterrows()]
    label_marks(axes, marks)
    return figure


def chosen_and_random(points: pd.DataFrame, baseline: float | None = None) -> Figure:
    """Perplexity by criterion, the best on top; a band spans what chance gives. The title counts who beats all of it.

    points: criterion, ppl, fast; several points of a criterion are several seeds, and "random" is the control.
    What is FAR above chance is named in a note. Raises NothingToDraw where random or all else is missing.
    """
    points = points[np.isfinite(points["ppl"].astype(float))]
    chance = points.loc[points["criterion"] == "random", "ppl"]
    if chance.empty or len(chance) == len(points):
        raise NothingToDraw(
            "random and a criterion are needed, and there is "
            f"{', '.join(dict.fromkeys(points['criterion'])) or 'neither'}: measure prune.channels:by=random first"
        )
    worst = points.groupby("criterion")["ppl"].max().drop("random")
    beaten = (
        f"{(worst < chance.min()).sum()} of {len(worst)} criteria beat each of {len(chance)} random choices"
    )
    far = points["ppl"] > FAR * chance.max()
    names = [f"{row.criterion} ({row.ppl:,.0f})" for row in points[far].itertuples()]
    points = points[~far]
    best = points.groupby("criterion")["ppl"].min().sort_values(ascending=False)
    figure = new_chart(7.6, 1.7 + 0.42 * len(best))
    axes = figure.subplots()
    scale_axis(axes, "x", points["ppl"])
    axes.axvspan(chance.min(), chance.max(), color=PALE, alpha=0.3, linewidth=0, zorder=0)
    for place, criterion in enumerate(best.index):
        values = points.loc[points["criterion"] == criterion, "ppl"]
        tint = GREY if criterion == "random" else FAMILY_COLOURS["prune"]
        axes.scatter(
            values, [place] * len(values), s=46, color=tint, edgecolor="white", linewidth=0.6, zorder=3
        )
    if baseline is not None:
        axes.axvline(baseline, **BASELINE_LINE)
    axes.set_yticks(range(len(best)), best.index, parse_math=False)
    axes.set_ylim(-0.6, len(best) - 0.4)
    axes.margins(x=0.1)
    axes.set_xlabel("Perplexity, lower is better", fontsize=9.5)
    style_axes(axes, beaten)
    return stamp(figure, points, [f"Far off, not drawn: {', '.join(names)}."] if names else [])


def width_times(ms: pd.DataFrame) -> Figure:
    """Time of a product over its width, relative to the largest width, a line for each column.

    ms: milliseconds by width. The dashed line is the share of the multiplications that is left: a point above it gains
    less time than work.
    """
    widths = ms.index.to_numpy(float)
    share = widths / widths.max()
    figure = new_chart(8.0, 4.4)
    axes = figure.subplots()
    axes.plot(widths, share, **BASELINE_LINE)
    legend = [Line2D([], [], label="multiplications that are left", **BASELINE_LINE)]
    for place, (name, column) in enumerate(ms.items()):
        look = {"color": METHOD_COLOURS[place % len(METHOD_COLOURS)], "marker": "o", "markersize": 4.5}
        axes.plot(widths, column / column[ms.index.max()], linewidth=1.3, **look)
        legend.append(Line2D([], [], label=name, linewidth=1.3, **look))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Width: channels that stay", fontsize=9.5)
    axes.set_ylabel(f"Time ÷ time at {widths.max():.0f}", fontsize=9.5)
    style_axes(axes, "Narrower products, and the time they take", legend, columns=4)
    return stamp(figure)
