"""Perplexity under named protocols, from float32 logits made slice by slice.

Published perplexities of one model differ because protocols differ: window, stride, which tokens score, whether a
beginning-of-sequence token stands first, and whether tokens or words are counted. So a protocol has a name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgelab.corpora import CorpusError, TokenizedText
from edgelab.errors import EdgeLabError
from edgelab.training import head_logits as head

CHUNK = 32  # tokens that a model with a quantized cache reads at a time
SLICE = 64  # positions whose logits exist at one time: 12.6 MB in float32 for a vocabulary of 49,152


class ProtocolError(EdgeLabError):
    """An unknown protocol, or one that does not fit the model."""


@dataclass(frozen=True)
class Protocol:
    """How perplexity is computed.

    window: tokens the model sees. stride: tokens from one window to the next. scored: "all" but the first token, the
    second "half", or "rolling" (every token once, each window predicting `window` tokens after one of context).
    bos: the first token of each window ("all": of the text) is replaced by (rolling: preceded by) the BOS token.
    unit: what the sum is divided by, "token" or "word". version: raised when the numbers change.
    """

    name: str
    window: int
    scored: Literal["all", "half", "rolling"] = "all"
    bos: bool = False
    unit: Literal["token", "word"] = "token"
    version: int = 1

    @property
    def stride(self) -> int:
        return self.window  # none of the four overlaps its windows


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("edgelab-512", window=512),
        Protocol("gptq-2048", window=2048),
        Protocol("llamacpp-512", window=512, scored="half", bos=True),
        Protocol("lm-eval-word", window=2048, scored="rolling", bos=True, unit="word"),
    )
}


@dataclass(frozen=True)
class Window:
    """One pass of the model: it reads `ids[:-1]`; the last `scored` of `ids` are predicted and scored.

    The scored tokens are tokens `first` to `first + scored - 1` of the text.
    """

    ids: Tensor
    first: int
    scored: int


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


def protocol(name: str) -> Protocol:
    """The protocol of a name. Raises ProtocolError naming all of them."""
    if name not in PROTOCOLS:
        raise ProtocolError(f"There is no protocol '{name}'; use one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def windows(
    text: TokenizedText, protocol: Protocol, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Window]:
    """Cut a text into the windows of a protocol, the first `limit` of them.

    Raises CorpusError where the text is shorter than one window, ProtocolError where a BOS token is needed and the
    tokenizer has neither that nor an EOS token.
    """
    n, size = len(text.ids), protocol.window
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if protocol.bos and bos is None:
        raise ProtocolError(
            f"{protocol.name} needs a BOS token, which this tokenizer does not have; use edgelab-512."
        )
    if protocol.scored == "rolling":
        if n == 0:
            raise CorpusError("The text is empty; at least one token is needed.")
        return list(_rolling(text.ids, size, bos))[:limit]
    if n < size:
        raise CorpusError(
            f"The text '{text.name}' has {n} tokens, fewer than one window of {protocol.name} ({size}); "
            "use a longer text or lm-eval-word, which takes any length."
        )
    scored = size - 1 if protocol.scored == "all" else size - size // 2 - 1
    cut = []
    for begin in range(0, n - size + 1, protocol.stride)[:limit]:
        ids = text.ids[begin : begin + size]
        if protocol.bos:
            ids = torch.cat([torch.tensor([bos]), ids[1:]])
        cut.append(Window(ids, begin + size - scored, scored))
    return cut


def _rolling(ids: Tensor, size: int, prefix: int) -> Iterator[Window]:
    """lm-eval's rolling windows: every token is scored once; the last window is filled up with context."""
    padded = torch.cat([torch.tensor([prefix]), ids])  # padded[i + 1] is token i
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        context = begin if end - begin == size else max(end - size, 0)
        yield Window(padded[context : end + 1], begin, end - begin)


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


