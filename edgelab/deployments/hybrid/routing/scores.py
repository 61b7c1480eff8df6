"""A cascade: the edge answers, and asks the cloud when in doubt. How doubt is scored, calibrated and learned.

Scores are read off what the edge computed anyway, for the tokens by which an answer is right or wrong, and higher is
surer:

    mean       mean log-probability of the answer's tokens
    minimum    log-probability of its least likely token
    quantile   the 10 % point of its tokens: a long answer has one odd token more easily than a short one
    entropy    minus the mean entropy of the distributions that the tokens were chosen from, in nats
    margin     mean lead of the likeliest token over the second, in nats

A mean over tokens hides the one that matters and a sum favours short answers; quantiles lie between (Gupta et al.
2024, arXiv:2404.10136). `curves.py` says what a score is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, expit, log_softmax, softmax
from scipy.stats import binomtest

from edgelab.deployments.hybrid.routing.gap import RESAMPLES, Estimate, RoutingError, estimate, weights_of
from edgelab.errors import EdgeLabError, to_install

SCORES = ("mean", "minimum", "quantile", "entropy", "margin")
QUANTILE = 0.1
BINS = 10


class LearnMissing(EdgeLabError):
    """scikit-learn is not installed."""

    def __init__(self) -> None:
        super().__init__(
            f"scikit-learn, which calibrates scores, is not installed; `{to_install('hybrid')}` in the project's "
            "folder installs it."
        )


# Scores


def answer_scores(logits: ArrayLike, ids: Sequence[int], quantile: float = QUANTILE) -> dict[str, float]:
    """The scores of a written answer by name.

    logits: before each of its tokens, (time, vocabulary); ids: the tokens, (time,). All in nats.
    """
    log_probs = log_softmax(np.asarray(logits, dtype=np.float64), axis=-1)  # (time, vocabulary)
    if log_probs.ndim != 2 or not len(ids) == len(log_probs) > 0 or log_probs.shape[1] < 2:
        raise RoutingError(
            f"An answer of {len(ids)} tokens needs logits of the shape ({len(ids)}, vocabulary), at least (1, 2), not "
            f"{log_probs.shape}."
        )
    chosen = log_probs[np.arange(len(ids)), ids]
    second, first = np.partition(log_probs, -2, axis=-1)[:, -2:].T
    return {
        "mean": float(chosen.mean()),
        "minimum": float(chosen.min()),
        "quantile": float(np.quantile(chosen, quantile)),
        "entropy": -float(entr(np.exp(log_probs)).sum(-1).mean()),
        "margin": float((first - second).mean()),
    }


def choice_scores(
    candidates: Sequence[ArrayLike], sizes: Sequence[int] | None, quantile: float = QUANTILE
) -> tuple[int, dict[str, float]]:
    """Which of several continuations is chosen, and the scores of the choice by name.

    candidates: log-probabilities of each one's tokens, (tokens,) each, as `Session.continuations` gives them. sizes:
    bytes of each one: the highest log-probability per byte is chosen, and "mean" is that. None compares plain sums,
    which favour short continuations, and "mean" is the sum. "minimum" and "quantile" are of the chosen one's tokens;
    "entropy" and "margin" compare the candidates: of the distribution over them, as if all were of mean size, and the
    lead of the chosen one per byte.
    """
    if len(candidates) < 2 or (sizes is not None and (len(sizes) != len(candidates) or min(sizes) < 1)):
        raise RoutingError(
            f"{len(candidates)} candidates and {'no' if sizes is None else len(sizes)} sizes are no choice; give at "
            "least two candidates, and the bytes of each, at least 1."
        )
    tokens = [np.asarray(one, dtype=np.float64) for one in candidates]
    size = np.ones(len(tokens)) if sizes is None else np.asarray(sizes, dtype=np.float64)
    score = np.array([one.sum() for one in tokens]) / size  # (candidates,)
    chosen = int(score.argmax())
    second, first = np.sort(score)[-2:]
    return chosen, {
        "mean": float(first),
        "minimum": float(tokens[chosen].min()),
        "quantile": float(np.quantile(tokens[chosen], quantile)),
        "entropy": -float(entr(softmax(score * size.mean())).sum()),
        "margin": float(first - second),
    }


def features(scores: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
    """The scores of items as a table, (items, scores), columns in the order of SCORES."""
    return np.array([[one[name] for name in SCORES] for one in scores], dtype=np.float64)


# Calibration: from a score to a probability of being right


@dataclass(frozen=True)
class Calibration:
    """Probability of being right by score, (knots,) each: between knots straight, beyond the outer ones constant."""

    score: NDArray[np.float64]
    probability: NDArray[np.float64]

    def __call__(self, score: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, (items,)."""
        return np.interp(np.asarray(score, dtype=np.float64), self.score, self.probability)


