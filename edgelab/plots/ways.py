"""Rows of edge and cloud together: what each way to answer requests reaches and takes, and what policies let out."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from edgelab.errors import listed
from edgelab.notation import split
from edgelab.plots.choosing import MOST_LABELS
from edgelab.plots.hybrid import CLOUD, EDGE
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import (
    BADGE_MARKERS,
    FAMILY_COLOURS,
    GREY,
    SAME_SPEED,
    Chart,
    NothingToDraw,
    Rows,
    as_frame,
    cautions,
    drawable,
    label,
    legend_handles,
    new_chart,
    scale_axis,
    stamp,
    style_axes,
)

POLICY_COLOURS = {"edge": EDGE, "local": "#44AA99", "redact": FAMILY_COLOURS["hybrid"], "cloud": CLOUD}
AROUND = 5 * np.array([(-1, -1), (1, 1), (-1, 1), (1, -1)])  # pixels that a marker without a name takes
WAY_COLOURS = {
    "edge": EDGE,
    "cloud": CLOUD,
    "cascade": FAMILY_COLOURS["hybrid"],
    "speculative": FAMILY_COLOURS["lora"],
    "split": FAMILY_COLOURS["qat"],
}


def policies(rows: Rows) -> Chart:
    """What each policy of `@ redact` lets out, against the questions answered rightly, with the time of one.

    rows: of the measurement `privacy`. Bars are Wilson's 95 % intervals where the row says how many questions there
    were. Raises NothingToDraw where no row has leaked_share and private_right.
    """
    drawn, notes, frame = _measured(rows, ["leaked_share", "private_right"], "privacy", "@ redact")
    drawn = drawn.assign(policy=[deployed(recipe)[2].get("policy", "redact") for recipe in drawn["recipe"]])
    figure = new_chart(7.5, 5.0)
    axes = figure.subplots()
    marks, lines = [], []
    for (_, row), name in zip(drawn.iterrows(), _apart(drawn, drawn["policy"]), strict=True):
        x, y = 100 * row["leaked_share"], 100 * row["private_right"]
        tint = POLICY_COLOURS.get(row["policy"], GREY)
        ends = _wilson(row["private_right"], _asked(row["private"]))
        if ends:
            axes.vlines(x, *ends, color=tint, linewidth=1, alpha=0.5)
            lines.append(np.column_stack([[x, x], ends]))
        _point(axes, x, y, tint, row)
        ms = row["private_ms_p50"]
        marks.append(
            Mark(x, y, name + (f", {ms:,.0f} ms" if np.isfinite(ms) else ""), tint, (not row["reader"],))
        )
    axes.set_xlim(-5, 105)
    axes.margins(y=0.2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(
        "Data with a form (e-mail, phone, card, IBAN, IP) that leaves (%), lower is better", fontsize=9.5
    )
    axes.set_ylabel("Questions answered rightly (%), higher is better", fontsize=9.5)
    alone = drawn.drop_duplicates("policy", keep=False).set_index("policy")
    title = "What leaves the device, and what that buys"
    if {"redact", "cloud"} <= set(alone.index):
        less, all_of_it = alone.loc["redact"], alone.loc["cloud"]
        title = (
            f"Redacted, {100 * less['leaked_share']:.0f} % of data with a form leaves and "
            f"{100 * less['private_right']:.0f} % is right;\n"
            f"unredacted, {100 * all_of_it['leaked_share']:.0f} % and {100 * all_of_it['private_right']:.0f} %"
        )
    style_axes(axes, title, _sources(drawn))
    stamp(figure, frame, [*notes, *cautions(drawn.assign(ungated=False), ["private_ms_p50"])])
    label_marks(axes, marks, lines)
    return figure


def ways(rows: Rows) -> Chart:
    """Right answers against the median time of a request, a line from each point to its 95 % time.

    rows: of the measurement `requests`. Named are all of a dozen; of more some of each kind, first those that no other
    row beats in both. Raises NothingToDraw where no row has requests and request_ms_p50.
    """
    drawn, notes, frame = _measured(rows, ["requests", "request_ms_p50"], "requests", "@ cascade")
    kinds = [
        "edge" if _is_edge_alone(row) else deployed(row["recipe"])[1]  # a cascade that sends nothing
        for _, row in drawn.iterrows()
    ]
    drawn = drawn.assign(kind=[kind if kind in WAY_COLOURS else "edge" for kind in kinds])
    names = _apart(drawn, drawn.apply(_way, axis=1))
    p50, p95 = drawn["request_ms_p50"], drawn["request_ms_p95"]
    right = 100 * drawn["requests"]
    front = [not ((p50 < ms) & (right >= share) | (p50 <= ms) & (right > share)).any()
             for ms, share in zip(p50, right, strict=True)]  # fmt: skip
    first = drawn.assign(behind=~np.array(front)).sort_values("behind", kind="stable")
    turn = first.groupby("kind").cumcount()  # one of each kind before the second of any
    named = set(turn.sort_values(kind="stable").index[:MOST_LABELS])

    figure = new_chart(8.5, 5.0)
    axes = figure.subplots()
    scale_axis(axes, "x", pd.concat([p50, p95.dropna()]))
    axes.margins(0.1)
    marks, lines, bare = [], [], []
    for place, (index, row) in enumerate(drawn.iterrows()):
        x, y, tint = row["request_ms_p50"], 100 * row["requests"], WAY_COLOURS[row["kind"]]
        if np.isfinite(row["request_ms_p95"]):
            axes.plot([x, row["request_ms_p95"]], [y, y], color=tint, linewidth=1, alpha=0.6, zorder=3)
            lines.append(np.array([(x, y), (row["request_ms_p95"], y)]))
        _point(axes, x, y, tint, row)
        if index in named:
            marks.append(Mark(x, y, names[place], tint, rank=(not front[place], not row["reader"])))
        else:
            bare.append((x, y))
    axes.set_xlabel(
        "Time of a request (ms): median, and line to the 95 % point; lower is better", fontsize=9.5
    )
    axes.set_ylabel("Answered rightly (%), higher is better", fontsize=9.5)
    axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    title = "Right answers against the time of a request"
    if len(drawn) > 1:
        best = np.lexsort([p50, -right])[0]
        alike = int((right == right.iloc[best]).sum())
        title = f"Most often right: {names[best]}, {right.iloc[best]:.1f} % in {p50.iloc[best]:,.0f} ms"
        if alike > 1:
            title += f", the quickest of {alike}"
    style_axes(axes, title, _sources(drawn))
    widest = [ends[1] - ends[0] for ends in map(_wilson, drawn["requests"], drawn["requests_items"]) if ends]
    if widest:
        notes.append(
            f"The share of a row alone is known to ± {max(widest) / 2:.0f} points; rows of the same requests are "
            "compared one by one, as delta_requests says."
        )
    stamp(figure, frame, [*notes, *cautions(drawn.assign(ungated=False), ["requests", "request_ms_p50"])])
    figure.draw_without_rendering()
    pixels = axes.transData
    lines += [pixels.inverted().transform(pixels.transform(point) + AROUND) for point in bare]
    label_marks(axes, marks, lines)
    return figure


def _way(row: pd.Series) -> str:
    """A way of answering in few words: edge only, cloud only, cascade with 30 % sent, drafts of 4, split behind 5."""
    _, kind, settings = deployed(row["recipe"])
    if _is_edge_alone(row):
        return "edge only"
    if kind == "cloud":
        return "cloud only"
    if kind == "cascade":
        share = row["cloud_share"] if np.isfinite(row["cloud_share"]) else float(settings.get("share", 0.3))
        return f"cascade, {100 * share:.0f} % in the cloud"
    if kind == "speculative":
        more = [word for word in ("adaptive", "pipelined") if settings.get(word) == "true"]
        return ", ".join([f"drafts of {settings.get('draft', 4)}", *more])
    if kind == "split":
        return f"split behind layer {settings.get('cut', 5)}"
    return "edge only"


def _is_edge_alone(row: pd.Series) -> bool:
    """Whether the cloud was not asked at all; one that was asked in vain is another way."""
    return row["cloud_share"] == 0 and not row["alone_share"] > 0 and not row["unanswered_share"] > 0


# Rows of deployments


def _measured(
    rows: Rows, metrics: list[str], only: str, at: str
) -> tuple[pd.DataFrame, list[str], pd.DataFrame]:
    """Rows that hold the metrics, sentences about those left out, and all of them. Raises NothingToDraw."""
    frame = as_frame(rows)
    if not (np.isfinite(frame[metrics]).all(axis=1) & (frame["status"] == "ok")).any():
        raise NothingToDraw(
            f"none of the {len(frame)} rows has {listed(metrics)}: measure a recipe that ends in {at} with "
            f'only="{only}"'
        )
    return *drawable(frame, metrics, only, [*SAME_SPEED, "seed"]), frame


def deployed(recipe: str) -> tuple[str, str, dict[str, str]]:
    """The techniques of a recipe, the name of its deployment, "torch" where none is given, and its settings as text."""
    techniques, at = [*split(recipe, "@"), "torch"][:2]
    name, _, settings = at.partition(":")
    pairs = (pair.partition("=") for pair in split(settings, ",") if pair)
    return techniques, name, {key: value for key, _, value in pairs}


def _apart(drawn: pd.DataFrame, names: pd.Series) -> list[str]:
    """The names of rows; those that are equal get what tells them apart: link, techniques, score, wire, machine."""
    parts = [deployed(recipe) for recipe in drawn["recipe"]]
    columns = {
        "link": [settings.get("link", "") for *_, settings in parts],
        "techniques": [label(techniques) for techniques, *_ in parts],
        **{
            key: [settings.get(key, "") for *_, settings in parts]
            for key in ("cloud", "score", "wire", "edge")
        },
        "host": drawn["host"],
    }
    found = pd.Series(list(names), index=drawn.index)
    for column in columns.values():
        values = pd.Series(list(column), index=drawn.index)
        for name in found[found.duplicated()].unique():
            same = found == name
            if values[same].nunique() > 1:
                found[same] += values[same].map(lambda value: f", {value}" if value else "")
    return found.tolist()


def _point(axes: Axes, x: float, y: float, tint: str, row: pd.Series) -> None:
    """A row in the colour of its way; the marker says the badge, small and pale means measured by the project."""
    axes.scatter(x, y, s=70 if row["reader"] else 30, color=tint, marker=BADGE_MARKERS.get(row["badge"], "o"),
                 alpha=1 if row["reader"] else 0.75, edgecolor="white", linewidth=0.6, zorder=4,
                 clip_on=False)  # fmt: skip


def _sources(drawn: pd.DataFrame) -> list[Line2D]:
    """Handles for the reader's rows and the project's where there are both."""
    return legend_handles(drawn.assign(family="", badge=""))


def _asked(private: object) -> float:
    """How many questions the JSON of a row speaks of; NaN where it does not say."""
    try:
        return float(json.loads(str(private))["items"])
    except (ValueError, KeyError, TypeError):
        return math.nan


def _wilson(share: float, items: float) -> tuple[float, float] | None:
    """Wilson's 95 % interval of a share of items in percent; None where it is not known how many there are."""
    from scipy.stats import binomtest

    if not items >= 1:
        return None
    found = binomtest(round(share * items), int(items)).proportion_ci(method="wilson")
    return 100 * found.low, 100 * found.high
