"""The quality measures as modules of the `evaluate` library, so that they combine with others of it; no download.

import evaluate
from edgelab.measure.metrics import KLDivergence, Top1Agreement
evaluate.combine([KLDivergence(), Top1Agreement()]).compute(predictions=logits, references=reference_logits)
"""

from __future__ import annotations

import math

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn import functional

from edgelab.measure import divergence

_LOGITS = datasets.Sequence(datasets.Value("float32"))
_TOKEN = datasets.Value("int64")


class _Measure(evaluate.Metric):
    """What the modules share: the description of their inputs. Sums are made in float64."""

    inputs = ""
    features: list[datasets.Features]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=self.inputs,
            features=self.features,
        )


class Perplexity(_Measure):
    """exp of the mean negative log-likelihood of the right tokens: {"perplexity": float}. Lower is better."""

    inputs = "predictions: logits (positions, vocabulary). references: the right token at each position."
    features = [datasets.Features({"predictions": _LOGITS, "references": _TOKEN})]  # noqa: RUF012

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        nll = functional.cross_entropy(_tensor(predictions), torch.tensor(references), reduction="none")
        return {"perplexity": math.exp(nll.double().mean().item())}


class KLDivergence(_Measure):
    """Mean KL(reference || prediction) in nats: {"kl_divergence": float}. Lower is better, 0 for equal models."""

    inputs = "predictions, references: logits (positions, vocabulary) of the candidate and of the reference."
    features = [datasets.Features({"predictions": _LOGITS, "references": _LOGITS})]  # noqa: RUF012

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        each = divergence.kl_divergence(_tensor(references), _tensor(predictions))
        return {"kl_divergence": each.double().mean().item()}


class Top1Agreement(_Measure):
    """Share of positions with the same most likely token: {"top1_agreement": float}. Higher is better."""

    inputs = (
        "predictions, references: logits (positions, vocabulary), or the most likely token of each position."
    )
    features = [  # noqa: RUF012
        datasets.Features({"predictions": _LOGITS, "references": _LOGITS}),
        datasets.Features({"predictions": _TOKEN, "references": _TOKEN}),
    ]

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        mine, theirs = torch.tensor(predictions), torch.tensor(references)
        same = divergence.top1_agreement(theirs, mine) if mine.dim() == 2 else mine == theirs
        return {"top1_agreement": same.double().mean().item()}


def _tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)
