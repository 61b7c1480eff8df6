"""KL divergence and top-1 agreement with the reference.

The reference's final hidden states are kept on disk, and its logits made again from them slice by slice: 576 numbers
a position for the embedded model instead of 49,152.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgelab import assets, reference
from edgelab.measure import Subject, measurement
from edgelab.measure.perplexity import Slice
from edgelab.model.logits import SLICE, head_logits, prepacked
from edgelab.storage import cache


def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) of each position in nats, from logits (positions, vocabulary): (positions,)."""
    return _divergence(torch.log_softmax(reference.float(), -1), torch.log_softmax(candidate.float(), -1))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)


def top1_agreement(reference: Tensor, candidate: Tensor) -> Tensor:
    """True where both put the same token first, from logits (positions, vocabulary): (positions,)."""
    return reference.argmax(-1) == candidate.argmax(-1)


class StateRecorder:
    """Keeps the final hidden states of scored positions in a .npy file, (positions, hidden) float32.

    The file appears when all is written, and only then.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.states: list[Tensor] = []

    def add(self, piece: Slice) -> None:
        self.states.append(piece.hidden.float())

    def values(self) -> dict[str, Any]:
        """Writes the file; the reference's divergence from itself is no field of its row."""
        with assets.staged(self.file) as draft, draft.open("wb") as file:
            np.save(file, torch.cat(self.states).numpy())
        return {}


class DivergenceSum:
    """Adds up KL divergence and top-1 agreement with a reference whose hidden states were kept.

    Raises CacheError where they are gone.
    """

    def __init__(self, file: Path, reference: PreTrainedModel) -> None:
        if not file.exists():
            raise cache.CacheError(
                "The reference's hidden states have left the cache, which is too small for this comparison; "
                "ask again with a larger EDGELAB_CACHE_GB."
            )
        self.states = np.load(file, mmap_mode="r")
        cache.touch(file)  # needed by every row of a long comparison, whose variants fill the cache
        self.reference = reference
        self.position = self.agreed = 0
        self.divergence = 0.0
        self.packed = ExitStack()  # until the values are asked for
        self.packed.enter_context(prepacked(reference, SLICE, only_head=True))

    def add(self, piece: Slice) -> None:
        end = self.position + len(piece.targets)
        hidden = torch.from_numpy(self.states[self.position : end].copy())
        with torch.inference_mode():
            logits = head_logits(self.reference, hidden)
        log_p = torch.log_softmax(logits, -1)
        self.divergence += _divergence(log_p, piece.log_probs).double().sum().item()
        self.agreed += int((logits.argmax(-1) == piece.most_likely).sum())
        self.position = end

    def values(self) -> dict[str, Any]:
        """Mean KL divergence over the scored positions in nats, and the share with the same most likely token."""
        self.packed.close()
        return {
            "kld_mean": self.divergence / self.position,
            "top1_agreement": self.agreed / self.position,
        }


@measurement("divergence", part="quality", needs="logits", fields=("kld_mean", "top1_agreement"))
def divergence(subject: Subject) -> StateRecorder | DivergenceSum | None:
    """How far a variant moved from the reference; the baseline keeps the states that others are compared with.

    Between distributions over different tokens there is none.
    """
    if subject.cut is not subject.reference_cut:
        return None
    states = Path(subject.asked.states)
    if subject.asked.baseline is None:
        return StateRecorder(states)
    return DivergenceSum(states, reference.load_model(subject.source))
