"""Saved answers routed anew: any threshold over two rows, and any link in the place of the one that was measured.

A row of the edge alone and one of the cloud alone say of every request who was right and what it took. A cascade adds
to them nothing but the choice, so that each threshold can be answered without asking anybody again:

    right = the cloud's where score < threshold, the edge's elsewhere
    ms    = the edge's, and the cloud's own behind it where score < threshold
    bytes = those of the cloud's row * share sent, and so for what the cloud costs

Over another link the same requests are predicted from bytes and round trips, which is what `Link.up_s` counts by:

    ms' = ms - way(old) + way(new),  way = 8 * sent / up + 8 * received / down + exchanges * round trip

Bytes are those of the mean request, and jitter, loss and outages are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelab import network, tasks
from edgelab.deployments.hybrid.routing.curves import routed, threshold_for_share
from edgelab.deployments.hybrid.routing.gap import RoutingError
from edgelab.devices.prices import prices
from edgelab.errors import listed
from edgelab.measure.requests import WARM

_ROUNDING = 1e-12  # of shares


@dataclass(frozen=True)
class Served:
    """What became of the requests of a row, in their order: right, sent, ms, edge_ms and each of scores are (items,).

    sent: answered by the cloud, bool. ms: from the question to the answer; edge_ms: of it, the edge's computing.
    scores: how sure the edge was, by name. Of the mean request: sent_bytes, received_bytes, usd_per_1k, and edge_j,
    None where no power was named. link: its name, empty for none. exchanges: round trips of a request that is sent.
    predicted: whether the times are those of another link than the measured one. alone_share: of requests that the
    edge answered for want of the cloud. answered: by either of them, (items,), None where all are.
    """

    right: NDArray[np.bool_]
    sent: NDArray[np.bool_]
    ms: NDArray[np.float64]
    edge_ms: NDArray[np.float64]
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    sent_bytes: float = 0.0
    received_bytes: float = 0.0
    usd_per_1k: float = 0.0
    edge_j: float | None = None
    link: str = ""
    exchanges: float = 1.0
    predicted: bool = False
    alone_share: float = 0.0
    answered: NDArray[np.bool_] | None = None

    @property
    def accuracy(self) -> float:
        """Share of requests answered rightly."""
        return float(self.right.mean())

    @property
    def share(self) -> float:
        """Share of requests answered by the cloud."""
        return float(self.sent.mean())

    def ms_at(self, percent: float) -> float | None:
        """The time below which so many percent of the answered requests are, as in a row; None where none is."""
        ms = self.ms if self.answered is None else self.ms[self.answered]
        return float(np.percentile(ms, percent)) if ms.size else None

    @property
    def is_edge_alone(self) -> bool:
        """Whether the edge answered all requests, none of them for want of the cloud, and says how sure it was."""
        return bool(self.scores) and not self.sent.any() and not self.alone_share


def served(row: Mapping[str, Any]) -> Served:
    """The requests of a row of the ledger. Raises RoutingError for a row that does not hold them."""
    try:
        each = json.loads(row["served"])
        found = Served(
            right=_bits(row["requests_right"]),
            sent=_bits(each["sent"]),
            ms=np.array(each["ms"], float),
            edge_ms=np.array(each["edge_ms"], float),
            scores={name: np.array(values, float) for name, values in each["scores"].items()},
            sent_bytes=_number(row, "sent_bytes_per_request") or 0.0,
            received_bytes=_number(row, "received_bytes_per_request") or 0.0,
            usd_per_1k=_number(row, "usd_per_1k_requests") or 0.0,
            edge_j=_number(row, "edge_j_per_request"),
            link=row["link"] if isinstance(row["link"], str) else "",
            alone_share=_number(row, "alone_share") or 0.0,
            answered=_bits(each.get("answered", "1" * len(each["sent"]))),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RoutingError(
            f"The row of {row.get('recipe', 'no recipe')} does not say how each request was answered; measure it with "
            'only="requests".'
        ) from None
    lists = (found.right, found.sent, found.answered, found.ms, found.edge_ms, *found.scores.values())
    lengths = set(map(len, lists))
    if len(lengths) != 1 or not found.right.size:
        raise RoutingError(f"The row of {row['recipe']} speaks of {listed(sorted(lengths))} requests.")
    return replace(found, exchanges=_exchanges(str(row["runtime"]), each, found))


def _exchanges(runtime: str, each: dict[str, Any], found: Served) -> float:
    """Round trips of a request that is sent: one, the rounds of a draft, or one for each token behind a split."""
    if runtime.startswith("split"):
        return float(tasks.REQUEST_TOKENS)
    if runtime.startswith("speculative") and found.sent.any():
        return each["rounds"] / (int(found.sent.sum()) + WARM)  # those that warm up are counted, too
    return 1.0


def cascade(edge: Served, cloud: Served, score: str | ArrayLike, threshold: float) -> Served:
    """What a cascade comes to that sends what scores below a threshold, from rows of the edge and the cloud alone.

    score: the name of one of the edge's, or values (items,), higher for surer. Where the cloud of its row was asked in
    vain, a request that is sent waits as long and has the edge's answer. Deadlines other than the row's are not looked
    at. Raises RoutingError where the two rows are not of the same requests.
    """
    if isinstance(score, str):
        if score not in edge.scores:
            raise RoutingError(f"No score is called {score!r}; there are {', '.join(edge.scores) or 'none'}.")
        score = edge.scores[score]
    asked, _ = routed(edge.right, cloud.right, score, threshold)
    answered = asked & cloud.sent
    share = float(asked.mean())
    return Served(
        right=np.where(answered, cloud.right, edge.right),
        sent=answered,
        ms=edge.ms + np.where(asked, cloud.ms - cloud.edge_ms, 0.0),
        edge_ms=edge.edge_ms,
        scores=edge.scores,
        sent_bytes=share * cloud.sent_bytes,
        received_bytes=share * cloud.received_bytes,
        usd_per_1k=edge.usd_per_1k + share * cloud.usd_per_1k,
        edge_j=edge.edge_j,
        link=cloud.link,
        exchanges=cloud.exchanges,
        predicted=cloud.predicted,
        alone_share=float((asked & ~cloud.sent).mean()),
    )


def choices(edge: Served, cloud: Served, score: str, link: str) -> dict[str, Served]:
    """What an edge and a cloud can do over a link, by name: edge only, 10 to 90 % sent, cloud at once.

    Thresholds are chosen on the very requests that they route. Raises as `cascade` and `over` do.
    """
    found = {"edge only": edge}
    for percent in range(10, 100, 10):
        threshold = threshold_for_share(edge.scores[score], percent / 100)
        found[f"edge first, {percent} % sent"] = cascade(edge, cloud, score, threshold)
    found["cloud at once"] = cloud
    return {name: over(one, link) for name, one in found.items()}


def quickest(found: Mapping[str, Served], accuracy: float) -> str:
    """The name of what is quickest on average and right at least so often. Raises RoutingError where nothing is."""
    enough = {name: one.ms.mean() for name, one in found.items() if one.accuracy >= accuracy - _ROUNDING}
    if not enough:
        best = max((one.accuracy for one in found.values()), default=0.0)
        raise RoutingError(f"Nothing is right {accuracy:.1%} of the time; the best is {best:.1%}.")
    return min(enough, key=enough.__getitem__)


def over(found: Served, link: str) -> Served:
    """The same requests over another link: times predicted, data priced anew; as they are where nothing was sent.

    Where the cloud was asked in vain, times stay those of waiting for it, and are a prediction too. Raises LinkError
    for a link that nobody knows.
    """
    there = network.find(link)
    if link == found.link:
        return found
    if not found.sent.any():
        return replace(found, link=link if found.link else "", predicted=not found.is_edge_alone)
    change_ms = 1e3 * (_way_s(found, there) - _way_s(found, network.find(found.link)))
    known, n_bytes = prices().data, found.sent_bytes + found.received_bytes
    usd = n_bytes / 1e9 * (known.get(link, 0.0) - known.get(found.link, 0.0))
    return replace(
        found,
        ms=np.where(found.sent, np.maximum(found.ms + change_ms, found.edge_ms), found.ms),
        usd_per_1k=found.usd_per_1k + 1e3 * usd,
        link=link,
        predicted=True,
    )


def _way_s(found: Served, link: network.Link) -> float:
    """Seconds that a request which is sent spends on the way."""
    up, down = found.sent_bytes / found.share, found.received_bytes / found.share
    return link.up_s(up) + link.down_s(down) + (found.exchanges - 1) * link.round_trip_ms / 1e3


def _bits(text: str) -> NDArray[np.bool_]:
    """A string of 0 and 1, with or without spaces, as bool, (items,)."""
    return np.array([{"0": False, "1": True}[one] for one in text.replace(" ", "")], bool)


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row[name]
    return None if value is None or np.isnan(value) else float(value)
