"""The gap in accuracy between edge and cloud, and how sure it is: resamples of the items that both have answered.

Intervals are 95 %, from resamples in which all that is known of an item stays together; `groups` (items,) names what
belongs together, such as the story, and whole groups are drawn then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from edgelab.errors import EdgeLabError

RESAMPLES = 2000
POWER = 0.8


class RoutingError(EdgeLabError):
    """Items that do not belong together, or a goal that no threshold reaches."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """Accuracy of the cloud less that of the edge. changed: share of the items that only one of them gets right."""

    value: float
    low: float
    high: float
    changed: float
    items: int

    @property
    def clear(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0

    @property
    def needed(self) -> int | None:
        """Independent items that show such a gap at 80 % power; None where the cloud is not better at all."""
        return items_needed(self.value, self.changed) if self.value > 0 else None


def items_needed(difference: float, changed: float, power: float = POWER) -> int:
    """Items that show a difference in accuracy: (z_0.975 + z_power)^2 d / g^2, 7.85 d / g^2 at 80 %.

    difference: g, above 0; changed: d, the share of items that only one of the two gets right. McNemar's test, with
    the variance at its upper bound (Connor 1987).
    """
    if not 0 < difference <= changed <= 1:
        raise RoutingError(
            f"A difference of {difference:.3g} needs a share of changed items from there to 1, and it is {changed:.3g}."
        )
    return math.ceil((ndtri(0.975) + ndtri(power)) ** 2 * changed / difference**2)


def gap(
    edge_right: ArrayLike,
    cloud_right: ArrayLike,
    groups: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Gap:
    """How much better the cloud is, item by item."""
    edge, cloud, _ = items_of(edge_right, cloud_right)
    return gap_in(edge, cloud, weights_of(len(edge), groups, resamples, seed))


def gap_in(edge: NDArray, cloud: NDArray, weights: NDArray) -> Gap:
    """The same where each resample counts items as often as `weights`, (resamples, items), say."""
    values = weights @ (cloud - edge) / weights.sum(1)
    found = estimate(float((cloud - edge).mean()), values)
    return Gap(found.value, found.low, found.high, float((cloud != edge).mean()), len(edge))


def weights_of(
    items: int, groups: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """How often each item is drawn in each resample with replacement, (resamples, items)."""
    names = np.arange(items) if groups is None else np.asarray(groups)
    if names.shape != (items,):
        raise RoutingError(f"Groups of shape {names.shape} do not name the group of each of {items} items.")
    place = np.unique(names, return_inverse=True)[1]
    count = place.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    return drawn[:, place].astype(np.float64)


def estimate(value: float, values: NDArray, unknown: NDArray | None = None) -> Estimate:
    """A value and the 2.5 % and 97.5 % points of its resamples. unknown: resamples that may lie on either side."""
    low, high = values, values
    if unknown is not None:
        low, high = np.where(unknown, -np.inf, values), np.where(unknown, np.inf, values)
    return Estimate(
        value,
        float(np.quantile(low, 0.025, method="lower")),
        float(np.quantile(high, 0.975, method="higher")),
    )


def items_of(
    edge_right: ArrayLike, cloud_right: ArrayLike, score: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Right answers and scores as floats, (items,) each, scores 0 where there are none. Raises RoutingError."""
    edge, cloud = np.asarray(edge_right, dtype=np.float64), np.asarray(cloud_right, dtype=np.float64)
    score = np.zeros(len(edge)) if score is None else scores_of(score)
    if not edge.shape == cloud.shape == score.shape or edge.ndim != 1 or not len(edge):
        raise RoutingError(
            f"Right answers of the edge {edge.shape}, of the cloud {cloud.shape} and scores {score.shape} should be of "
            "the same items, one each."
        )
    return edge, cloud, score


def scores_of(score: ArrayLike) -> NDArray[np.float64]:
    """Scores as floats. Raises RoutingError for none, and for what is not finite."""
    score = np.asarray(score, dtype=np.float64)
    if not score.size or not np.isfinite(score).all():
        raise RoutingError("Scores have to be finite numbers, one for each item.")
    return score
