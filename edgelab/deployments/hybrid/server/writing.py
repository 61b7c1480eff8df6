"""An answer as it is written: tokens one by one from a session, and the text that they come to up to where it stops."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from edgelab.deployments.hybrid import LEAST_TEMPERATURE
from edgelab.runtimes.session import Session
from edgelab.runtimes.streaming import UNFINISHED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Token:
    """A written token. logprob: at temperature 1; top: the likeliest in its place with theirs; None where not asked."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (..., vocabulary), float64, of logits (..., vocabulary). temperature: not that of greedy ones."""
    return (logits.double() / temperature).softmax(-1)


class Writer:
    """One answer of a session, token by token. Every `step` computes; `finish` says why there are no more.

    top: alternatives to tell with each token, None for no log-probabilities at all: a runtime that hands out tokens
    alone, as a partition over links does, then need not hand out logits.
    """

    def __init__(
        self,
        session: Session,
        prompt: list[int],
        limit: int,
        *,
        ends: Collection[int],
        temperature: float = 0.0,
        seed: int | None = None,
        top: int | None = None,
    ) -> None:
        self.session, self.prompt, self.limit, self.ends = session, prompt, limit, ends
        self.temperature, self.top = temperature, top
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        self.written: list[int] = []
        self.finish: Literal["stop", "length"] | None = None

    def step(self) -> Token | None:
        """The next token, or None at the end."""
        if self.finish is not None:
            return None
        if len(self.written) == self.limit:
            self.finish = "length"
            return None
        likeliest = (
            self.session.decode(self.written[-1]) if self.written else self.session.prefill(self.prompt)
        )
        token = self._chosen(likeliest)
        if token.id in self.ends:
            self.finish = "stop"
            return None
        self.written.append(token.id)
        return token

    def _chosen(self, likeliest: int) -> Token:
        is_greedy = self.temperature < LEAST_TEMPERATURE
        if is_greedy and self.top is None:
            return Token(likeliest)
        logits = self.session.next_logits()[0]
        chosen = likeliest
        if not is_greedy:
            chosen = int(torch.multinomial(tempered(logits, self.temperature), 1, generator=self.generator))
        if self.top is None:
            return Token(chosen)
        logprobs = logits.log_softmax(-1).clamp_min(LEAST_LOGPROB)
        best = logprobs.topk(min(self.top, len(logprobs)))
        top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Token(chosen, float(logprobs[chosen]), tuple(top))


class TextSoFar:
    """The text of tokens as they come. Holds back what may still change: half characters, and what may become a stop.

    The pieces of `add` and `rest` together are the text, which ends before the first of `stops` in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.shown = ""
        self.stopped = False
        self.offset = 0  # where the last token's text begins
        self._decoded = ""

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.offset = len(self._decoded)
        self.ids.append(token)
        self._decoded = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        found = [place for stop in self.stops if (place := self._decoded.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found))
        if self._decoded.endswith(UNFINISHED):
            return ""
        return self._show(len(self._decoded) - self._may_become_a_stop())

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.stopped else self._show(len(self._decoded))

    def _show(self, length: int) -> str:
        piece = self._decoded[len(self.shown) : length]
        self.shown += piece
        return piece

    def _may_become_a_stop(self) -> int:
        """Characters at the end with which one of the stops begins."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        ends = (self._decoded[-size:] for size in range(min(longest, len(self._decoded)), 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self.stops)), 0)
