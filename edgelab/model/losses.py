"""The losses of a language model, computed without all logits at once.

cross-entropy   -log p[next token]                  gradient by the logits: p - onehot(next token)
divergence      from a teacher's distribution       see `divergences`; at temperature T, T**2 times that of logits / T
logits          mean of (logits - teacher's)**2     2 (logits - teacher's) / vocabulary

All gradients are known as soon as a slice of logits is, so that they are taken to the hidden states slice by slice and
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

from edgelab.model.divergences import Between, TopK, kl, over_buckets
from edgelab.model.logits import head_logits, head_parameters, hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLICE = 128  # positions whose logits exist at once: 25 MB in float32 at a vocabulary of 49,152
SLICE_TRAINED = 512  # where the head is trained, since every slice adds a gradient as large as the head

Loss = Callable[["PreTrainedModel", Tensor], Tensor]  # model, token ids (batch, time) -> scalar
# ids -> positions, flattened -> their logits, or the likeliest tokens at the temperature of the loss
Teacher = Callable[[Tensor], Callable[[slice], Tensor | TopK]]
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
    teacher: Callable[[slice], Tensor | TopK],
    between: Between,
    temperature: float,
    logits: Tensor,
    where: slice,
) -> tuple[Tensor, Tensor]:
    """A divergence of positions `where` in nats, (positions,), and its gradient by their logits.

    teacher: gives log p of positions at this temperature. logits: (positions, vocabulary) float32. Both are multiplied
    by the temperature squared, so that the gradient is about as large at any (Hinton et al. 2015, arXiv:1503.02531).
    """
    log_q, log_p = torch.log_softmax(logits / temperature if temperature != 1 else logits, -1), teacher(where)
    if isinstance(log_p, TopK):
        loss, gradient = over_buckets(between, log_p, log_q)
    else:
        loss, gradient = between(log_p, log_q)
    return loss * temperature**2, gradient.mul_(temperature)


def logit_score(teacher: Callable[[slice], Tensor], logits: Tensor, where: slice) -> tuple[Tensor, Tensor]:
    """Mean squared difference of logits over the vocabulary, (positions,), and its gradient by them.

    teacher: gives logits of positions. Ba and Caruana 2014, arXiv:1312.6184.
    """
    gap = logits - teacher(where)
    return gap.square().mean(-1), gap.mul_(2 / gap.shape[-1])


def mixed_score(parts: list[tuple[float, Score]], logits: Tensor, where: slice) -> tuple[Tensor, Tensor]:
    """The weighted sum of scores, and its gradient."""
    loss, gradient = 0.0, 0.0
    for weight, score in parts:
        of_part, by_logits = score(logits, where)
        loss, gradient = loss + weight * of_part, gradient + weight * by_logits
    return loss, gradient


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


def live(reference: PreTrainedModel) -> Teacher:
    """A teacher that reads every batch when it is asked."""

    def read(ids: Tensor) -> Callable[[slice], Tensor]:
        with torch.no_grad():
            states = hidden_states(reference, ids).flatten(0, -2)
        return lambda where: head_logits(reference, states[where])

    return read


@dataclass(frozen=True)
class Divergence:
    """Mean divergence in nats from a teacher that reads the same windows, at every position.

    between: which one; None for the squared difference of logits. temperature: of both. top_k: of the teacher's
    tokens, and all others as one event; 0 for every token. hard: share of the cross-entropy that is mixed in, 0 to 1,
    and the divergence has the rest.
    """

    teacher: Teacher
    between: Between | None = kl
    temperature: float = 1.0
    top_k: int = 0
    hard: float = 0.0

    def __call__(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        given = ids[:, :-1] if self.hard else ids  # nothing is known to come behind the last token
        said = self.teacher(given)

        def log_p(where: slice) -> Tensor | TopK:
            found = said(where)
            if isinstance(found, TopK):
                return found
            found = torch.log_softmax(found / self.temperature, -1)
            return TopK.of(found, self.top_k) if self.top_k else found

        score: Score = partial(logit_score, said)
        if self.between is not None:
            score = partial(divergence_score, log_p, self.between, self.temperature)
        if self.hard:
            labels = partial(next_token_score, ids[:, 1:].flatten())
            score = partial(mixed_score, [(1 - self.hard, score), (self.hard, labels)])
        return _mean_score(model, score, hidden_states(model, given))
