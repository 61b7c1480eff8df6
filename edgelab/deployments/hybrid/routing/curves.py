"""Routing between edge and cloud: what sending the doubtful requests away buys, for every share that is sent.

A request goes to the cloud when its score is below a threshold. With the threshold, the share sent grows from 0 to 1
and accuracy from the edge's to the cloud's; how soon it grows is what a score is worth:

    PGR(c) = (accuracy(c) - weak) / (strong - weak)              performance gap recovered at a cloud share c
    APGR   = (area - weak area) / (strong area - weak area)      its mean over all c: 0.5 for routing at random
    CPT(x) = the smallest share c with PGR(c) >= x               call-performance threshold

Ong et al. 2024 (RouteLLM), arXiv:2406.18665. An oracle that knows who is right can exceed 1, because it keeps what
only the edge gets right.

Requests of equal score are sent together or not at all; between the two, curves are straight, which is what sending a
share of them drawn at random gives on average. So a score that is the same for all is routing at random.

Shares, accuracies and right answers are of the same items: `edge_right`, `cloud_right` (items,) bool, `score`
(items,) float, higher for surer. Intervals are those of `gap.py`: edge, cloud and score of an item stay together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu

from edgelab.deployments.hybrid.routing.gap import (
    RESAMPLES,
    Estimate,
    Gap,
    RoutingError,
    estimate,
    gap_in,
    items_of,
    scores_of,
    weights_of,
)

_ROUNDING = 1e-12  # of shares


class GapError(RoutingError):
    """Edge and cloud are too close for the share of their gap to mean anything."""


# Curves


@dataclass(frozen=True)
class Curve:
    """Accuracy by share of requests sent, (points,) each, from none to all. threshold: below which they are sent."""

    share: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    threshold: NDArray[np.float64]


def curve(edge_right: ArrayLike, cloud_right: ArrayLike, score: ArrayLike) -> Curve:
    """A point for every threshold that changes something: none sent, then each score's items with those below it."""
    edge, cloud, score = items_of(edge_right, cloud_right, score)
    share, accuracy = _curves(edge, cloud, score, np.ones((1, len(score))))
    return Curve(share[0], accuracy[0], np.concatenate([[-np.inf], np.unique(score)[1:], [np.inf]]))


