"""Perplexity under named protocols, from float32 logits made slice by slice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgelab import tasks
from edgelab.corpora import CorpusError, TokenizedText, tokenize_text
from edgelab.measure import Measurement, Subject, measurement
from edgelab.measure.intervals import paired
from edgelab.measure.protocols import PROTOCOLS, Protocol, ProtocolError
from edgelab.model.finite import NotFiniteError
from edgelab.model.logits import (
    SLICE,
    device_of,
    head_logits,
    last_hidden_states,
    not_finite,
    prepacked,
)


@dataclass(frozen=True)
class Window:
    """One pass of the model: it reads `ids[:-1]`; the last `scored` of `ids` are predicted and scored.

    The scored tokens are tokens `first` to `first + scored - 1` of the text. opening: whether a BOS token comes first.
    """

    ids: Tensor
    first: int
    scored: int
    opening: bool = False


@dataclass
class Perplexity:
    """Sums over the windows, and what follows from them. NLL is in nats."""

    nll_per_window: list[float] = field(default_factory=list)
    tokens_per_window: list[int] = field(default_factory=list)
    n_words: int = 0
    n_bytes: int = 0
    unit: str = "token"

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens_per_window)

    @property
    def nll_sum(self) -> float:
        return math.fsum(self.nll_per_window)

    @property
    def ppl(self) -> float:
        """exp of the mean NLL per token, or per word where the protocol counts words."""
        return _exp(self.nll_sum / (self.n_words if self.unit == "word" else self.n_tokens))

    @property
    def bits_per_byte(self) -> float:
        """NLL in bits over UTF-8 bytes of the scored text: comparable across tokenizers."""
        return self.nll_sum / math.log(2) / self.n_bytes


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def windows(
    text: TokenizedText, protocol: Protocol, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Window]:
    """Cut a text into the windows of a protocol, the first `limit` of them.

    Raises CorpusError where the text is shorter than one window, ProtocolError where a BOS token is needed and the
    tokenizer has neither that nor an EOS token.
    """
    n, size = len(text.ids), protocol.window
    if protocol.scored == "rolling":
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if bos is None:
            raise ProtocolError(
                f"{protocol.name} needs a BOS token, which this tokenizer does not have; use edgelab-512."
            )
        if n == 0:
            raise CorpusError("The text is empty; at least one token is needed.")
        return list(_rolling(text.ids, size, bos))[:limit]
    if n < size:
        raise CorpusError(
            f"The text '{text.name}' has {n} tokens, fewer than one window of {protocol.name} ({size}); "
            "use a longer text or lm-eval-word, which takes any length."
        )
    scored = size - 1 if protocol.scored == "all" else size - size // 2 - 1
    opening = torch.tensor(tasks.opening(tokenizer) if protocol.bos else [], dtype=text.ids.dtype)
    cut = []
    for begin in range(0, n - size + 1, protocol.stride)[:limit]:
        ids = torch.cat([opening, text.ids[begin + len(opening) : begin + size]])
        cut.append(Window(ids, begin + size - scored, scored, len(opening) > 0))
    return cut


def _rolling(ids: Tensor, size: int, prefix: int) -> Iterator[Window]:
    """lm-eval's rolling windows: every token is scored once; the last window is filled up with context."""
    padded = torch.cat([torch.tensor([prefix]), ids])  # padded[i + 1] is token i
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        context = begin if end - begin == size else max(end - size, 0)
        yield Window(padded[context : end + 1], begin, end - begin, context == 0)


