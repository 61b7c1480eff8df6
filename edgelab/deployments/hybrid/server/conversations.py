"""Conversations that go on from request to request: drafts to verify, and hidden states of a split model.

A client names its conversation and counts its steps. A step that was done is not done twice: sent again, as a client
does whose answer was lost, it gets the same answer; any other step that is not the next one is refused. Whoever says
nothing for some seconds is forgotten at the next step of anybody.

All of this runs on the thread of the session, one step at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from edgelab.deployments.hybrid import LEAST_TEMPERATURE
from edgelab.deployments.hybrid.server.framing import probabilities_of
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import (
    HiddenAnswer,
    HiddenRequest,
    Ranked,
    Refusal,
    Verified,
    VerifyRequest,
)
from edgelab.deployments.hybrid.server.sequences import Sequences, common
from edgelab.deployments.hybrid.server.service import Service, token_bytes
from edgelab.deployments.hybrid.server.turns import busy
from edgelab.deployments.hybrid.server.writing import LEAST_LOGPROB, tempered
from edgelab.deployments.partition.formats import FORMATS, WireError
from edgelab.deployments.partition.wire import decoded
from edgelab.runtimes.session import Session, TwoGraphs

SLICE = 256  # tokens that are read at once where the logits of all of them come back

Answer = TypeVar("Answer", Verified, HiddenAnswer)


@dataclass
class Conversation(Generic[Answer]):
    """One of them. number: its own, for a stage; step: the next one; ids: the text so far; length: states so far."""

    number: int
    used: float
    step: int = 0
    ids: list[int] = field(default_factory=list)
    length: int = 0
    temperature: float = 0.0
    generator: torch.Generator = field(default_factory=torch.Generator)
    _done: tuple[bytes, Answer] | None = None

    def done_before(self, step: int, content: bytes) -> Answer | None:
        """The answer to a step that was done already, None for the next one. Raises Refusal, 409, for all others."""
        if step == self.step:
            return None
        if self._done is not None and step == self.step - 1 and self._done[0] == digest(content):
            return self._done[1]
        what = (
            "was another one when it was done"
            if step == self.step - 1
            else f"is not step {self.step}, the next one"
        )
        raise Refusal(409, "wrong_step", f"Step {step} {what}.")

    def finish(self, content: bytes, answer: Answer) -> Answer:
        """Go on to the next step."""
        self._done, self.step = (digest(content), answer), self.step + 1
        return answer


def digest(content: bytes) -> bytes:
    """What a step is recognized by."""
    return hashlib.blake2b(content, digest_size=16).digest()


class Conversations(Generic[Answer]):
    """Those that are open, by name. ended: told the number of each that is forgotten.

    makes_room: where there are too many, the one that is idle longest makes room for a new one; else the new one has
    to come again.
    """

    def __init__(
        self,
        limits: Limits,
        ended: Callable[[int], None] = lambda number: None,
        makes_room: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits, self._ended, self._clock, self._makes_room = limits, ended, clock, makes_room
        self._open: dict[str, Conversation[Answer]] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Conversation[Answer]]:
        return iter(self._open.values())

    def at(self, name: str, step: int) -> Conversation[Answer]:
        """A conversation; a new one at step 0. Raises Refusal: 404 for an unknown one, 429 where there are too many."""
        self.expire()
        now = self._clock()
        if name not in self._open:
            if step:
                raise Refusal(
                    404,
                    "unknown_conversation",
                    f"No such conversation is open; one is forgotten after {self._limits.idle_s:g} s, and begins with "
                    "step 0.",
                )
            if len(self._open) >= self._limits.conversations:
                if not self._makes_room:
                    raise busy(self.until_one_ends())
                self.forget(min(self._open, key=lambda one: self._open[one].used))
            self._open[name] = Conversation(next(self._numbers), now)
        self._open[name].used = now
        return self._open[name]

    def until_one_ends(self) -> float:
        """Seconds until the one that is idle longest is forgotten; there has to be one."""
        return self._limits.idle_s - (self._clock() - min(one.used for one in self))

    def expire(self) -> None:
        """Forget those that have been idle for too long."""
        now = self._clock()
        for other in [one for one, found in self._open.items() if now - found.used > self._limits.idle_s]:
            self.forget(other)

    def forget(self, name: str) -> bool:
        """Whether there was one."""
        found = self._open.pop(name, None)
        if found is not None:
            self._ended(found.number)
        return found is not None


class Verifying:
    """Drafts, verified by one session.

    A conversation is token ids, which can be read again, so that old ones make room: a client need not say that it has
    done. What the session has read of the last few stays.
    """

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service, self.limits = service, limits
        self.sequences = Sequences(service.session, limits)
        self.open: Conversations[Verified] = Conversations(limits, self.sequences.forget, makes_room=True)

    def step(self, asked: VerifyRequest, numbers: bytes) -> Verified:
        """How many drafted tokens stay, and the next one. Raises Refusal for what cannot be verified."""
        self._check(asked)
        talk = self.open.at(asked.conversation, asked.step)
        content = asked.model_dump_json().encode() + numbers
        if (answer := talk.done_before(asked.step, content)) is not None:
            return answer
        try:
            if asked.step == 0:
                talk.ids, talk.temperature = list(asked.prompt), asked.temperature or 0.0
                talk.generator.manual_seed(asked.seed or 0)
            return talk.finish(content, self._verified(talk, asked, numbers))
        except BaseException:
            if asked.step == 0:
                self.open.forget(asked.conversation)
            raise

    def _check(self, asked: VerifyRequest) -> None:
        if (asked.step == 0) != (asked.prompt is not None):
            raise Refusal(400, "wrong_prompt", "A prompt comes with step 0, and with no other step.")
        if asked.step and (asked.temperature is not None or asked.seed is not None):
            raise Refusal(400, "wrong_step", "Temperature and seed are set with step 0 and stay.")
        if len(asked.draft) > self.limits.draft_tokens:
            raise Refusal(
                400,
                "draft_too_long",
                f"The draft has {len(asked.draft)} tokens, and at most {self.limits.draft_tokens} are verified.",
            )
        self.service.check_ids([*(asked.prompt or []), *asked.draft])
        self.service.check_room(len(asked.prompt or []), self.limits)

    def _verified(self, talk: Conversation[Verified], asked: VerifyRequest, numbers: bytes) -> Verified:
        from edgelab.deployments.hybrid.speculation.acceptance import (
            SpeculationError,
            accept_greedy,
            accept_sampled,
        )

        draft, vocabulary = asked.draft, self.service.session.vocabulary
        self.service.check_context(len(talk.ids) + len(draft) + 1)
        is_greedy = talk.temperature < LEAST_TEMPERATURE
        if is_greedy and numbers:
            raise Refusal(400, "invalid_probabilities", "A greedy conversation takes token ids alone.")
        drafted = None if is_greedy else probabilities_of(numbers, len(draft), vocabulary)
        logits = self._read(talk, draft)
        if drafted is None:
            accepted, token = accept_greedy(logits, draft)
        else:
            try:
                target = tempered(logits, talk.temperature)
                accepted, token = accept_sampled(target, drafted, draft, talk.generator)
            except SpeculationError as error:
                raise Refusal(400, "invalid_probabilities", str(error)) from None
        talk.ids = [*talk.ids, *draft[:accepted], token]
        return Verified(step=asked.step, accepted=accepted, next=token)

    def _read(self, talk: Conversation[Verified], draft: list[int]) -> Tensor:
        """Logits behind the text so far and behind each token of a draft, (draft + 1, vocabulary)."""
        try:
            return read_behind(self.sequences.of(talk.number, talk.ids), talk.ids, draft)
        except BaseException:
            self.sequences.forget(talk.number)  # it may have been read in part
            raise


def read_behind(session: Session, prefix: list[int], draft: list[int]) -> Tensor:
    """Logits behind a prefix and behind each token of a draft that follows it, (draft + 1, vocabulary).

    What the session has read of it already stays.
    """
    known = prefix[:-1]
    kept = common(session.ids, known)
    session.rewind(session.length - kept)
    if (
        known and not kept and not isinstance(session, TwoGraphs)
    ):  # those read it again for the graph of every position
        session.prefill(known)
        kept = len(known)
    for begin in range(kept, len(known), SLICE):
        session.extend(known[begin : begin + SLICE])
    return session.extend([prefix[-1], *draft])


class SecondPart:
    """The layers behind the cut. Every conversation has keys and values of its own.

    token_bytes: of the keys and values of one token, at most; a cache that is packed, or has a window, keeps less.
    """

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service, self.limits = service, limits
        self.open: Conversations[HiddenAnswer] = Conversations(limits, self._forget)
        second = service.second
        self.token_bytes = (
            0 if second is None else token_bytes(second.model.config, second.blocks, second.dtype.itemsize)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, at most."""
        return self.token_bytes * sum(one.length for one in self.open)

    def _forget(self, number: int) -> None:
        if self.service.second is not None:
            self.service.second.forget(number)

    def step(self, asked: HiddenRequest, numbers: bytes) -> HiddenAnswer:
        """The likeliest token behind these states. Raises Refusal for what are none."""
        states = self._states(asked, numbers)
        talk = self.open.at(asked.conversation, asked.step)
        content = asked.model_dump_json().encode() + numbers
        if (answer := talk.done_before(asked.step, content)) is not None:
            return answer
        try:
            self._check_bytes(talk, asked.tokens)
        except Refusal:
            if not talk.length:
                self.open.forget(asked.conversation)  # it was opened for this step
            raise
        try:
            self.service.check_context(talk.length + asked.tokens)
            logits = self.service.second.read(states, talk.length, talk.number)
            talk.length += asked.tokens
            logprobs = logits.log_softmax(-1).clamp_min(LEAST_LOGPROB)
            best = logprobs.topk(min(asked.top, len(logprobs)))
            ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top = [Ranked(id=token, logprob=logprob) for token, logprob in ranked]
            return talk.finish(content, HiddenAnswer(step=asked.step, next=int(logits.argmax()), top=top))
        except BaseException:
            self.open.forget(asked.conversation)  # its keys and values may be there in part
            raise

    def _check_bytes(self, talk: Conversation[HiddenAnswer], tokens: int) -> None:
        """Raises Refusal, 429, where so many more tokens have no room beside all that is kept.

        400 where a conversation would have none alone: it would wait in vain.
        """
        most = self.limits.sequence_bytes
        alone = self.token_bytes * (talk.length + tokens)
        if alone > most:
            raise Refusal(
                400,
                "sequence_too_large",
                f"Keys and values of {talk.length + tokens} tokens are {alone} bytes, and at most {most} are kept.",
            )
        if self.nbytes + self.token_bytes * tokens > most:
            raise busy(self.open.until_one_ends())

    def _states(self, asked: HiddenRequest, numbers: bytes) -> Tensor:
        """(tokens, hidden) float32. Raises Refusal for another shape, an unknown format, and for NaN."""
        if self.service.second is None:
            raise Refusal(
                404, "no_second_part", "No split model is served here; the server is started with a cut."
            )
        if asked.wire not in FORMATS:
            raise Refusal(400, "unknown_wire", f"wire should be one of {', '.join(FORMATS)}.")
        self.service.check_room(asked.tokens, self.limits)
        hidden = self.service.second.hidden_size
        try:
            states = decoded(numbers, asked.wire, asked.tokens, hidden)
        except WireError as error:
            raise Refusal(400, "invalid_states", str(error)) from None
        if not states.isfinite().all():
            raise Refusal(
                400,
                "invalid_states",
                f"{len(numbers)} bytes in {asked.wire} are no {asked.tokens} tokens of {hidden} finite numbers each.",
            )
        return states
