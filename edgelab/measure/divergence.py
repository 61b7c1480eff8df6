"""KL divergence and top-1 agreement with the reference, and the paired difference of NLL.

The reference's final hidden states are kept on disk, and its logits made again from them slice by slice: 576 numbers
a position for the embedded model instead of 49,152.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from edgelab.errors import EdgeLabError
from edgelab.measure.perplexity import Slice, Window, head


class PairingError(EdgeLabError):
    """Two measurements that do not belong to the same windows."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_delta(nll: list[float], baseline: list[float], tokens: list[int]) -> Interval:
    """Mean difference of NLL per token to the baseline, in nats, with Student's 95 % interval over windows.

    nll, baseline: sum of each window, same windows. tokens: scored tokens of each window, the weights of the mean.
    One window gives no spread: the interval is then nan. Raises PairingError for other windows.
    """
    if not len(nll) == len(baseline) == len(tokens):
        raise PairingError(
            f"The baseline has {len(baseline)} windows and the candidate {len(nll)}; measure both alike."
        )
    weight = np.asarray(tokens, dtype=np.float64)
    difference = (np.asarray(nll) - np.asarray(baseline)) / weight
    mean = float(np.average(difference, weights=weight))
    n = len(difference)
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    # Variance of a weighted mean; with equal weights this is the usual s / sqrt(n).
    share = weight / weight.sum()
    error = math.sqrt(n / (n - 1) * float(np.sum((share * (difference - mean)) ** 2)))
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) of each position in nats, from logits (positions, vocabulary): (positions,)."""
    return _divergence(torch.log_softmax(reference.float(), -1), torch.log_softmax(candidate.float(), -1))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def top1_agreement(reference: Tensor, candidate: Tensor) -> Tensor:
    """True where both put the same token first, from logits (positions, vocabulary): (positions,)."""
    return reference.argmax(-1) == candidate.argmax(-1)


class StateRecorder:
    """Keeps the final hidden states of scored positions, float32, (positions, hidden)."""

    def __init__(self, states: np.ndarray) -> None:
        self.states = states
        self.position = 0

    def add(self, piece: Slice) -> None:
        end = self.position + len(piece.hidden)
        self.states[self.position : end] = piece.hidden.float().numpy()
        self.position = end


@contextmanager
def recording(file: Path, cut: list[Window], model: PreTrainedModel) -> Iterator[StateRecorder]:
    """A StateRecorder over a .npy file that appears when all is written, and only then."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.getpid()}-{file.name}")
    shape = (sum(window.scored for window in cut), model.config.hidden_size)
    try:
        states = open_memmap(draft, mode="w+", dtype=np.float32, shape=shape)
        yield StateRecorder(states)
        states.flush()
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


class DivergenceSum:
    """Adds up KL divergence and top-1 agreement with a reference whose hidden states were kept."""

    def __init__(self, file: Path, reference: PreTrainedModel) -> None:
        self.states = np.load(file, mmap_mode="r")
        self.reference = reference
        self.position = self.agreed = 0
        self.divergence = 0.0

    def add(self, piece: Slice) -> None:
        end = self.position + len(piece.targets)
        hidden = torch.from_numpy(self.states[self.position : end].copy())
        logits = head(self.reference, hidden)
        log_p = torch.log_softmax(logits, -1)
        self.divergence += _divergence(log_p, piece.log_probs).double().sum().item()
        self.agreed += int(top1_agreement(logits, piece.logits).sum())
        self.position = end

    @property
    def kld_mean(self) -> float:
        """Mean KL divergence over the scored positions, in nats."""
        return self.divergence / self.position

    @property
    def agreement(self) -> float:
        """Share of scored positions with the same most likely token."""
        return self.agreed / self.position
