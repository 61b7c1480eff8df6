"""Speculative decoding: the loop. The edge drafts, whoever has the target verifies, and the edge goes on from there.

`verify(step, ids, probabilities)` answers how many drafted tokens stay and which token comes behind them. It belongs
to one conversation that knows the prompt already: `Verifying` over a session in this process, or a client of a server.
Steps count from 0, so that a step that arrives twice is noticed.

Pipelined, the edge drafts on while an answer is away, as if the whole draft and its own next token were right. Where
they are, the next draft is ready; where not, it is thrown away and the session takes its tokens back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from edgelab.deployments.hybrid import LEAST_TEMPERATURE, MOST_TEMPERATURE, is_temperature
from edgelab.deployments.hybrid.speculation.acceptance import SpeculationError, accept_greedy, accept_sampled
from edgelab.deployments.hybrid.speculation.rounds import Adaptive, Counts
from edgelab.model.finite import NotFiniteError
from edgelab.runtimes.session import Session

SLICE = 256  # tokens of a prompt that are read at once: the logits of all of them come back
APART = (
    0x9E3779B9  # keeps a drafter's random numbers from being the target's when both are given the same seed
)


class Verify(Protocol):
    """Probabilities are the drafter's, (ids, vocabulary) float16, when sampling; None when greedy."""

    def __call__(self, step: int, ids: list[int], probabilities: Tensor | None) -> tuple[int, int]: ...


def read(session: Session, ids: list[int]) -> Tensor:
    """Go on by some tokens, slice by slice; the logits after the last one, (vocabulary,)."""
    for begin in range(0, len(ids), SLICE):
        logits = session.extend(ids[begin : begin + SLICE])
    return logits[-1]


class Verifying:
    """The target's side of one conversation, over a session that it has to itself. temperature 0 is greedy."""

    def __init__(self, session: Session, prompt: list[int], temperature: float = 0.0, seed: int = 0) -> None:
        _check_prompt(prompt)
        self.session, self.temperature, self.step = session, temperature, 0
        self.generator = torch.Generator().manual_seed(seed)
        self._unread = prompt[-1]  # the last token is read with the draft behind it
        session.rewind(session.length)
        if len(prompt) > 1:
            read(session, prompt[:-1])

    def __call__(self, step: int, ids: list[int], probabilities: Tensor | None = None) -> tuple[int, int]:
        """Verify a draft. Raises SpeculationError for a step out of turn; the session keeps what was accepted."""
        if step != self.step:
            raise SpeculationError(f"Step {step} is out of turn; the next one is {self.step}.")
        if self.temperature and ids and probabilities is None:
            raise SpeculationError("Sampling needs the drafter's probabilities, and none came along.")
        logits = self.session.extend([self._unread, *ids])  # (draft + 1, vocabulary)
        if self.temperature:
            target = (logits / self.temperature).softmax(-1)
            drafted = probabilities if ids else target[:0]
            accepted, token = accept_sampled(target, drafted, ids, self.generator)
        else:
            accepted, token = accept_greedy(logits, ids)
        self.session.rewind(len(ids) - accepted)
        self._unread, self.step = token, step + 1
        return accepted, token


@dataclass
class _Draft:
    """Drafted tokens, and the probabilities that each was sampled from, (vocabulary,) float16."""

    ids: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Answer:
    accepted: int
    token: int
    seconds: float


