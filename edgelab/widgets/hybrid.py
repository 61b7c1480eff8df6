"""When the cloud is worth the trip: ways of sharing work between edge and cloud, over saved rows."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import pandas as pd

from edgelab.deployments.hybrid.routing.curves import curve
from edgelab.deployments.hybrid.routing.gap import RoutingError
from edgelab.deployments.hybrid.routing.replay import Served, cascade, over, served
from edgelab.devices.power import estimated_j
from edgelab.devices.prices import prices
from edgelab.errors import EdgeLabError
from edgelab.network import links
from edgelab.plots.hybrid import CLOUD as IN_THE_CLOUD
from edgelab.plots.hybrid import EDGE
from edgelab.plots.style import (
    FAMILY_COLOURS,
    GREY,
    Chart,
    as_frame,
    label,
    new_chart,
    stamp,
    style_axes,
)
from edgelab.plots.ways import deployed
from edgelab.rows import NotMeasured, newest
from edgelab.widgets import WIDE, Picture

ALONE, CLOUD, CASCADE = "edge only", "cloud only", "cascade"
IN_CLOUD = "cloud"  # the deployment of the cloud alone
FURTHER = {"speculative": "drafting", "split": "split", "redact": "redact"}
ENDS = {"edge", "cloud"}  # policies that others are shown beside
DOUBT = "margin"  # what a cascade reads it from, unless it says otherwise
STEPS = 200  # of the slider, at least
POWER_W = 5.0  # of a phone's processor while it computes: assumed, no source gives it
UNCOUNTED = (
    'Some of these rows were measured before bytes, price and the times of the edge were kept; only="privacy" '
    "measures them again."
)


@dataclass(frozen=True)
class _Saved:
    """A row and what its recipe says. edge: weights and engine of the part at the edge; cloud: recipe of the other."""

    row: pd.Series
    edge: str
    kind: str
    cloud: str
    settings: dict[str, str]
    requests: Served | None  # None for a row that is about messages alone

    @classmethod
    def of(cls, row: pd.Series) -> _Saved:
        weights, kind, settings = deployed(row["recipe"])
        try:
            requests = served(row)
        except RoutingError:
            requests = None
        engine = settings.get("edge", "torch") if kind in (IN_CLOUD, CASCADE, *FURTHER) else kind
        edge = weights if engine == "torch" else f"{weights} @ {engine}"
        return cls(row, edge, kind, settings.get("cloud", "(none)")[1:-1], settings, requests)

    @property
    def is_edge_alone(self) -> bool:
        return (
            self.kind not in (IN_CLOUD, *FURTHER)
            and self.requests is not None
            and self.requests.is_edge_alone
        )

    @property
    def name(self) -> str:
        """What tells it from other rows of its way, but for the link."""
        settings = self.settings
        if self.kind == "speculative":
            more = [word for word in ("adaptive", "pipelined") if settings.get(word) == "true"]
            more += [f"temperature {settings['temperature']}"] if "temperature" in settings else []
            return ", ".join([f"{settings['draft']} tokens", *more])
        if self.kind == "split":
            return (
                f"{label(self.edge)} behind layer {settings['cut']}, {settings.get('wire', 'float16')} states"
            )
        return settings.get("policy", "redact")


@dataclass(frozen=True)
class Figures:
    """What one way comes to, a column of the table; None where it is not known.

    times, energy: where the times and the energy come from, empty for an energy that is not known.
    """

    name: str
    right: float | None = None
    share: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    sent_bytes: float | None = None
    received_bytes: float | None = None
    usd_per_1k: float | None = None
    edge_j: float | None = None
    leaked: float | None = None
    times: str = "measured"
    energy: str = ""


class Saved:
    """Rows of requests of one model and machine, by who answers: what the widget asks.

    rows: a frame of the ledger. Of several machines or models those with the most recipes count, since times of two
    machines make no sum. Raises NotMeasured, with what to measure, where the edge alone or the cloud alone is missing.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        frame = as_frame(rows)
        frame = frame[(frame["status"] == "ok") & ((frame["served"] != "") | frame["private_right"].notna())]
        where = ["model", "host", "threads", "fast"]
        if not frame.empty:
            most = frame.groupby(where, dropna=False)["recipe"].nunique().sort_values(kind="stable").index[-1]
            same = [
                (frame[name] == value) | (frame[name].isna() & pd.isna(value))
                for name, value in zip(where, most, strict=True)
            ]
            frame = newest(frame[pd.concat(same, axis=1).all(axis=1)], ["recipe", "seed"])
        self.fast = bool(frame["fast"].any())
        self.all = [_Saved.of(row) for _, row in frame.iterrows()]
        self.edges = list(dict.fromkeys(one.edge for one in self.all if one.is_edge_alone))
        shared = [one.edge for one in self.all if not one.is_edge_alone]
        self.edges.sort(
            key=lambda edge: -shared.count(edge)
        )  # first the one that most ways were measured with
        self.clouds = list(dict.fromkeys(one.cloud for one in self.all if self._is_cloud(one)))
        if not self.edges or not self.clouds:
            missing, recipe = (
                ("the edge alone", "… @ cascade:cloud=(none),link=lte,share=0")
                if not self.edges
                else ("the cloud alone", "… @ cloud:cloud=(none),link=lte")
            )
            raise NotMeasured(
                f'No row of requests has {missing}: measure "{recipe}" with only="requests" first.'
            )

    @staticmethod
    def _is_cloud(one: _Saved) -> bool:
        """Whether it is of the cloud alone; one whose cloud never answered is not."""
        return one.kind == IN_CLOUD and one.requests is not None and bool(one.requests.sent.any())

    def measured_links(self) -> list[str]:
        """Names of the links that the cloud alone was measured over."""
        return list(dict.fromkeys(one.requests.link for one in self.all if self._is_cloud(one)))

    def alone(self, edge: str) -> Served:
        """Requests that an edge has answered by itself, of a row without a choice of the score where there is one."""
        found = [one for one in reversed(self.all) if one.is_edge_alone and one.edge == edge]
        return min(found, key=lambda one: "score" in one.settings).requests

    def cloud(self, edge: str, cloud: str, link: str) -> Served:
        """Requests that a cloud has answered, over a link; predicted where they were measured over another one only.

        Raises RoutingError where they are not those that the edge answered.
        """
        found = [one for one in self.all if self._is_cloud(one) and one.cloud == cloud]
        found.sort(key=lambda one: (one.requests.link == link, one.edge == edge))  # the last one fits best
        return over(found[-1].requests, link)

    def ways(self, edge: str, cloud: str) -> list[str]:
        """What can be shown of an edge and a cloud."""
        return [
            ALONE,
            CLOUD,
            CASCADE,
            *(name for kind, name in FURTHER.items() if self.kinds(kind, edge, cloud)),
        ]

    def kinds(self, kind: str, edge: str, cloud: str) -> list[str]:
        """Names of the rows of drafting, split or redact that belong to an edge and a cloud, without the ends."""
        names = {one.name for one in self._of(kind, edge, cloud)}
        return sorted(names - ENDS if kind == "redact" else names, key=_by_number)

    def _of(self, kind: str, edge: str, cloud: str) -> list[_Saved]:
        """A split has the model of its own recipe on both sides, so that it belongs to every edge."""
        return [
            one
            for one in self.all
            if one.kind == kind and (kind == "split" or (one.edge == edge and one.cloud == cloud))
            and (one.requests is not None or kind == "redact")
        ]  # fmt: skip

    def row(self, kind: str, name: str, edge: str, cloud: str, link: str) -> _Saved | None:
        """A row by its name, of the link where there is one; None where the name is that of no row."""
        found = [one for one in self._of(kind, edge, cloud) if one.name == name]
        found.sort(key=lambda one: one.settings.get("link", "") == link)
        return found[-1] if found else None

    def cascades(self, edge: str, cloud: str, score: str) -> list[_Saved]:
        """Cascades that were measured with a score, whatever the link: the points beside the curve."""
        return [
            one
            for one in self._of(CASCADE, edge, cloud)
            if not one.is_edge_alone and one.settings.get("score", DOUBT) == score
        ]


