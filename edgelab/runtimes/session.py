"""Sessions: a loaded variant that can go on. Prompt in, logits out, some tokens on, some tokens back.

A runtime gives one step, `_feed`, and `_cut`, which takes keys and values back; all that is asked of a session is
written here once, on these two.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from edgelab.errors import EdgeLabError
from edgelab.storage.description import Description

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SessionError(EdgeLabError):
    """Something asked of a sequence that it cannot do."""


@dataclass(frozen=True)
class Can:
    """What a runtime does at once. All else it does step by step, with the same logits.

    every_position: the logits of all tokens it reads, so that texts are scored on it; else one token after the other.
    rewind: to take tokens back; else the tokens that stay are read again.
    layers: to run some of the layers alone, with hidden states going in and coming out.
    sequences: to put a sequence by and go on with another, so that neither is read again.
    """

    every_position: bool = True
    rewind: bool = True
    layers: bool = False
    sequences: bool = False


class KeysAndValues(Protocol):
    """What a runtime keeps of a sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes of it."""

    def fork(self) -> KeysAndValues | None:
        """The same for another sequence that begins alike, at no cost; None where a step would change both."""


@dataclass(frozen=True)
class Sequence:
    """A sequence that a session has put by, and that it alone can go on with. last: logits after the last token."""

    ids: list[int]
    last: Tensor | None
    kept: KeysAndValues

    def fork(self) -> Sequence | None:
        """Another one that begins alike, so that both can be gone on with; None where the runtime cannot do that."""
        kept = self.kept.fork()
        return None if kept is None else Sequence(self.ids, self.last, kept)


class Session(ABC):
    """A variant on a runtime, with one sequence in its memory. `kernel` names what multiplies.

    model: the PyTorch model; None for an engine, which is loaded from its export: `Engine(folder, threads)`.
    vocabulary: how many tokens there are. ids: the sequence so far.
    tolerance: root-mean-square change of the logits, in their standard deviations, when a sequence is read in other
    pieces; about what they are off from PyTorch's anyway. cache_bits: of a key or value that an engine keeps.
    short: tokens of the longest text with the first of LongRoPE's two sets of frequencies; a text that grows or shrinks
    past it is read again.
    export: writes all that an engine loads of a variant into an empty folder and returns the bytes of the weights in
    it, `export(variant, folder)`; None in PyTorch, which loads variants themselves. spare: files of an export that
    running does not need. adapters: whether it runs them beside the weights. elsewhere: whether other processes hold
    the weights. pace: how many times slower than real its time runs, where it stands for faster devices.
    """

    badge = "runtime"
    kernel: str
    can = Can()
    model: PreTrainedModel | None = None
    vocabulary: int
    short: float = math.inf
    pace: float = 1.0
    tolerance: ClassVar[float]
    cache_bits: ClassVar[int]
    export: ClassVar[Callable[..., int] | None] = None
    spare: ClassVar[tuple[str, ...]] = ()
    adapters: ClassVar[bool] = False
    elsewhere: ClassVar[bool] = False

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._last: Tensor | None = None  # logits after the last token, (vocabulary,)

    @classmethod
    def refusal(cls, about: Description) -> str | None:
        """Why a variant cannot run here, in one sentence; None where it can. Needs no engine."""
        native = about.marks.native
        if native and (about.matrices or about.marks.cache or about.dtype != "float32"):
            return f"native.{native} leaves float32 weights to an engine; take the other quantization out."
        if about.adapter and not cls.adapters:
            return "This engine runs no adapter beside the weights, as 'torch' and 'llamacpp' do; put merge behind it."
        return cls._refusal(about)

    @classmethod
    @abstractmethod
    def _refusal(cls, about: Description) -> str | None:
        """What this runtime has to say against a variant."""

    @abstractmethod
    def _feed(self, ids: list[int], every: bool) -> Tensor:
        """Read the next tokens. Logits, float32: after each of them, (time, vocabulary), or after the last, (1, ...).

        Those after the last token are valid until the next step only; those after each belong to the caller.
        """

    @abstractmethod
    def _cut(self, length: int) -> bool:
        """Keep the keys and values of the first tokens only, 0 for none; False where that cannot be had."""

    def _swap(self, kept: KeysAndValues | None) -> KeysAndValues:
        """Hand out the keys and values of the sequence, and go on from others, from none for None."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self.ids)

    @property
    def gives_logits(self) -> bool:
        """Whether texts are scored on it."""
        return self.can.every_position

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; returns the most likely next token."""
        self._start()
        return int(self._read(ids)[-1].argmax())

    def decode(self, token: int) -> int:
        """Go on by one token; returns the most likely next one."""
        return int(self._read([token])[-1].argmax())

    def next_logits(self) -> Tensor:
        """Logits of what comes next, (1, vocabulary) float32, a copy: those that the last step has computed."""
        return self._next()

    def extend(self, ids: list[int]) -> Tensor:
        """Go on by some tokens; logits after each of them, (time, vocabulary) float32."""
        return self._read(ids, every=True)

    def logits(self, ids: list[int]) -> Tensor:
        """Logits at every position of a new sequence, (time, vocabulary) float32."""
        self._start()
        return self.extend(ids)

    def top(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The most likely next tokens of a new sequence with their log-probabilities, best first."""
        self._start()
        found = self._read(ids)[-1].log_softmax(-1).topk(count)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def rewind(self, count: int) -> None:
        """Take the last tokens back. Raises SessionError where the sequence has fewer."""
        if not 0 <= count <= self.length:
            raise SessionError(f"{count} tokens cannot be taken back from a sequence of {self.length}.")
        kept = self.ids[: self.length - count]
        if count == 0:
            return
        if not kept or self._turns(len(kept)) or not self._cut(len(kept)):
            self._start()
            if kept:
                self._read(kept)
        self.ids, self._last = kept, None

    def exchange(self, other: Sequence | None = None) -> Sequence:
        """Put the sequence by and go on with another one that was, an empty one for None. Nothing is copied.

        Raises SessionError where the runtime holds one sequence only: see `can`.
        """
        if not self.can.sequences:
            raise SessionError("This engine holds one sequence; read the other one from its beginning.")
        mine = Sequence(self.ids, self._last, self._swap(None if other is None else other.kept))
        self.ids, self._last = ([], None) if other is None else (other.ids, other.last)
        return mine

    def continuations(self, candidates: list[list[int]]) -> list[Tensor]:
        """Log-probabilities of each candidate's tokens after the sequence, (tokens,) each; it is left as it was."""
        first, found = self._next(), []
        for candidate in candidates:
            rows = [first]
            if len(candidate) > 1:  # what its last token would lead to is not asked
                rows.append(self.extend(candidate[:-1]))
                self.rewind(len(candidate) - 1)
            found.append(taken(torch.cat(rows), candidate))
        self._last = first[0]
        return found

    def close(self) -> None:
        """Give back what it holds."""
        self._last = None

    def _start(self) -> None:
        self._cut(0)
        self.ids, self._last = [], None

    def _read(self, ids: list[int], every: bool = False) -> Tensor:
        if not ids:
            raise SessionError("A sequence goes on by at least one token.")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise SessionError(f"Tokens have to be below {self.vocabulary}, and these go up to {max(ids)}.")
        whole = self.ids + ids
        if self._turns(len(whole)):
            self._start()
            found = self._feed(whole, every)[-len(ids) :]
        else:
            found = self._feed(ids, every)
        self.ids = whole
        self._last = found[-1].clone() if every else found[-1]
        return found

    def _turns(self, length: int) -> bool:
        """Whether the sequence has other rotary frequencies when it has so many tokens."""
        return bool(self.ids) and (self.length <= self.short) != (length <= self.short)

    def _next(self) -> Tensor:
        """Logits of what comes next, (1, vocabulary), a copy."""
        if not self.ids:
            raise SessionError("There is nothing to continue yet; call prefill or extend first.")
        if self._last is None:
            last = self.ids[-1]
            self.rewind(1)
            self._read([last])
        return self._last[None].clone()


