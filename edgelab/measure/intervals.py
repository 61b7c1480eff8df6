"""Student's 95 % interval of a mean, and of paired differences to the baseline.

Two recipes that are measured on the same windows share what is hard about them, so that their difference is known
far better than either: windows (or stories) are compared one by one, and the spread of those differences counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from edgelab.errors import EdgeLabError


class PairingError(EdgeLabError):
    """Two measurements that do not belong to the same windows or items."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; both ends are nan where one value alone gives no spread."""

    mean: float
    low: float
    high: float

    def fields(self, name: str) -> dict[str, float | None]:
        """The mean and its ends as fields of a row: `name`, `name_low`, `name_high`, None for what is nan."""
        values = {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}
        return {field: None if math.isnan(value) else value for field, value in values.items()}


def paired(candidate: Sequence[float], baseline: Sequence[float], weights: Sequence[float]) -> Interval:
    """Mean difference to the baseline per unit of weight, with Student's interval over clusters.

    candidate, baseline: the sum over each cluster, such as a window or a story; weights: what each cluster counts,
    such as its tokens or items. What belongs to one cluster may depend on each other, so that only differences of
    whole clusters enter the variance. Raises PairingError where the clusters are not the same.
    """
    if not len(candidate) == len(baseline) == len(weights):
        raise PairingError(
            f"The baseline has {len(baseline)} windows and the candidate {len(candidate)}; measure both alike."
        )
    weight = np.asarray(weights, dtype=np.float64)
    difference = np.asarray(candidate, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    total, n = weight.sum(), len(weight)
    mean = float(difference.sum() / total)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    # Variance of a weighted mean; with equal weights this is the usual s / sqrt(n).
    error = math.sqrt(n / (n - 1) * float(np.sum(((difference - mean * weight) / total) ** 2)))
    reach = float(stdtrit(n - 1, 0.975)) * error
    return Interval(mean, mean - reach, mean + reach)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's interval."""
    return paired(values, np.zeros(len(values)), np.ones(len(values)))


def accuracy(name: str, right: list[list[bool]], baseline: str | None) -> dict[str, float | int | str | None]:
    """Fields `name`, `name_items` and `name_right` of a row, and the paired ones where the baseline has answers.

    right: for each cluster, in order, whether each of its items was answered rightly. baseline: the field
    `name_right` of the baseline, from the same items. Paired are the difference in accuracy with its interval, and
    McNemar's counts: `name_lost` items that the baseline alone got, `name_won` that it did not.
    """
    count = sum(map(len, right))
    found: dict[str, float | int | str | None] = {
        name: sum(map(sum, right)) / count if count else None,
        f"{name}_items": count,
        f"{name}_right": " ".join("".join("01"[answer] for answer in cluster) for cluster in right),
    }
    if baseline is None or not count:
        return found
    theirs = [[answer == "1" for answer in cluster] for cluster in baseline.split(" ")]
    if list(map(len, theirs)) != list(map(len, right)):
        raise PairingError(
            f"The baseline's {sum(map(len, theirs))} items of {name} are not these {count}; measure both alike."
        )
    both = [(mine, other) for mine, other in zip(right, theirs, strict=True) if mine]
    sums = (
        [sum(mine) for mine, _ in both],
        [sum(other) for _, other in both],
        [len(mine) for mine, _ in both],
    )
    pairs = [pair for mine, other in both for pair in zip(mine, other, strict=True)]
    return (
        found
        | paired(*sums).fields(f"delta_{name}")
        | {
            f"{name}_lost": pairs.count((False, True)),
            f"{name}_won": pairs.count((True, False)),
        }
    )