def _curves(
    edge: NDArray, cloud: NDArray, score: NDArray, weights: NDArray
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares and accuracies, (resamples, points), where items count as often as `weights`, (resamples, items), say."""
    order = np.argsort(score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of the items of each score
    total = weights.sum(1, keepdims=True)
    sent = (weights[:, order].cumsum(1)[:, last]) / total
    gained = ((weights * (cloud - edge))[:, order].cumsum(1)[:, last]) / total
    none = np.zeros_like(total)
    return np.hstack([none, sent]), (weights @ edge)[:, None] / total + np.hstack([none, gained])


def pgr(share: NDArray, accuracy: NDArray, at: float) -> NDArray[np.float64]:
    """Performance gap recovered at a cloud share, (...), of curves (..., points) that go from share 0 to 1."""
    after = np.maximum((share >= at - _ROUNDING).argmax(-1), 1)[..., None]
    low, high = np.take_along_axis(share, after - 1, -1), np.take_along_axis(share, after, -1)
    part = np.divide(at - low, high - low, out=np.ones_like(low), where=high > low)
    before = np.take_along_axis(accuracy, after - 1, -1)
    found = before + part * (np.take_along_axis(accuracy, after, -1) - before)
    return ((found - accuracy[..., :1]) / (accuracy[..., -1:] - accuracy[..., :1]))[..., 0]


def apgr(share: NDArray, accuracy: NDArray) -> NDArray[np.float64]:
    """Average performance gap recovered, (...), of curves (..., points): areas by trapezoids."""
    area = np.trapezoid(accuracy, share, axis=-1)
    weak, strong = accuracy[..., 0], accuracy[..., -1]
    return (area - weak) / (strong - weak)


def cpt(share: NDArray, accuracy: NDArray, level: float) -> NDArray[np.float64]:
    """The smallest cloud share that recovers `level` of the gap, (...); infinity where none does."""
    weak, strong = accuracy[..., :1], accuracy[..., -1:]
    recovered = (accuracy - weak) / (strong - weak)
    reached = recovered >= level - _ROUNDING
    first = reached.argmax(-1)[..., None]
    before = np.maximum(first - 1, 0)
    low, high = np.take_along_axis(recovered, before, -1), np.take_along_axis(recovered, first, -1)
    part = np.divide(level - low, high - low, out=np.ones_like(low), where=high > low)
    begin = np.take_along_axis(share, before, -1)
    found = begin + part * (np.take_along_axis(share, first, -1) - begin)
    return np.where(reached.any(-1), found[..., 0], np.inf)


# What a score recovers of it


class Recovery:
    """What routing by a score recovers of the gap between edge and cloud, with intervals.

    Raises GapError where the gap is not clear of zero, with the items that would show it: a share of nothing means
    nothing. Resamples in which the cloud is not better count as lying on either side of an interval.
    """

    def __init__(
        self,
        edge_right: ArrayLike,
        cloud_right: ArrayLike,
        score: ArrayLike,
        groups: ArrayLike | None = None,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        edge, cloud, score = items_of(edge_right, cloud_right, score)
        weights = weights_of(len(edge), groups, resamples, seed)
        self.gap = gap_in(edge, cloud, weights)
        if not self.gap.clear:
            raise GapError(_too_close(self.gap))
        self.curve = curve(edge, cloud, score)
        self._drawn = _curves(edge, cloud, score, weights)
        self._unknown = self._drawn[1][:, -1] - self._drawn[1][:, 0] <= _ROUNDING

    def pgr(self, share: float) -> Estimate:
        """Of the gap at one share of requests sent."""
        if not 0 <= share <= 1:
            raise RoutingError(f"A cloud share of {share} is none; it should be 0 to 1.")
        return self._estimate(pgr, share)

    def apgr(self) -> Estimate:
        """Of the gap on average over all shares; 0.5 is random."""
        return self._estimate(apgr)

    def cpt(self, level: float) -> Estimate:
        """The smallest share of requests that recovers so much; infinity where none does."""
        return self._estimate(cpt, level)

    def lead(self, other: Recovery) -> Estimate:
        """APGR less that of another score of the same items, from the same resamples: whether one of them is better."""
        if len(self._unknown) != len(other._unknown) or self.gap != other.gap:
            raise RoutingError("Two scores are compared on the same items, groups and resamples.")
        with np.errstate(divide="ignore", invalid="ignore"):
            values = apgr(*self._drawn) - apgr(*other._drawn)
        value = self.apgr().value - other.apgr().value
        return estimate(value, values, self._unknown)

    def _estimate(self, function: Callable[..., NDArray], *given: float) -> Estimate:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = function(*self._drawn, *given)
        value = float(function(self.curve.share, self.curve.accuracy, *given))
        return estimate(value, values, self._unknown)


def _too_close(found: Gap) -> str:
    said = (
        f"The cloud gets {100 * found.value:+.1f} points more of {found.items} items right than the edge "
        f"({100 * found.low:+.1f} to {100 * found.high:+.1f}), which is not clear of zero, so that a share of it means "
        "nothing; "
    )
    if found.needed is None:
        return said + "give a cloud that is better on these items."
    return said + f"about {found.needed:,} items would show such a gap."


def compare(edge_right: ArrayLike, cloud_right: ArrayLike, scores: Mapping[str, ArrayLike]) -> pd.DataFrame:
    """What each score knows and what routing by it recovers, a row each, the highest APGR first.

    Columns AUC, the probability that a right answer of the edge scores higher than a wrong one (NaN where all are of
    one kind), APGR with its interval low and high, and half_at, the share sent that recovers half of the gap. Raises
    GapError as `Recovery` does.
    """
    right = np.asarray(edge_right, dtype=bool)
    pairs, rows = right.sum() * (~right).sum(), {}
    for name, score in scores.items():
        found, known = Recovery(right, cloud_right, score), np.asarray(score)
        average = found.apgr()
        above = mannwhitneyu(known[right], known[~right]).statistic / pairs if pairs else math.nan
        rows[name] = {
            "AUC": above, "APGR": average.value, "low": average.low, "high": average.high,
            "half_at": found.cpt(0.5).value,
        }  # fmt: skip
    return pd.DataFrame(rows).T.sort_values("APGR", ascending=False)


# Routes to compare with


def oracle(edge_right: ArrayLike, cloud_right: ArrayLike) -> NDArray[np.float64]:
    """The score of who knows both answers, (items,): first what only the cloud gets right, last what only the edge."""
    edge, cloud, _ = items_of(edge_right, cloud_right)
    return edge - cloud


def at_random(items: int, seed: int = 0) -> NDArray[np.float64]:
    """A score that knows nothing, (items,)."""
    return np.random.default_rng(seed).random(items)


# Thresholds, chosen on one part of the items to be used on others


def held_out(
    items: int, share: float = 0.5, groups: ArrayLike | None = None, seed: int = 0
) -> NDArray[np.bool_]:
    """Which items thresholds, calibrations and routers are made on, (items,); the others measure them.

    Groups stay whole; `share` is that of the groups, at least one of them on each side.
    """
    names = np.arange(items) if groups is None else np.asarray(groups)
    found = np.unique(names)
    if names.shape != (items,) or len(found) < 2 or not 0 < share < 1:
        raise RoutingError(
            f"{items} items in {len(found)} groups cannot be cut at {share}; give two groups or more, and a share "
            "between 0 and 1."
        )
    count = min(max(round(share * len(found)), 1), len(found) - 1)
    return np.isin(names, np.random.default_rng(seed).permutation(found)[:count])


def threshold_for_share(score: ArrayLike, share: float) -> float:
    """The highest threshold that sends at most a share of these requests; fewer are sent where scores are equal.

    -inf sends none and inf sends all, whatever comes later.
    """
    score = np.sort(scores_of(score))
    if not 0 <= share <= 1:
        raise RoutingError(f"A cloud share of {share} is none; it should be 0 to 1.")
    count = math.floor(share * len(score) + _ROUNDING * len(score))
    if count in (0, len(score)):
        return math.inf if count else -math.inf
    return float(score[count])


def threshold_for_accuracy(
    edge_right: ArrayLike, cloud_right: ArrayLike, score: ArrayLike, accuracy: float
) -> float:
    """The threshold with the smallest cloud share whose accuracy on these items is at least the one asked for.

    Raises RoutingError with the best there is. Chosen on the items at hand it promises a little too much: measure it
    on others.
    """
    found = curve(edge_right, cloud_right, score)
    enough = found.accuracy >= accuracy - _ROUNDING
    if not enough.any():
        best = found.accuracy.argmax()
        raise RoutingError(
            f"No threshold reaches an accuracy of {accuracy:.3f}; the best is {found.accuracy[best]:.3f} at a cloud "
            f"share of {found.share[best]:.2f}."
        )
    return float(found.threshold[enough.argmax()])


def routed(
    edge_right: ArrayLike, cloud_right: ArrayLike, score: ArrayLike, threshold: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which requests are sent, and which answers are right in the end, (items,) each."""
    edge, cloud, score = items_of(edge_right, cloud_right, score)
    sent = score < threshold
    return sent, np.where(sent, cloud, edge).astype(bool)