def slices(model: PreTrainedModel, cut: list[Window]) -> Iterator[Slice]:
    """Run a model over windows and give the logits of scored positions, in order, at most SLICE at a time.

    One window at a time: activations of 511 tokens stay in the cache of a CPU, those of a batch do not.
    """
    device = next(model.parameters()).device
    with torch.inference_mode(), prepacked(model, max((len(window.ids) - 1 for window in cut), default=1)):
        for index, window in enumerate(cut):
            ids = window.ids[None, :-1].to(device)  # (1, time)
            hidden = last_hidden_states(model, ids)  # (1, time, hidden)
            states = hidden[0, -window.scored :]  # (scored, hidden)
            targets = window.ids[-window.scored :].to(device)
            for part, answers in zip(states.split(SLICE), targets.split(SLICE), strict=True):
                yield Slice(index, head(model, part), answers, part)


def logit_slices(logits: Callable[[list[int]], Tensor], cut: list[Window]) -> Iterator[Slice]:
    """As `slices`, of anything that gives logits (time, vocabulary) for token ids of a new sequence."""
    for index, window in enumerate(cut):
        scored = logits(window.ids[:-1].tolist())[-window.scored :]
        targets = window.ids[-window.scored :]
        for part, answers in zip(scored.split(SLICE), targets.split(SLICE), strict=True):
            yield Slice(index, part.float(), answers, None)


def last_hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states (1, time, hidden) of tokens (1, time), in one pass.

    A model with a quantized cache (`cache_grid`) reads CHUNK tokens at a time through it, so that it attends to a
    quantized past, as in decoding; a chunk sees itself before it is rounded, so at most CHUNK - 1 tokens later.
    """
    grid = getattr(model, "cache_grid", None)
    if grid is None:
        return model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    cache = grid.new_cache(model.config)
    read = partial(model.base_model, past_key_values=cache, use_cache=True)
    return torch.cat([read(input_ids=chunk).last_hidden_state for chunk in ids.split(CHUNK, 1)], 1)


@contextmanager
def prepacked(model: PreTrainedModel, tokens: int, only_head: bool = False) -> Iterator[None]:
    """Run float32 linear layers on weights in oneDNN's blocked layout, made once instead of for every product.

    The products are the same up to the order of their float32 sums. tokens: rows of the usual input. The copies, as
    large as the layers, are gone afterwards. Other layers and machines without oneDNN are left as they are.
    """
    output = model.get_output_embeddings()
    usable = torch.backends.mkldnn.is_available() and next(model.parameters()).device.type == "cpu"
    layers = [
        layer
        for layer in ([output] if only_head else model.modules())
        if usable and type(layer) is nn.Linear and layer.weight.dtype == torch.float32
    ]
    try:
        for layer in layers:
            rows = SLICE if layer is output else tokens
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.forward = partial(_packed_forward, weight, layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packed_forward(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class PerplexitySum:
    """Adds up slices to a Perplexity; float64 sums over float32 cross-entropy."""

    def __init__(self, cut: list[Window]) -> None:
        self.nll = [0.0] * len(cut)
        self.cut = cut

    def add(self, piece: Slice) -> None:
        nll = -piece.log_probs.gather(1, piece.targets[:, None])[:, 0]  # (positions,)
        self.nll[piece.window] += nll.double().sum().item()

    def result(self, text: TokenizedText, protocol: Protocol) -> Perplexity:
        covered = [text.characters(window.first, window.first + window.scored) for window in self.cut]
        last = self.cut[-1]
        words = len(re.split(r"\s+", text.characters(0, last.first + last.scored)))  # as lm-eval counts them
        n_bytes = sum(len(characters.encode()) for characters in covered)
        tokens = [window.scored for window in self.cut]
        return Perplexity(self.nll, tokens, words, n_bytes, protocol.unit)


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
    total = PerplexitySum(cut)
    for piece in slices(model, cut):
        total.add(piece)
        for other in track:
            other.add(piece)
    return total.result(text, protocol)