class Drafting:
    """A drafter and who verifies it. `counts` says what all texts came to.

    edge: a session that drafts; what it held is forgotten. draft: tokens of a draft, or how they adapt. temperature: of
    drafter and target alike, 0 for greedy. seed: of what is sampled; where the length adapts or drafts are pipelined,
    measured times decide how many numbers are drawn, and a seed fixes only the distribution. stop: tokens that end a
    text; they are written. ends: whether the tokens written so far end the text, too.
    """

    def __init__(
        self,
        edge: Session,
        verify: Verify,
        draft: int | Adaptive = 4,
        *,
        pipelined: bool = False,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Collection[int] = (),
        ends: Callable[[list[int]], bool] = lambda written: False,
    ) -> None:
        if isinstance(draft, int) and draft < 1:
            raise SpeculationError(f"A draft of {draft} tokens verifies nothing; it should be 1 or more.")
        if not is_temperature(temperature):
            raise SpeculationError(
                f"temperature is {temperature} and should be {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, or 0."
            )
        self.edge, self.verify, self.draft, self.pipelined = edge, verify, draft, pipelined
        self.temperature, self.stop, self.ends = temperature, frozenset(stop), ends
        # What is drafted must not depend on the numbers that decide over it.
        self.generator = torch.Generator().manual_seed(seed ^ APART)
        self.counts = Counts()

    def write(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens behind a prompt, which the conversation of `verify` begins with, too."""
        return [token for tokens in self.stream(prompt, max_tokens) for token in tokens]

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[list[int]]:
        """The same, round by round."""
        _check_prompt(prompt)
        began = time.perf_counter()
        self.edge.rewind(self.edge.length)
        if len(prompt) > 1:
            read(self.edge, prompt[:-1])
        self.counts.prompt_s += time.perf_counter() - began
        certain, draft, step, left = list(prompt), _Draft(), 0, max_tokens
        with ThreadPoolExecutor(1, "verify") as pool:
            while left > 0:
                self._draft_on(certain, draft, self._length(left))
                if self.pipelined:
                    future = pool.submit(self._ask, step, draft)
                    ahead = self._ahead(certain + draft.ids, left - len(draft.ids) - 1, future)
                    began = time.perf_counter()
                    answer = future.result()
                    self.counts.waiting_s += time.perf_counter() - began
                else:
                    ahead, answer = _Draft(), self._ask(step, draft)
                    self.counts.waiting_s += answer.seconds
                self._observe(draft, answer)
                whole = answer.accepted == len(draft.ids)
                ready = whole and ahead.ids[:1] == [answer.token]
                self.counts.thrown_away += 0 if ready else len(ahead.ids)
                before = certain[len(prompt) :]
                written = self._until_end(before, [*draft.ids[: answer.accepted], answer.token][:left])
                self.counts.tokens += len(written)
                yield written
                if self._is_end(before + written):
                    return
                certain += written
                step, left = step + 1, left - len(written)
                if ready:
                    draft = _Draft(ahead.ids[1:], ahead.rows[1:])
                else:  # the edge may have read all of `certain` but the target's token
                    self.edge.rewind(max(0, self.edge.length - (len(certain) - 1)))
                    draft = _Draft()

    def _length(self, left: int) -> int:
        """Tokens of the next draft where `left` are still to write: a round gives one more than it drafts."""
        length = self.draft.length(self.pipelined) if isinstance(self.draft, Adaptive) else self.draft
        return min(length, left - 1)

    def _draft_on(self, certain: list[int], draft: _Draft, length: int) -> None:
        """Fill a draft behind what is certain, up to a token that ends the text."""
        while len(draft.ids) < length and not self._ends(draft):
            self._add(certain, draft)

    def _ahead(self, hoped: list[int], left: int, answer: Future[_Answer]) -> _Draft:
        """Draft behind a draft that is away, the target's token first, until the answer is there."""
        ahead = _Draft()
        if left <= 0 or hoped[-1] in self.stop:
            return ahead
        steps = 1 + self._length(left)
        while len(ahead.ids) < steps and not self._ends(ahead) and not answer.done():
            # Which token the target adds may be guessed in any way: it is not verified but compared.
            self._add(hoped, ahead, sample=bool(ahead.ids))
            self.counts.ahead += 1
        return ahead

    def _add(self, before: list[int], draft: _Draft, sample: bool = True) -> None:
        """One step of the drafter, which reads what it has not read yet."""
        began = time.perf_counter()
        logits = read(self.edge, (before + draft.ids)[self.edge.length :])
        if logits.isnan().any():
            raise NotFiniteError("There is NaN among the drafter's logits; draft with another recipe.")
        token = int(logits.argmax())
        if self.temperature:
            row = (logits / self.temperature).softmax(-1).half()  # as it is sent, and sampled from that
            draft.rows.append(row)
            if sample:
                token = int(torch.multinomial(row.double(), 1, generator=self.generator))
        draft.ids.append(token)
        self.counts.steps += 1
        self.counts.drafting_s += time.perf_counter() - began

    def _ask(self, step: int, draft: _Draft) -> _Answer:
        began = time.perf_counter()
        accepted, token = self.verify(step, draft.ids, torch.stack(draft.rows) if draft.rows else None)
        if not 0 <= accepted <= len(draft.ids):
            raise SpeculationError(f"{accepted} tokens cannot be accepted of a draft of {len(draft.ids)}.")
        if not 0 <= token < self.edge.vocabulary:
            raise SpeculationError(
                f"The target's token {token} is outside the drafter's vocabulary of {self.edge.vocabulary}; both need "
                "the same."
            )
        return _Answer(accepted, token, time.perf_counter() - began)

    def _observe(self, draft: _Draft, answer: _Answer) -> None:
        counts = self.counts
        counts.away_s += answer.seconds
        counts.count(len(draft.ids), answer.accepted)
        if isinstance(self.draft, Adaptive) and draft.ids:
            step_ms = 1e3 * counts.drafting_s / counts.steps
            self.draft.observe(len(draft.ids), answer.accepted, step_ms, 1e3 * answer.seconds)

    def _ends(self, draft: _Draft) -> bool:
        return bool(draft.ids) and draft.ids[-1] in self.stop

    def _until_end(self, before: list[int], ids: list[int]) -> list[int]:
        """Those of the next tokens with which the text goes on to its end, all of them where it has none yet."""
        counts = range(1, len(ids) + 1)
        return ids[: next((count for count in counts if self._is_end(before + ids[:count])), len(ids))]

    def _is_end(self, written: list[int]) -> bool:
        return written[-1] in self.stop or self.ends(written)


def departure(
    session: Session, prompt: list[int], one: list[int], other: list[int]
) -> tuple[int, float] | None:
    """Where two texts behind a prompt part first, and how far the session's two likeliest logits are apart there.

    None where they are equal, or one begins with the other. A target that reads several tokens at once sums in another
    order than one that reads them one by one: only where its two likeliest tokens lie closer than that may greedy
    texts part.
    """
    pairs = enumerate(zip(one, other, strict=False))
    place = next((place for place, (left, right) in pairs if left != right), None)
    if place is None:
        return None
    session.rewind(session.length)
    first, second = read(session, prompt + one[:place]).topk(2).values.tolist()
    return place, first - second


def _check_prompt(prompt: list[int]) -> None:
    if not prompt:
        raise SpeculationError("A text goes on from at least one token; give a prompt.")