def edge_energy(stated_j: float | None, edge_ms: Sequence[float], power_w: float) -> tuple[float | None, str]:
    """Joules at the edge for the mean request, and their basis in words.

    stated_j: what the row says, which wins; None where it was measured without a power. edge_ms: of each request, what
    the edge computed. power_w: of the edge while it computes, 0 where it is not known. Without both, None and "".
    """
    if stated_j is not None:
        return stated_j, "as the row says"
    if not power_w > 0 or not len(edge_ms):
        return None, ""
    seconds = sum(edge_ms) / len(edge_ms) / 1e3
    return estimated_j(power_w, seconds) if seconds > 0 else (0.0, "the edge does not compute")


def figures(
    name: str, found: Served, leaked: float | None = None, both: bool = False, power_w: float = 0.0
) -> Figures:
    """Figures of requests. both: whether they were put together from two rows. power_w: as in `edge_energy`."""
    times = "from both rows" if both else "measured"
    if found.predicted:
        times = "from both rows, link predicted" if both else "predicted"
    edge_j, energy = edge_energy(found.edge_j, found.edge_ms, power_w)
    return Figures(
        name, found.accuracy, found.share, found.ms_at(50), found.ms_at(95), found.sent_bytes, found.received_bytes,
        found.usd_per_1k, edge_j, leaked, times, energy,
    )  # fmt: skip


