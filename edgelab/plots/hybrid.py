"""Edge and cloud together: who works when, what routing and drafting buy, what states give away, what outages do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from edgelab.deployments.hybrid.routing.curves import GapError, Recovery, curve, oracle
from edgelab.plots.choosing import MOST_LABELS
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import (
    BASELINE_LINE,
    FAMILY_COLOURS,
    GREY,
    PALE,
    Chart,
    NothingToDraw,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)

EDGE, CLOUD, NOBODY = "#009E73", "#0072B2", "#D55E00"
WORKERS = {
    "edge": ("the edge computes", EDGE),
    "cloud": ("on the way or in the cloud", CLOUD),
    "waiting": ("waiting in vain", PALE),
}
ANSWERED_BY = {"edge": EDGE, "cloud": CLOUD, "nobody": NOBODY}
DRAFTING = {
    "streamed": ("streamed from the cloud", CLOUD),
    "drafted": ("drafted at the edge", EDGE),
    "pipelined": ("drafted at the edge, pipelined", FAMILY_COLOURS["hybrid"]),
    "co-located": ("drafted in the cloud", FAMILY_COLOURS["lora"]),
}
SCORE_COLOURS = ("#D55E00", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#44AA99", "#999933")
SECONDS_FROM = 2.0  # an axis of time is in seconds
STEEP = 3.0  # times streaming, above which drafting has long lost: lines leave the picture
UNSEEN = 1e-3  # of the longest bar: a gap between two spans that no reader sees


# One request


def time_line(
    spans: Mapping[str, Sequence[tuple[str, float, float]]], title: str = "Where the time of a request goes"
) -> Chart:
    """A bar for each way of answering a request, coloured by who is at work, with its whole time at the end.

    spans: by way, (who, begin, end) in seconds as `Answer.spans` holds them; who is "edge", "cloud", which is on the
    way or in the cloud, or "waiting". Neighbours of the same kind are drawn as one. A way without spans is said to have
    no answer. Raises NothingToDraw where no way has any.
    """
    longest_s = max((end for own in spans.values() for _, _, end in own), default=0.0)
    if not longest_s > 0:
        raise NothingToDraw("no request has been answered yet; answer one, and give the spans of its answer")
    scale, unit = (1.0, "s") if longest_s >= SECONDS_FROM else (1e3, "ms")
    figure = new_chart(9, 1.6 + 0.45 * len(spans))
    axes = figure.subplots()
    seen = set()
    for place, own in enumerate(spans.values()):
        merged = _merged(own, UNSEEN * longest_s)
        for who, begin, end in merged:
            tint = WORKERS.get(who, (who, GREY))[1]
            axes.barh(place, scale * (end - begin), left=scale * begin, height=0.62, color=tint, linewidth=0,
                      zorder=2)  # fmt: skip
            seen.add(who)
        whole = max((end for _, _, end in merged), default=0.0)
        text = f"{scale * whole:,.{2 if unit == 's' else 0}f} {unit}" if merged else "no answer"
        axes.annotate(
            text, (scale * whole, place), (5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(spans)), list(spans), parse_math=False)
    axes.set_ylim(len(spans) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 * scale * longest_s)
    axes.xaxis.set_major_formatter("{x:,.6g}")
    axes.set_xlabel(f"Time since the question ({unit})", fontsize=9.5)
    handles = [Patch(color=tint, label=words) for who, (words, tint) in WORKERS.items() if who in seen]
    handles += [Patch(color=GREY, label=who) for who in sorted(seen - WORKERS.keys())]
    style_axes(axes, title, handles)
    axes.grid(axis="y", visible=False)
    return stamp(figure)


def _merged(spans: Iterable[tuple[str, float, float]], gap: float) -> list[tuple[str, float, float]]:
    """Spans in order of time, those of the same kind that follow each other within `gap` seconds as one."""
    found: list[tuple[str, float, float]] = []
    for who, begin, end in sorted(spans, key=lambda span: span[1]):
        if found and found[-1][0] == who and begin - found[-1][2] <= gap:
            begin, end = found[-1][1], max(end, found.pop()[2])
        found.append((who, begin, end))
    return found


# Routing


def deferral(edge_right: ArrayLike, cloud_right: ArrayLike, scores: Mapping[str, ArrayLike]) -> Chart:
    """Accuracy over the share of requests that go to the cloud: a line for each score, random and the oracle.

    edge_right, cloud_right: (items,) bool. scores: by name, (items,), higher for surer. The title says which score
    recovers most of the gap between edge and cloud, on average over all shares, or that there is no clear gap. Raises
    NothingToDraw without items, RoutingError for scores that are not finite or of other items.
    """
    edge, cloud = np.asarray(edge_right, float), np.asarray(cloud_right, float)
    if not edge.size:
        raise NothingToDraw(
            "no request has been answered by edge and cloud; measure the requests of both first"
        )
    best, title, notes = _worth(edge, cloud, scores)
    figure = new_chart(8.5, 5.0)
    axes = figure.subplots()
    ends = np.array([(0, 100 * edge.mean()), (100, 100 * cloud.mean())])
    lines, marks = [ends], [Mark(*ends.mean(0), "random", GREY)]
    axes.plot(*ends.T, **BASELINE_LINE)
    known = curve(edge, cloud, oracle(edge, cloud))
    lines.append(100 * np.column_stack([known.share, known.accuracy]))
    axes.plot(*lines[-1].T, color=GREY, linewidth=1.2, linestyle=(0, (1, 1.5)))
    marks.append(Mark(*lines[-1][1], "oracle", GREY))
    for place, (name, score) in enumerate(scores.items(), 1):
        tint = SCORE_COLOURS[(place - 1) % len(SCORE_COLOURS)]
        found = curve(edge, cloud, score)
        lines.append(100 * np.column_stack([found.share, found.accuracy]))
        axes.plot(
            *lines[-1].T, color=tint, linewidth=2.4 if name == best else 1.3, zorder=3 if name == best else 2
        )
        share = 100 * place / (len(scores) + 1)  # each name at another share, so that they do not meet
        height = float(np.interp(share, *lines[-1].T))
        marks.append(Mark(share, height, name, tint, bold=name == best))
    for (share, accuracy), who, tint in zip(ends, ("edge", "cloud"), (EDGE, CLOUD), strict=True):
        axes.plot(share, accuracy, "o", color=tint, markersize=8, zorder=5, clip_on=False)
        marks.append(Mark(share, accuracy, f"{who} alone, {accuracy:.1f} %", tint, rank=(-1,), bold=True))
    axes.margins(x=0.03, y=0.12)
    axes.set_xlabel("Requests that go to the cloud (%)", fontsize=9.5)
    axes.set_ylabel("Answered rightly (%), higher is better", fontsize=9.5)
    style_axes(axes, title)
    stamp(figure, notes=notes)
    label_marks(axes, marks, lines)
    return figure


def _worth(
    edge: np.ndarray, cloud: np.ndarray, scores: Mapping[str, ArrayLike]
) -> tuple[str, str, list[str]]:
    """The score that recovers most, "" where none can be named, a title about it, and what has to be known beside."""
    plain = "What sending requests away buys"
    if not scores:
        return "", plain, []
    try:
        worth = {name: Recovery(edge, cloud, score).apgr() for name, score in scores.items()}
    except GapError as error:
        return "", plain, [str(error)]
    best, found = max(worth.items(), key=lambda pair: pair[1].value)
    value = f"{100 * found.value:.0f} %"
    ends = (
        f" ({100 * found.low:.0f} to {100 * found.high:.0f} %)"
        if math.isfinite(found.high - found.low)
        else ""
    )
    chosen = " The best of several was chosen on these very items." if len(worth) > 1 else ""
    title = f"By {best}, {value} of the gap comes back on average; at random 50 %"
    return best, title, [f"Average performance gap recovered by {best}: {value}{ends}.{chosen}"]


def reliability(probability: ArrayLike, right: ArrayLike) -> Chart:
    """The share of right answers over the probability that was given for it, in ten bins, and how many items each has.

    probability: calibrated, (items,), 0 to 1; right: (items,) bool, of items on which nothing was calibrated. Bars are
    Wilson's 95 % intervals. The title has the expected calibration error, beside that of perfect probabilities, which
    few items keep above zero. Raises NothingToDraw without items, RoutingError for what is no probability.
    """
    from edgelab.deployments.hybrid.routing import scores

    if not np.size(probability):
        raise NothingToDraw("no answer has a probability of being right; calibrate a score first")
    bins = scores.reliability(probability, right)
    error = scores.expected_calibration_error(probability, right)
    perfect = scores.error_of_perfect(probability)
    figure = new_chart(6.5, 5.6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    axes.plot([0, 100], [0, 100], **BASELINE_LINE)
    centre, share = 100 * bins["confidence"], 100 * bins["accuracy"]
    axes.vlines(centre, 100 * bins["low"], 100 * bins["high"], color=EDGE, linewidth=1.2, alpha=0.6)
    axes.plot(centre, share, "o", color=EDGE, markersize=7, clip_on=False, zorder=4)
    left = 10 * np.minimum(np.floor(10 * bins["confidence"] + 1e-9), 9)
    below.bar(left + 5, bins["items"], width=9, color=PALE, linewidth=0)
    for place, count in zip(left + 5, bins["items"], strict=True):
        below.annotate(
            f"{count:,}", (place, count), (0, 2), textcoords="offset points", ha="center", fontsize=8
        )
    below.margins(y=0.35)
    axes.set(xlim=(0, 100), ylim=(0, 102))
    axes.set_ylabel("Answered rightly (%)", fontsize=9.5)
    below.set_ylabel("Items", fontsize=9.5)
    below.set_xlabel("Probability of being right that was given (%)", fontsize=9.5)
    off, alike = 100 * error.value, 100 * perfect.value
    style_axes(axes, f"Probabilities are off by {off:.1f} points; perfect ones would seem {alike:.1f} off")
    style_axes(below)
    stamp(figure)
    bars = [
        np.array([(x, low), (x, high)])
        for x, low, high in zip(centre, 100 * bins["low"], 100 * bins["high"], strict=True)
    ]
    diagonal = Mark(25, 25, "as often right as said", GREY)
    label_marks(axes, [diagonal], [np.array([(0, 0), (100, 100)]), *bars])
    return figure


# Drafting


def draft_break_even(
    draft_ms: float,
    verify_ms: float,
    target_ms: float,
    acceptance: float,
    draft: int,
    round_trips_ms: Sequence[float],
    measured: pd.DataFrame | None = None,
) -> Chart:
    """Time per token over the round trip: drafted at the edge, plain and pipelined, against streaming from the cloud.

    draft_ms, target_ms: time per token of the drafter and of the cloud without drafts; verify_ms: of the cloud for a
    draft of `draft` tokens, of which `acceptance` are accepted. round_trips_ms: which the axis reaches over, such as
    those of links. Streaming pays the round trip once, before the first token, so that it does not depend on it
    afterwards; drafting in the cloud, co-located, never pays it. measured: points, columns round_trip_ms, ms_per_token
    and way: streamed, drafted, pipelined or co-located. The round trip up to which drafting at the edge wins is marked
    where it is on the axis, and the title says it. Raises NothingToDraw without round trips, SpeculationError for an
    acceptance or a draft that cannot be.
    """
    from edgelab.deployments.hybrid.speculation.acceptance import (
        break_even_round_trip_ms,
        expected_tokens,
        pipelined_ms,
        time_per_token_ms,
    )

    trips = np.unique(np.asarray(round_trips_ms, float))
    if not trips.size:
        raise NothingToDraw("no round trip to draw over; give those of some links")
    logarithmic = trips[0] > 0 and trips[-1] > 12 * trips[0]
    grid = np.geomspace(trips[0], trips[-1], 400) if logarithmic else np.linspace(0, trips[-1] or 1, 400)
    figures = acceptance, draft, draft_ms, verify_ms
    courses = {
        "streamed": np.full(len(grid), float(target_ms)),
        "drafted": np.array([time_per_token_ms(*figures, trip) for trip in grid]),
        "pipelined": np.array([pipelined_ms(*figures, trip) for trip in grid]),
        "co-located": np.full(len(grid), time_per_token_ms(*figures)),
    }
    wins = {
        "drafted": break_even_round_trip_ms(*figures, target_ms),
        "pipelined": _wins_up_to(
            lambda trip: pipelined_ms(*figures, trip),
            target_ms,
            target_ms * expected_tokens(acceptance, draft),
        ),
    }
    points = pd.DataFrame(columns=["round_trip_ms", "ms_per_token", "way"]) if measured is None else measured
    points = points[np.isfinite(points[["round_trip_ms", "ms_per_token"]].astype(float)).all(axis=1)]

    figure = new_chart(8.5, 4.8)
    axes = figure.subplots()
    scale_axis(axes, "x", pd.Series(trips if logarithmic else grid))
    if logarithmic and len(trips) <= MOST_LABELS:
        axes.set_xticks(trips, [f"{trip:g}" for trip in trips])
    level = max(target_ms, courses["co-located"][0], points["ms_per_token"].max() if len(points) else 0)
    highest = min(
        max(STEEP * target_ms, 1.15 * level), 1.08 * max(course.max() for course in courses.values())
    )
    marks, lines = [], []
    for (way, (name, tint)), at in zip(DRAFTING.items(), (0.06, 0.97, 0.8, 0.3), strict=True):
        dash = (0, (5, 2)) if way == "co-located" else "-"
        axes.plot(grid, courses[way], color=tint, linewidth=2, linestyle=dash)
        shown = np.column_stack([grid, courses[way]])[courses[way] <= highest]
        lines.append(shown if len(shown) else np.array([(grid[0], highest)]))
        value = f", {courses[way][0]:.3g} ms" if way in ("streamed", "co-located") else ""
        marks.append(Mark(*lines[-1][int(at * (len(lines[-1]) - 1))], name + value, tint))
        own = points[points["way"] == way]
        axes.plot(
            own["round_trip_ms"], own["ms_per_token"], "o", color=tint, markeredgecolor="black", zorder=4
        )
    for way, trip in wins.items():
        if max(trip, 0) > 0 and grid[0] <= trip <= grid[-1]:
            axes.plot(
                trip, target_ms, "D", color=DRAFTING[way][1], markeredgecolor="white", markersize=9, zorder=5
            )
            marks.append(Mark(trip, target_ms, f"{trip:.3g} ms", "black", rank=(-1,), bold=True))
    axes.set_ylim(0, highest)
    axes.set_xlabel("Round trip to the cloud (ms)", fontsize=9.5)
    axes.set_ylabel("ms per token, lower is better", fontsize=9.5)
    notes = [
        f"Lines: computed for drafts of {draft} and an acceptance of {100 * acceptance:.0f} %, bytes left out."
    ]
    notes += ["Points: measured."] if len(points) else []
    style_axes(axes, _drafting_wins(wins))
    stamp(figure, notes=[" ".join(notes)])
    label_marks(axes, marks, lines)
    return figure


def _wins_up_to(takes_ms: Callable[[float], float], target_ms: float, most_ms: float) -> float:
    """The round trip, at most `most_ms`, up to which a time per token that grows with it is below the target's."""
    low, high = 0.0, most_ms
    while high - low > 1e-6 * most_ms:
        middle = (low + high) / 2
        low, high = (middle, high) if takes_ms(middle) < target_ms else (low, middle)
    return low