def retokenized(
    text: TokenizedText, cut: list[Window], tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenizedText, list[Window]]:
    """The same windows in the tokens of another tokenizer: each scores the same characters, behind the same ones.

    The text is cut where the scored part of a window begins or ends, and each piece is tokenized alone, so that no
    token reaches from one into the next.
    """
    ends = text.ends.tolist()

    def characters(token: int) -> int:
        """How many there are before a token."""
        return ends[token - 1] if token > 0 else 0

    marks = {0} | {characters(token) for one in cut for token in (one.first, one.first + one.scored)}
    pieces = [
        (begin, tokenize_text(text.text[begin:end], tokenizer)) for begin, end in pairwise(sorted(marks))
    ]
    mine = torch.cat([begin + piece.ends for begin, piece in pieces])
    ids = torch.cat([piece.ids for _, piece in pieces])
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def tokens(character: int) -> int:
        """How many there are before a character."""
        return int(torch.searchsorted(mine, character, right=True))

    found = []
    for one in cut:
        given = len(one.ids) - one.scored - one.opening  # tokens of the text
        first, last = (tokens(characters(token)) for token in (one.first, one.first + one.scored))
        # A character whose bytes are tokens of their own ends with each of them, and may leave nothing to begin with.
        begin = min(tokens(characters(one.first - given)), first if one.opening else first - 1)
        opening = ids.new_tensor([bos] if one.opening else [])
        found.append(Window(torch.cat([opening, ids[begin:last]]), first, last - first, one.opening))
    return TokenizedText(text.name, text.text, ids, mine), found


@dataclass(frozen=True)
class Slice:
    """Logits of some scored positions of one window.

    logits: (positions, vocabulary) float32. targets: (positions,). hidden: (positions, hidden), before the head, or
    None where an engine gives logits alone.
    """

    window: int
    logits: Tensor
    targets: Tensor
    hidden: Tensor | None

    @cached_property
    def log_probs(self) -> Tensor:
        """Logarithm of the softmax, (positions, vocabulary) float32: one fused pass, shared by all who add up."""
        return torch.log_softmax(self.logits, -1)

    @property
    def is_finite(self) -> bool:
        """Whether the logits give probabilities; one that is NaN or infinite takes its whole position with it."""
        return not self.log_probs[:, 0].isnan().any()

    @cached_property
    def most_likely(self) -> Tensor:
        """The token that comes first at each position, (positions,)."""
        return self.logits.argmax(-1)


def slices(model: PreTrainedModel, cut: list[Window]) -> Iterator[Slice]:
    """Run a model over windows and give the logits of scored positions, in order, at most SLICE at a time.

    One window at a time: activations of 511 tokens stay in the cache of a CPU, those of a batch do not.
    """
    device = device_of(model)
    inference = torch.inference_mode  # never across a yield: a consumer that stops would be left in it
    with prepacked(model, max((len(window.ids) - 1 for window in cut), default=1)):
        for index, window in enumerate(cut):
            ids = window.ids[None, :-1].to(device)  # (1, time)
            with inference():
                hidden = last_hidden_states(model, ids)  # (1, time, hidden)
                states = hidden[0, -window.scored :].split(SLICE)  # each (positions, hidden)
            targets = window.ids[-window.scored :].to(device)
            for part, answers in zip(states, targets.split(SLICE), strict=True):
                with inference():
                    piece = Slice(index, head_logits(model, part), answers, part)
                if not piece.is_finite:
                    raise not_finite(model, ids)
                yield piece


def logit_slices(logits: Callable[[list[int]], Tensor], cut: list[Window]) -> Iterator[Slice]:
    """As `slices`, of anything that gives logits (time, vocabulary) for token ids of a new sequence."""
    for index, window in enumerate(cut):
        scored = logits(window.ids[:-1].tolist())[-window.scored :]
        targets = window.ids[-window.scored :]
        for part, answers in zip(scored.split(SLICE), targets.split(SLICE), strict=True):
            piece = Slice(index, part.float(), answers, None)
            if not piece.is_finite:
                raise NotFiniteError(
                    f"The engine gives NaN or infinity in place of logits, in window {index + 1}."
                )
            yield piece