def private_figures(name: str, saved: _Saved | None, link: str, power_w: float = 0.0) -> Figures:
    """Figures of a policy: of questions about messages with personal data in them. power_w: as in `edge_energy`.

    Over another link than the measured one times are unknown, and data is priced anew.
    """
    if saved is None:
        return Figures(name, times="not measured")
    row = saved.row
    stays = row["private_cloud_share"] == 0  # nothing travels, whatever the link
    measured = saved.settings.get("link", "")
    here = stays or measured == link
    sent, received, usd = (
        _known(row[f"private_{what}"]) for what in ("sent_bytes", "received_bytes", "usd_per_1k")
    )
    if usd is not None and sent is not None and received is not None:
        per_gb = prices().data
        usd += 1e3 * (sent + received) / 1e9 * (per_gb.get(link, 0.0) - per_gb.get(measured, 0.0))
    edge_j, energy = edge_energy(_known(row["private_edge_j"]), _edge_ms(row["private"]), power_w)
    return Figures(
        name,
        right=_known(row["private_right"]),
        share=_known(row["private_cloud_share"]),
        p50_ms=_known(row["private_ms_p50"]) if here else None,
        p95_ms=_known(row["private_ms_p95"]) if here else None,
        sent_bytes=sent,
        received_bytes=received,
        usd_per_1k=usd,
        edge_j=edge_j,
        leaked=_known(row["leaked_share"]),
        times="measured" if here else f"measured over {measured} only",
        energy=energy,
    )


def _edge_ms(private: Any) -> list[float]:
    """What the edge computed for each question about a message; empty where the row does not say."""
    return json.loads(private).get("edge_ms", []) if isinstance(private, str) and private else []