def _drafting_wins(wins: Mapping[str, float]) -> str:
    plain, pipelined = wins["drafted"], wins["pipelined"]
    if plain > 0:
        more = f", pipelined up to {pipelined:.3g} ms" if pipelined > 0 else ""
        return f"Drafting at the edge beats streaming up to a round trip of {plain:.3g} ms{more}"
    if pipelined > 0:
        return (
            f"Drafting at the edge beats streaming only pipelined, up to a round trip of {pipelined:.3g} ms"
        )
    return "Drafting at the edge never beats streaming, however short the round trip"


# What leaves the device


def exposed(found: pd.DataFrame) -> Chart:
    """Share of prompt tokens read back from the states that travel, over the cut, a panel for each wire format.

    found: columns cut, wire, nearest and search, shares of 0 to 1; the mean is drawn where a cut has several rows.
    Raises NothingToDraw where no row has a share.
    """
    shown = found[found[["nearest", "search"]].notna().any(axis=1)]
    if shown.empty:
        raise NothingToDraw("no prompt has been read back from its states; attack one at some cut first")
    wires = list(dict.fromkeys(shown["wire"]))
    figure = new_chart(2.2 + 2.6 * len(wires), 3.9)
    panels = figure.subplots(1, len(wires), sharey=True, squeeze=False)[0]
    kinds = {"search": ("search", NOBODY), "nearest": ("nearest state", CLOUD)}
    drawn = []
    for axes, wire in zip(panels, wires, strict=True):
        shares = 100 * shown[shown["wire"] == wire].groupby("cut")[list(kinds)].mean()
        marks, lines = [], []
        for kind, (name, tint) in kinds.items():
            own = shares[kind].dropna()
            axes.plot(own.index, own, "o-", color=tint, linewidth=2, markersize=5, clip_on=False)
            if len(own):
                marks.append(Mark(own.index[len(own) // 2], own.iloc[len(own) // 2], name, tint))
                lines.append(np.column_stack([own.index, own]))
        axes.set_xticks(shares.index)
        axes.margins(x=0.12)
        axes.set_ylim(0, 105)
        axes.set_xlabel("Layers at the edge", fontsize=9.5)
        least = math.floor(shares["search"].min() + 1e-9) if shares["search"].notna().any() else None
        finds = "" if least is None else f"\nsearch finds {'all' if least == 100 else f'{least} % or more'}"
        style_axes(axes, wire + finds)
        drawn.append((axes, marks, lines))
    panels[0].set_ylabel("Tokens of the prompt read back (%)", fontsize=9.5)
    stamp(figure, found if "fast" in found else None)
    for axes, marks, lines in drawn:
        label_marks(axes, marks, lines)
    return figure


# An outage


def outage(
    seconds: Sequence[float], by: Sequence[str], milliseconds: Sequence[float], begin_s: float, end_s: float
) -> Chart:
    """Requests one after the other through an outage, which is shaded: a point for each, coloured by who answered.

    seconds: when each was asked. by: "edge", "cloud" or "nobody". milliseconds: until its answer; one that is NaN is
    counted and not drawn. begin_s, end_s: of the outage, on the clock of `seconds`. Raises NothingToDraw where no
    request has a time.
    """
    table = pd.DataFrame(
        {"s": np.asarray(seconds, float), "by": list(by), "ms": np.asarray(milliseconds, float)}
    )
    shown = table[np.isfinite(table[["s", "ms"]]).all(axis=1)]
    if shown.empty:
        raise NothingToDraw("no request has a time; ask some through an outage first")
    figure = new_chart(9, 4.2)
    axes = figure.subplots()
    scale_axis(axes, "y", shown["ms"])
    marks = []
    for name, own in shown.groupby("by", sort=False):
        tint = ANSWERED_BY.get(name, GREY)
        axes.plot(own["s"], own["ms"], "o", color=tint, markersize=6, alpha=0.8, zorder=3)
        middle = own.iloc[(own["ms"] - own["ms"].median()).abs().argmin()]
        marks.append(Mark(middle["s"], middle["ms"], f"{name}: {len(own)}", tint, bold=True))
    axes.axvspan(begin_s, end_s, color="#ececec", zorder=0, linewidth=0)
    axes.annotate("outage", ((begin_s + end_s) / 2, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top",
                  fontsize=9, color=GREY)  # fmt: skip
    axes.margins(x=0.04, y=0.2)
    axes.set_xlabel("Asked at (s)", fontsize=9.5)
    axes.set_ylabel("Time of a request (ms), lower is better", fontsize=9.5)
    within = table[table["s"].between(begin_s, end_s)]
    answered = within["by"].isin(["edge", "cloud"]).sum()
    style_axes(
        axes,
        f"During the outage {answered} of {len(within)} requests were answered"
        if len(within)
        else "No request was asked during the outage",
    )
    lost = len(table) - len(shown)
    stamp(figure, notes=[f"Not drawn, because without a time: {lost}."] if lost else [])
    label_marks(
        axes, marks, [shown[["s", "ms"]].iloc[[place, place]].to_numpy() for place in range(len(shown))]
    )
    return figure