def taken(logits: Tensor, ids: list[int]) -> Tensor:
    """Log-probabilities of tokens, (time,), from the logits before each of them, (time or more, vocabulary)."""
    chosen = torch.tensor(ids, dtype=torch.long)[:, None]
    return logits[: len(ids)].log_softmax(-1).gather(1, chosen)[:, 0]


class Graph(Protocol):
    """One graph of an engine, with keys and values of its own."""

    length: int  # tokens that it has read

    def read(self, ids: list[int]) -> Tensor:
        """Read the next tokens; logits, (time, vocabulary) or (1, vocabulary) float32."""

    def cut(self, length: int) -> None:
        """Keep so many tokens, or none where so many cannot be had."""


class TwoGraphs(Session):
    """An engine with one graph for the last position, all that writing needs, and one for every position.

    Each reads what it has missed when its turn comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._graphs: dict[bool, Graph] = {}

    @abstractmethod
    def _open(self, every: bool) -> Graph:
        """Load one of the two."""

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        if every not in self._graphs:
            self._graphs[every] = self._open(every)
        graph = self._graphs[every]
        found = graph.read(self.ids[graph.length :] + ids)
        return found[-len(ids) :] if every else found[-1:]

    def _cut(self, length: int) -> bool:
        for graph in self._graphs.values():
            if graph.length > length:
                graph.cut(length)
        return True

    def close(self) -> None:
        self._graphs.clear()