class PerplexitySum:
    """Adds up slices to a Perplexity; float64 sums over float32 cross-entropy.

    baseline: mean NLL of each window of the baseline, for the paired difference; None for the baseline itself.
    reference_cut: the windows in the baseline's tokens, where `cut` is in others.
    """

    def __init__(
        self,
        text: TokenizedText,
        protocol: Protocol,
        cut: list[Window],
        baseline: list[float] | None = None,
        reference_cut: list[Window] | None = None,
    ) -> None:
        self.text, self.protocol, self.cut, self.baseline = text, protocol, cut, baseline
        self.reference_cut = cut if reference_cut is None else reference_cut
        self.nll = [0.0] * len(cut)

    def add(self, piece: Slice) -> None:
        nll = -piece.log_probs.gather(1, piece.targets[:, None])[:, 0]  # (positions,)
        self.nll[piece.window] += nll.double().sum().item()

    def result(self) -> Perplexity:
        last = self.cut[-1]
        words = len(
            re.split(r"\s+", self.text.characters(0, last.first + last.scored))
        )  # as lm-eval counts them
        tokens = [window.scored for window in self.cut]
        return Perplexity(self.nll, tokens, words, sum(self.bytes_per_window()), self.protocol.unit)

    def bytes_per_window(self) -> list[int]:
        """UTF-8 bytes of the scored text."""
        covered = [self.text.characters(window.first, window.first + window.scored) for window in self.cut]
        return [len(characters.encode()) for characters in covered]

    def values(self) -> dict[str, Any]:
        found = self.result()
        tokens = found.tokens_per_window
        values: dict[str, Any] = {
            "n_tokens": found.n_tokens,
            "nll_sum": found.nll_sum,
            "ppl": found.ppl,
            "bits_per_byte": found.bits_per_byte,
            "window_nll": [nll / n for nll, n in zip(self.nll, tokens, strict=True)],
        }
        other_tokens = self.cut is not self.reference_cut
        if other_tokens:
            values["window_nll"] = None
            if self.protocol.unit == "token":
                values["ppl"] = None
        if self.baseline is None:
            return values
        sums = [mean * one.scored for mean, one in zip(self.baseline, self.reference_cut, strict=True)]
        bits = [math.log(2) * n for n in self.bytes_per_window()]
        values |= paired(self.nll, sums, bits).fields("delta_bits_per_byte")
        return values if other_tokens else values | paired(self.nll, sums, tokens).fields("delta_nll")


@measurement(
    "perplexity",
    part="quality",
    needs="logits",
    fields=(
        "n_tokens",
        "nll_sum",
        "ppl",
        "bits_per_byte",
        "delta_bits_per_byte",
        "delta_bits_per_byte_low",
        "delta_bits_per_byte_high",
        "window_nll",
        "delta_nll",
        "delta_nll_low",
        "delta_nll_high",
    ),
)
def perplexity(subject: Subject) -> PerplexitySum:
    """Perplexity of a variant, and the paired difference of its NLL to the baseline's.

    What is per token is left out for a variant with tokens of its own, but for n_tokens and the sum.
    """
    baseline = subject.asked.baseline and subject.asked.baseline["window_nll"]
    return PerplexitySum(subject.text, subject.rules, subject.cut, baseline, subject.reference_cut)


def score(subject: Subject, measurements: Iterable[Measurement]) -> dict[str, Any]:
    """Values of all measurements that need logits, from one pass over the windows of a subject."""
    found = [one.run(subject) for one in measurements if one.needs == "logits"]
    totals = [total for total in found if total is not None]
    session, cut = subject.session, subject.cut
    in_torch = session.model is not None
    for piece in slices(session.model, cut) if in_torch else logit_slices(session.logits, cut):
        for total in totals:
            total.add(piece)
        subject.report(piece.window, len(cut))
    subject.report(len(cut), len(cut))
    return {name: value for total in totals for name, value in total.values().items()}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TokenizedText,
    protocol: Protocol = PROTOCOLS["edgelab-512"],
    limit: int | None = None,
    track: Iterable = (),
) -> Perplexity:
    """Perplexity of a model on a text. `track`: further accumulators that take every Slice (their `add`)."""
    cut = windows(text, protocol, tokenizer, limit)
    total = PerplexitySum(text, protocol, cut)
    for piece in slices(model, cut):
        total.add(piece)
        for other in track:
            other.add(piece)
    return total.result()