def cloud_trip(rows: pd.DataFrame) -> ipywidgets.VBox:
    """Choose a link and a way of sharing work: what it comes to, beside the edge alone and the cloud alone.

    A cascade is put together anew for every threshold from the rows of the edge alone and the cloud alone. Over a link
    that was not measured, times are predicted from bytes and round trips, and said to be. Where a row says nothing of
    energy, it is estimated from the power that the reader gives the edge and the time in which the edge computes. The
    price holds the electricity of energies that rows say, and not that of estimated ones.

    rows: a frame of the ledger. Raises NotMeasured where the edge alone or the cloud alone is missing.
    """
    saved, known = Saved(rows), links()
    words = [(f"{one.name}: {one.down_mbps:g}/{one.up_mbps:g} Mbps, {one.round_trip_ms:g} ms", name)
             for name, one in known.items()]  # fmt: skip
    first = next((name for name in saved.measured_links() if name in known), "lte")
    edge = ipywidgets.Dropdown(options=[(label(one), one) for one in saved.edges], description="Edge", **WIDE)
    cloud = ipywidgets.Dropdown(
        options=[(label(one), one) for one in saved.clouds], description="Cloud", **WIDE
    )
    link = ipywidgets.Dropdown(options=words, value=first, description="Link", **WIDE)
    way = ipywidgets.Dropdown(
        options=saved.ways(edge.value, cloud.value), value=CASCADE, description="Way", **WIDE
    )
    which = ipywidgets.Dropdown(options=[], description="Which", **WIDE)
    score = ipywidgets.Dropdown(options=[], description="Doubt by", **WIDE)
    threshold = ipywidgets.FloatSlider(description="Threshold", readout_format=".3f", **WIDE)
    power = ipywidgets.BoundedFloatText(
        POWER_W, min=0, max=2000, step=0.5, description="Power of the edge, W",
        style={"description_width": "initial"}, layout=WIDE["layout"],
    )  # fmt: skip
    answer, picture = ipywidgets.HTML(), Picture(720)
    filling = False

    def fill(change: Mapping | None = None) -> None:
        """Offer what goes with the edge, the cloud, the way and the score. One redraw comes behind it, not several."""
        nonlocal filling
        if filling:
            return
        filling = True
        try:
            pair = edge.value, cloud.value
            _offer(way, saved.ways(*pair))
            kind = next((kind for kind, name in FURTHER.items() if name == way.value), "")
            _offer(which, saved.kinds(kind, *pair) if kind else [])
            _offer(score, sorted(saved.alone(edge.value).scores, key=lambda name: name != DOUBT))
            _span(threshold, saved.alone(edge.value).scores[score.value])
            _show(which, bool(kind))
            for control in (score, threshold):
                _show(control, way.value == CASCADE)
        finally:
            filling = False
        redraw()

    def redraw(change: Mapping | None = None) -> None:
        if filling:
            return
        try:
            _redraw()
        except EdgeLabError as error:
            answer.value, picture.value = html.escape(str(error)), ""

    def _redraw() -> None:
        pair = edge.value, cloud.value
        here, there = saved.alone(edge.value), saved.cloud(*pair, link.value)
        point = None
        if way.value == "redact":
            columns = [
                private_figures(name, saved.row("redact", policy, *pair, link.value), link.value, power.value)
                for name, policy in (
                    (ALONE, "edge"),
                    (f"policy {which.value}", which.value),
                    (CLOUD, "cloud"),
                )
            ]
            note = "Of questions about messages with personal data in them."
            if any(one.right is not None and one.sent_bytes is None for one in columns):
                note += f" {UNCOUNTED}"
            answer.value = table(columns, 1, note)
            picture.value = ""
            return
        note, chosen, place = "", None, {ALONE: 0, CLOUD: 1}.get(way.value)
        if way.value == CASCADE:
            both = cascade(here, there, score.value, threshold.value)
            chosen, point = figures(CASCADE, both, both=True, power_w=power.value), both
            note = (
                f"{both.share:.0%} of the requests have a score below {threshold.value:.3f} and go to the cloud; "
                f"{both.accuracy:.1%} are right in the end."
            )
        elif place is None:
            kind = next(kind for kind, name in FURTHER.items() if name == way.value)
            row = saved.row(kind, which.value, *pair, link.value)
            point = over(row.requests, link.value)
            leaked = _known(row.row["leaked_share"])
            chosen = figures(f"{way.value}, {which.value}", point, leaked, power_w=power.value)
            note = _note(kind)
        else:
            point = (here, there)[place]
        ends = [
            figures(name, found, _leaked(saved, policy, *pair), power_w=power.value)
            for name, found, policy in ((ALONE, here, "edge"), (CLOUD, there, "cloud"))
        ]
        columns = ends if chosen is None else [ends[0], chosen, ends[1]]
        answer.value = table(columns, 1 if chosen else place, note)
        measured = [(one.requests.share, one.requests.accuracy) for one in saved.cascades(*pair, score.value)]
        picture.draw(
            deferral_point(here, there, score.value, (point.share, point.accuracy), measured, saved.fast)
        )

    for control in (edge, cloud, way, score):
        control.observe(fill, "value")
    for control in (link, which, threshold, power):
        control.observe(redraw, "value")
    for control, options in ((edge, saved.edges), (cloud, saved.clouds)):
        _show(control, len(options) > 1)
    fill()
    return ipywidgets.VBox([edge, cloud, link, way, which, score, threshold, power, answer, picture])