def calibrate(score: ArrayLike, right: ArrayLike) -> Calibration:
    """The rising function of the score that fits right answers best in least squares: isotonic regression.

    score, right: (items,) of a part that is held out: on its own items it looks better than it is. It keeps the order
    of scores, but for ties, so that what routing recovers hardly changes; it makes thresholds mean something. Zadrozny
    and Elkan 2002. A right and a wrong item more at the lowest and at the highest score (Laplace's rule of succession)
    keep a few items at an end from being called always wrong or always right.
    """
    try:
        from sklearn.isotonic import IsotonicRegression
    except ImportError as error:
        raise LearnMissing from error
    score, right = _pairs(score, right)
    ends = np.repeat([score.min(), score.max()], 2)
    fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        np.append(score, ends), np.append(right, [0, 1, 0, 1])
    )
    return Calibration(fitted.X_thresholds_.astype(np.float64), fitted.y_thresholds_.astype(np.float64))


def expected_calibration_error(
    confidence: ArrayLike,
    right: ArrayLike,
    bins: int = BINS,
    groups: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean distance of confidence and accuracy over bins, weighted by their items, with an interval.

    Bins are of equal width, [0, 0.1), [0.1, 0.2), ..., [0.9, 1] for 10. The error is never negative, so that with few
    items it is above zero for perfect confidences too, and resamples lie higher still: compare with
    `error_of_perfect`. Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599.
    """
    confidence, right = _confidences(confidence, right)
    off = _by_bin(confidence, bins) * (confidence - right)[:, None]  # (items, bins)
    weights = weights_of(len(right), groups, resamples, seed)
    values = np.abs(weights @ off).sum(1) / weights.sum(1)
    return estimate(float(np.abs(off.sum(0)).sum() / len(right)), values)


def error_of_perfect(
    confidence: ArrayLike, bins: int = BINS, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The calibration error that so many items show when every confidence is exactly right: mean and 95 % range."""
    confidence, _ = _confidences(confidence, np.zeros(np.shape(confidence)))
    right = np.random.default_rng(seed).random((resamples, len(confidence))) < confidence
    values = np.abs((confidence - right) @ _by_bin(confidence, bins)).sum(1) / len(confidence)
    return estimate(float(values.mean()), values)


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> pd.DataFrame:
    """What a reliability diagram shows: for each bin that holds items, their number, confidence and accuracy.

    Columns items, confidence, accuracy, low, high: the last two are Wilson's 95 % interval of the accuracy, for items
    that do not depend on each other. Bins as in `expected_calibration_error`.
    """
    confidence, right = _confidences(confidence, right)
    member = _by_bin(confidence, bins)
    counts = member.sum(0).astype(int)
    filled = np.flatnonzero(counts)
    hits = (right @ member).astype(int)
    ends = [binomtest(int(hits[one]), int(counts[one])).proportion_ci(method="wilson") for one in filled]
    return pd.DataFrame(
        {
            "items": counts[filled],
            "confidence": (confidence @ member)[filled] / counts[filled],
            "accuracy": hits[filled] / counts[filled],
            "low": [one.low for one in ends],
            "high": [one.high for one in ends],
        }
    )


def _by_bin(confidence: NDArray, bins: int) -> NDArray[np.float64]:
    """Which bin each item is in, (items, bins) of 0 and 1."""
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.eye(bins)[place]


# A learned router


@dataclass(frozen=True)
class Router:
    """Probability that the edge is right, from all scores at once: a logistic function of standardized columns.

    mean, scale, weights: (scores,). A large weight is a score that matters beside the others.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weights: NDArray[np.float64]
    offset: float

    def __call__(self, table: ArrayLike) -> NDArray[np.float64]:
        """Probabilities, (items,), of a table (items, scores): a score to route by."""
        return expit(
            (np.asarray(table, dtype=np.float64) - self.mean) / self.scale @ self.weights + self.offset
        )


def learn_router(table: ArrayLike, edge_right: ArrayLike) -> Router:
    """A logistic regression of the edge's right answers on its scores, on a part that is held out.

    table: (items, scores), as `features` gives it; edge_right: (items,). It rarely beats the best single score: look at
    `Recovery.lead` on items that neither has seen. Raises RoutingError where all answers are right or all are wrong.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise LearnMissing from error
    table, right = np.asarray(table, dtype=np.float64), np.asarray(edge_right, dtype=bool)
    if table.ndim != 2 or right.shape != (len(table),) or not np.isfinite(table).all():
        raise RoutingError(
            f"A table of shape {table.shape} should hold finite scores, one row for each of {right.size} answers."
        )
    if right.all() or not right.any():
        raise RoutingError(
            f"All {right.size} answers are {'right' if right.all() else 'wrong'}, and there is nothing to tell apart; "
            "give items of both kinds."
        )
    scaler = StandardScaler().fit(table)
    fitted = LogisticRegression().fit(scaler.transform(table), right)
    return Router(scaler.mean_, scaler.scale_, fitted.coef_[0], float(fitted.intercept_[0]))


def _pairs(score: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    score, right = np.asarray(score, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if score.ndim != 1 or score.shape != right.shape or not len(score) or not np.isfinite(score).all():
        raise RoutingError(
            f"Scores {score.shape} and right answers {right.shape} should be finite and of the same items, one each."
        )
    return score, right


def _confidences(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    confidence, right = _pairs(confidence, right)
    if confidence.min() < 0 or confidence.max() > 1:
        raise RoutingError(
            f"Confidences go from {confidence.min():.3g} to {confidence.max():.3g} and should be probabilities; "
            "calibrate the scores first."
        )
    return confidence, right
