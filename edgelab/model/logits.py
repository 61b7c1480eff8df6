"""From tokens to hidden states, from hidden states to logits, without all logits at once."""

from __future__ import annotations

import copy
import logging
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edgelab.errors import EdgeLabError
from edgelab.model.blocks import longest
from edgelab.model.finite import NotFiniteError, first_module
from edgelab.model.marks import marks_of

if TYPE_CHECKING:
    from transformers import Cache, PretrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

PROBE = 8  # tokens on which a model is compared with its own forward pass
TOLERANCE = 1e-3  # of the norm of the logits; another order of sums changes 1e-6 of it
CHUNK = 32  # tokens that a model with a quantized cache reads at a time
SLICE = 64  # positions whose logits exist at one time: 12.6 MB in float32 for a vocabulary of 49,152


class LogitsError(EdgeLabError):
    """A model whose logits are not to be had as edgelab reads models, or that cannot read so much."""


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model is. One whose weights are all packed has no parameter left, but buffers."""
    return next(chain(model.parameters(), model.buffers())).device


def _base(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Name and module of what a model has before its head: its base model, or else the part with the embedding."""
    if (name := model.base_model_prefix) in model._modules:
        return name, model._modules[name]
    embedding = model.get_input_embeddings()
    return next((name, part) for name, part in model.named_children() if embedding in part.modules())


def hidden_states(model: PreTrainedModel, ids: Tensor, cache: Cache | None = None) -> Tensor:
    """Hidden states before the head, (batch, time, hidden), of token ids (batch, time) that follow those of the cache.

    Raises LogitsError for a token that the embedding has no row for, for more tokens than a model with a table of
    positions can read, and where the cache was read with other rotary frequencies.
    """
    if cache is not None and short_text(model.config) < math.inf:
        check_frequencies(model.config, cache.get_seq_length(), ids.shape[1])
    after = {} if cache is None else {"past_key_values": cache}
    try:
        return _base(model)[1](input_ids=ids, use_cache=cache is not None, **after)[0]
    except (IndexError, RuntimeError) as error:
        rows, largest = model.config.get_text_config().vocab_size, int(ids.max())
        if largest >= rows:
            raise LogitsError(
                f"The embedding of {type(model).__name__} has {rows:,} rows, and none for token {largest:,}; give a "
                "text without it."
            ) from None
        length = ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        if length <= longest(model) or "allocate" in str(error):
            raise
        raise LogitsError(
            f"{type(model).__name__} reads at most {longest(model)} tokens, not {length}; "
            "use a shorter window or prompt."
        ) from None


def short_text(config: PretrainedConfig) -> float:
    """Tokens of the longest text with the first of the two sets of frequencies of LongRoPE; infinity without it.

    In a longer text all tokens have the second set, those at its beginning, too.
    Ding et al. 2024, arXiv:2402.13753; as transformers does it.
    """
    settings = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return (
        settings["original_max_position_embeddings"] if settings.get("rope_type") == "longrope" else math.inf
    )


def check_frequencies(config: PretrainedConfig, before: int, more: int) -> None:
    """Raise LogitsError where a text of `before` tokens, gone on with by some more, gets other rotary frequencies."""
    if 0 < before <= (short := short_text(config)) < before + more:
        raise LogitsError(
            f"Texts of more than {short:,} tokens have other rotary frequencies in this model (LongRoPE), and "
            f"{before:,} tokens were read with those of shorter ones; read the whole text at once, or a shorter one."
        )