def _leaked(saved: Saved, policy: str, edge: str, cloud: str) -> float | None:
    """Share of data with a form that leaves, where the row of the policy says it; the same over every link."""
    row = saved.row("redact", policy, edge, cloud, "")
    return None if row is None else _known(row.row["leaked_share"])


def _note(kind: str) -> str:
    return {
        "speculative": "The text is the cloud's own, token by token; a request has as many round trips as rounds.",
        "split": "Hidden states travel, from which a prompt can be read; every token costs a round trip.",
    }[kind]


def _offer(control: ipywidgets.Dropdown, options: Sequence[str]) -> None:
    """Other options, and the chosen one again where it is among them."""
    if tuple(options) == control.options:
        return
    before = control.value
    control.options = list(options)
    control.value = before if before in options else next(iter(options), None)


def _span(slider: ipywidgets.FloatSlider, values: Sequence[float]) -> None:
    """From where nothing is sent to where all is. A slider of other values begins in the middle."""
    low, high = float(min(values)), float(max(values))
    step = 10 ** math.floor(math.log10(max(high - low, 1e-9) / STEPS))
    low, high = step * math.floor(low / step), step * (math.floor(high / step) + 1)
    if (low, high) == (slider.min, slider.max):
        return
    middle = sorted(values)[len(values) // 2]
    with (
        slider.hold_trait_notifications()
    ):  # or the old value would be cut to the new ends, one after the other
        slider.min, slider.max, slider.step, slider.value = low, high, step, float(middle)


def _show(control: ipywidgets.Widget, visible: bool) -> None:
    control.layout.display = None if visible else "none"


def _known(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)


def _by_number(name: str) -> tuple[float, str]:
    first = name.split(" ")[0]
    return (float(first) if first.isdigit() else math.inf, name)


LINES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Right answers", "right", "{:.1%}".format),
    ("Answered by the cloud", "share", "{:.0%}".format),
    ("Time, median (ms)", "p50_ms", "{:,.0f}".format),
    ("Time, 95 % (ms)", "p95_ms", "{:,.0f}".format),
    ("Sent to the cloud (bytes)", "sent_bytes", "{:,.0f}".format),
    ("Received (bytes)", "received_bytes", "{:,.0f}".format),
    ("1,000 requests (USD)", "usd_per_1k", "{:.4f}".format),
    ("Energy at the edge (J)", "edge_j", "{:.2f}".format),
    ("Data with a form that leaves", "leaked", "{:.0%}".format),
)


