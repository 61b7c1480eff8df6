"""The losses of a language model, computed without all logits at once.

cross-entropy   -log p[next token]                        gradient by the logits: p - onehot(next token)
divergence      sum r (log r - log p), r the reference's  gradient by the logits: p - r

Both gradients are known as soon as a slice of logits is, so that they are taken to the hidden states slice by slice and
a tensor of positions x vocabulary never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.model.logits import head_logits, head_parameters, hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICE = 128  # positions whose logits exist at once: 25 MB in float32 at a vocabulary of 49,152
SLICE_TRAINED = 512  # where the head is trained, since every slice adds a gradient as large as the head

Loss = Callable[["PreTrainedModel", Tensor], Tensor]  # model, token ids (batch, time) -> scalar
Score = Callable[
    [Tensor, slice], tuple[Tensor, Tensor]
]  # logits, positions -> loss of each, gradient of logits


def next_token_score(targets: Tensor, logits: Tensor, where: slice) -> tuple[Tensor, Tensor]:
    """Cross-entropy of positions `where` in nats, (positions,), and its gradient by their logits.

    targets: (all positions,) int64. logits: (positions, vocabulary) float32.
    """
    log_p = torch.log_softmax(logits, -1)
    index = targets[where, None]
    loss = -log_p.gather(-1, index)[:, 0]
    return loss, log_p.exp_().scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=log_p.dtype))


def divergence_score(
    reference: Callable[[slice], Tensor], logits: Tensor, where: slice
) -> tuple[Tensor, Tensor]:
    """KL(reference || model) of positions `where` in nats, (positions,), and its gradient by their logits.

    reference: gives the reference's logits of positions. logits: (positions, vocabulary) float32.
    """
    log_p = torch.log_softmax(logits, -1)
    log_r = torch.log_softmax(reference(where), -1)
    r = log_r.exp()
    loss = log_r.sub_(log_p).mul_(r).sum(-1)  # no vecdot, which autocast would take in bfloat16
    return loss, log_p.exp_().sub_(r)


class _Sliced(torch.autograd.Function):
    """Mean of a score over positions. The backward pass only scales what the forward pass has found."""

    @staticmethod
    def forward(ctx, head: Callable[[Tensor], Tensor], score: Score, hidden: Tensor, *weights: Tensor):
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *weights)]
        size = SLICE_TRAINED if weights else SLICE
        for first in range(0, len(hidden), size):
            where = slice(first, first + size)
            part = hidden[where].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            loss, gradient = score(logits.detach(), where)
            total += loss.sum()
            by_part, *by_weights = torch.autograd.grad(logits, (part, *weights), gradient)
            gradients[0][where] = by_part
            for sum_, by_weight in zip(gradients[1:], by_weights, strict=True):
                sum_ += by_weight
        ctx.save_for_backward(*gradients)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, outer: Tensor):
        return None, None, *(gradient * (outer / ctx.count) for gradient in ctx.saved_tensors)


def _mean_score(model: PreTrainedModel, score: Score, hidden: Tensor) -> Tensor:
    hidden, head = hidden.flatten(0, -2), partial(head_logits, model)
    with _cast_once(model):
        if not torch.is_grad_enabled():
            places = [slice(first, first + SLICE) for first in range(0, len(hidden), SLICE)]
            return torch.cat([score(head(hidden[where]), where)[0] for where in places]).mean()
        weights = [weight for weight in head_parameters(model) if weight.requires_grad]
        return _Sliced.apply(head, score, hidden, *weights)


@contextmanager
def _cast_once(model: PreTrainedModel) -> Iterator[None]:
    """Under autocast, give the head a frozen weight in the type that it is cast to, or every slice would cast it."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not torch.is_autocast_enabled("cpu") or not isinstance(head, nn.Linear) or weight.requires_grad:
        yield
        return
    head.weight = nn.Parameter(weight.to(torch.get_autocast_dtype("cpu")), requires_grad=False)
    try:
        yield
    finally:
        head.weight = weight


def cross_entropy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of windows (batch, time); the first token of a window is given."""
    score = partial(next_token_score, ids[:, 1:].flatten())
    return _mean_score(model, score, hidden_states(model, ids)[:, :-1])


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence in nats to a reference that runs on the same windows, at every position."""

    reference: PreTrainedModel

    def __call__(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = hidden_states(self.reference, ids).flatten(0, -2)

        def logits_of(where: slice) -> Tensor:
            return head_logits(self.reference, target[where])

        return _mean_score(model, partial(divergence_score, logits_of), hidden_states(model, ids))
