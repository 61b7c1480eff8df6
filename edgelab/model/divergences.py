"""How far a student's next-token distribution q is from a teacher's p, and where it has to go.

kl            sum p log(p / q)                           the student covers whatever the teacher may say
reverse_kl    sum q log(q / p)                           the student seeks what the teacher says most
jsd           beta KL(p || m) + (1 - beta) KL(q || m)    m = beta p + (1 - beta) q; vanishes at beta 0 and 1
scaled_jsd    jsd / (beta (1 - beta))                    its ends at beta 0 and 1 are kl and reverse_kl
skew_kl       KL(p || skew p + (1 - skew) q)             no weight of the student's is infinitely bad
skew_reverse_kl   KL(q || (1 - skew) p + skew q)

Each is a function of log p and log q, (positions, events) float32. It returns the divergence of each position in nats,
(positions,), and its gradient by the logits of which q is the softmax, (positions, events).
Agarwal et al. 2023 (GKD), arXiv:2306.13649; Ko et al. 2024 (DistiLLM), arXiv:2402.03898.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Between = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # log p, log q -> divergence, gradient by logits


def kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Forward: KL(p || q)."""
    p = log_p.exp()
    return log_p.sub(log_q).mul_(p).sum(-1), log_q.exp().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p)."""
    q = log_q.exp()
    terms = q * (log_q - log_p)
    return terms.sum(-1), _by_logits(q, terms)  # the slope is terms + q, and q leads nowhere


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence as in GKD. beta: weight of the teacher, from 0 to 1."""
    log_m, q = _mix(log_p, log_q, beta), log_q.exp()
    of_student = (1 - beta) * q * (log_q - log_m)
    of_teacher = beta * log_p.exp() * (log_p - log_m)
    return (of_teacher + of_student).sum(-1), _by_logits(q, of_student)


def scaled_jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """jsd divided by beta (1 - beta), from KL(p || q) at beta 0 to KL(q || p) at beta 1."""
    if beta in (0, 1):
        return (reverse_kl if beta else kl)(log_p, log_q)
    loss, gradient = jsd(log_p, log_q, beta)
    return loss / (beta * (1 - beta)), gradient / (beta * (1 - beta))


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL of the teacher to a mixture that holds a share `skew` of itself, from 0 to 1."""
    log_m, p = _mix(log_p, log_q, skew), log_p.exp()
    q_by_m = (log_q - log_m).exp()
    return (p * (log_p - log_m)).sum(-1), _by_logits(log_q.exp(), (skew - 1) * p * q_by_m)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL of the student to a mixture that holds a share `skew` of itself, from 0 to 1."""
    log_m, q = _mix(log_p, log_q, 1 - skew), log_q.exp()
    terms = q * (log_q - log_m)
    return terms.sum(-1), _by_logits(q, terms - skew * q * (log_q - log_m).exp())


def _mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Logarithm of share p + (1 - share) q."""
    if share in (0, 1):
        return log_p if share else log_q
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _by_logits(q: Tensor, slope: Tensor) -> Tensor:
    """The gradient by logits. slope: q times the slope by q; a multiple of q in it cancels."""
    return slope - q * slope.sum(-1, keepdim=True)


class TopK(NamedTuple):
    """The k most likely tokens of a teacher, and all others as one event.

    Without the rest these would be no distribution, and no divergence of them: it could go below 0.
    """

    log_p: Tensor  # (positions, k)
    index: Tensor  # (positions, k) int64
    log_rest: Tensor  # (positions,)

    @classmethod
    def of(cls, log_p: Tensor, k: int) -> TopK:
        """From log p over all tokens, (positions, vocabulary)."""
        most, index = log_p.topk(k, -1)
        return cls(most, index, _rest(log_p, index))


def _rest(log_p: Tensor, index: Tensor) -> Tensor:
    """Logarithm of the probability of all tokens but those at `index`, (positions,)."""
    return log_p.scatter(-1, index, -math.inf).logsumexp(-1)


def over_buckets(between: Between, teacher: TopK, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """A divergence over the teacher's k tokens and the rest as one event, with its gradient by all logits.

    log_q: (positions, vocabulary). At most the divergence over all tokens, and never below 0.
    """
    rest = _rest(log_q, teacher.index)[:, None]
    events_p = torch.cat([teacher.log_p, teacher.log_rest[:, None]], -1)
    events_q = torch.cat([log_q.gather(-1, teacher.index), rest], -1)
    loss, by_event = between(events_p, events_q)
    shares = (log_q - rest).exp_()  # of each token in what is asked of the rest
    gradient = shares.mul_(by_event[:, -1:])
    return loss, gradient.scatter_(-1, teacher.index, by_event[:, :-1])


DIVERGENCES: dict[str, Callable[[float], Between]] = {  # by name; each takes its mixing weight
    "kl": lambda _: kl,
    "reverse_kl": lambda _: reverse_kl,
    "jsd": lambda beta: partial(jsd, beta=beta),
    "scaled_jsd": lambda beta: partial(scaled_jsd, beta=beta),
    "skew_kl": lambda skew: partial(skew_kl, skew=skew),
    "skew_reverse_kl": lambda skew: partial(skew_reverse_kl, skew=skew),
}