def table(columns: Sequence[Figures], chosen: int, note: str = "") -> str:
    """HTML: a line for each quantity that is known of a way, and a column for each way.

    The chosen one's figures are in `data-` attributes.
    """
    pick = columns[chosen]
    data = "".join(
        f' data-{name}="{value:.6f}"'
        for name, value in (("right", pick.right), ("share", pick.share), ("ms", pick.p50_ms))
        if value is not None
    )

    def line(head: str, cells: Sequence[str], tag: str = "td") -> str:
        wide = "text-align:right;padding:1px 12px"
        bold = [f"<b>{cell}</b>" if place == chosen else cell for place, cell in enumerate(cells)]
        return (
            f"<tr><td>{head}</td>"
            + "".join(f'<{tag} style="{wide}">{cell}</{tag}>' for cell in bold)
            + "</tr>"
        )

    lines = [line("", [html.escape(one.name) for one in columns], "th")]
    for head, name, form in LINES:
        values = [getattr(one, name) for one in columns]
        if any(value is not None for value in values):
            lines.append(line(head, ["–" if value is None else form(value) for value in values]))
    lines.append(line("Times", [html.escape(one.times) for one in columns]))
    if any(one.energy for one in columns):
        lines.append(line("Energy", [html.escape(one.energy) or "–" for one in columns]))
    return f'<div class="edgelab-trip"{data}><table>{"".join(lines)}</table>{html.escape(note)}</div>'


def deferral_point(
    edge: Served,
    cloud: Served,
    score: str,
    point: tuple[float, float],
    measured: Sequence[tuple[float, float]] = (),
    fast: bool = False,
) -> Chart:
    """Accuracy over the share of requests that goes to the cloud, by a score, with the chosen share and accuracy.

    `plots.deferral` says what scores are worth; this one has neither resamples nor labels, and keeps up with a slider.
    point, measured: (share, accuracy) of what is chosen, and of cascades that were measured.
    """
    found = curve(edge.right, cloud.right, edge.scores[score])
    figure = new_chart(7.2, 3.6)
    axes = figure.subplots()
    tint = FAMILY_COLOURS["hybrid"]
    axes.plot(100 * found.share, 100 * found.accuracy, color=tint, linewidth=2)
    ends = found.accuracy[[0, -1]]
    axes.plot([0, 100], 100 * ends, color=GREY, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
    axes.annotate("at random", (50, 50 * ends.sum()), xytext=(4, -12), textcoords="offset points", fontsize=8,
                  color=GREY)  # fmt: skip
    for share, accuracy in measured:
        axes.plot(
            100 * share, 100 * accuracy, "D", color="white", markeredgecolor=tint, markersize=7, zorder=4
        )
    if measured:
        share, accuracy = measured[0]
        axes.annotate("measured", (100 * share, 100 * accuracy), xytext=(7, -10), textcoords="offset points",
                      fontsize=8, color=GREY)  # fmt: skip
    share, accuracy = 100 * point[0], 100 * point[1]
    axes.plot(share, accuracy, "o", color=FAMILY_COLOURS["baseline"], markersize=9, zorder=5)
    names = ((0, ALONE, "left", -15, EDGE), (-1, CLOUD, "right", 8, IN_THE_CLOUD))
    for end, name, side, above, colour in names:
        axes.plot(100 * found.share[end], 100 * ends[end], "o", color=colour, markersize=7, zorder=4)
        axes.annotate(name, (100 * found.share[end], 100 * ends[end]), xytext=(0, above), textcoords="offset points",
                      fontsize=8, ha=side, color=colour)  # fmt: skip
    axes.set_xlim(-3, 103)
    axes.margins(y=0.22)
    axes.set_xlabel("Requests that go to the cloud (%)")
    axes.set_ylabel("Right answers (%)")
    style_axes(axes, f"{share:.0f} % go to the cloud, and {accuracy:.1f} % are right")
    return stamp(figure, pd.DataFrame({"fast": [fast]}))