def final_cap(config: PretrainedConfig) -> float | None:
    """What the logits of a Gemma 2 or 3 go through, cap x tanh(logit / cap), for who writes the head out; else None."""
    return config.final_logit_softcapping if config.model_type in ("gemma2", "gemma3_text") else None


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits (..., vocabulary) of hidden states (..., hidden).

    The model's own forward pass computes them, its base model replaced by one that answers with `hidden`: so any scale,
    cap, bias or further layer between the two is the model's.
    """
    flat = hidden.reshape(1, -1, hidden.shape[-1])
    head = copy.copy(model)
    name, base = _base(model)
    head._modules = model._modules | {name: _answering(base, flat)}
    ids = torch.zeros(flat.shape[:2], dtype=torch.long, device=flat.device)
    logits = head(input_ids=ids, use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], -1).float()


def _answering(module: nn.Module, hidden: Tensor) -> nn.Module:
    """A copy of a base model that answers with these hidden states, whatever it is asked; so does its decoder."""
    twin = copy.copy(module)
    twin.forward = lambda *_, **__: _Answer(hidden)
    if "decoder" in module._modules:  # which is what the models made from an encoder and a decoder ask
        twin._modules = module._modules | {"decoder": _answering(module.decoder, hidden)}
    return twin


class _Answer:
    """What a base model returns: hidden states, and None for all else that there may be."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: int | slice) -> Tensor | tuple[Tensor, ...]:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def last_hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states (1, time, hidden) of tokens (1, time), in one pass.

    A model marked with a quantized cache reads CHUNK tokens at a time through it, so that it attends to a
    quantized past, as in decoding; a chunk sees itself before it is rounded, so at most CHUNK - 1 tokens later.
    """
    grid = marks_of(model).cache
    if grid is None:
        return hidden_states(model, ids)
    cache = grid.new_cache(model.config)
    return torch.cat([hidden_states(model, chunk, cache) for chunk in ids.split(CHUNK, 1)], 1)


def head_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """What `head_logits` computes with: a head that is tied to the embedding is both there and in the base model."""
    output, (_, base) = model.get_output_embeddings(), _base(model)
    within = {id(parameter) for parameter in base.parameters()}
    own = [] if output is None else list(output.parameters())
    return own + [p for p in model.parameters() if id(p) not in within | {id(one) for one in own}]


def check_logits(model: PreTrainedModel) -> None:
    """Compare what is computed here with the model's own logits, on a few tokens.

    Once in one pass, as texts are scored, and once in two pieces with a cache, as sessions read. Raises LogitsError
    where either differs by more than the order of sums.
    """
    name = type(model).__name__
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(2, 2 + PROBE, device=device_of(model))[None] % vocabulary
    with torch.inference_mode():
        try:
            expected = model(input_ids=ids, use_cache=False).logits.float()
            whole = head_logits(model, hidden_states(model, ids))
            cache = DynamicCache(config=model.config)
            pieces = torch.cat([hidden_states(model, piece, cache) for piece in ids.split(PROBE // 2, 1)], 1)
            pieces = head_logits(model, pieces).view_as(expected)
        except Exception as error:  # of any model of transformers
            log.debug("the model cannot be read", exc_info=True)
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150, placeholder=" …")
            raise LogitsError(
                f"{name} cannot be read as a decoder with a cache ({reason}); give a causal "
                "model that reads tokens alone and keeps keys and values."
            ) from None
    if not expected.amax(-1).isfinite().all():  # what a model rules out has minus infinity
        raise not_finite(model, ids)
    possible = expected.isfinite()
    for found, how in (
        (whole, "made from its last hidden states"),
        (pieces, "read in two pieces with a cache"),
    ):
        if not (found - expected)[possible].norm() <= TOLERANCE * expected[possible].norm():
            raise LogitsError(
                f"The logits of {name}, {how}, are not those of its forward pass, so that measurements would be "
                "wrong; give a causal model that reads tokens alone and keeps keys and values."
            )


def not_finite(model: PreTrainedModel, ids: Tensor) -> NotFiniteError:
    """The error for tokens (1, time) whose logits are not finite, which names the module where that begins."""
    with torch.inference_mode():
        first = first_module(model, partial(last_hidden_states, model, ids))
    return NotFiniteError(
        f"The output of {first or 'the head'} in {type(model).__name__} is NaN or infinite; use more bits or a number "
        "format that reaches further, such as quantize.bf16 in place of quantize.fp16."
    )


@contextmanager
def prepacked(model: PreTrainedModel, tokens: int, only_head: bool = False) -> Iterator[None]:
    """Run float32 linear layers on weights in oneDNN's blocked layout, made once instead of for every product.

    The products are the same up to the order of their float32 sums. tokens: rows of the usual input. The copies, as
    large as the layers, are gone afterwards. Other layers and machines without oneDNN are left as they are.
    """
    output = model.get_output_embeddings()
    usable = torch.backends.mkldnn.is_available() and device_of(model).type == "cpu"
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
