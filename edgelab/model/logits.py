"""From tokens to hidden states, from hidden states to logits, without all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.model.marks import marks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 32  # tokens that a model with a quantized cache reads at a time
SLICE = 64  # positions whose logits exist at one time: 12.6 MB in float32 for a vocabulary of 49,152


def final_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Hidden states before the head, (batch, time, hidden), of token ids (batch, time)."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits (..., vocabulary) of hidden states (..., hidden)."""
    config = model.config
    logits = model.get_output_embeddings()(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else cap * torch.tanh(logits / cap)


def last_hidden_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Final hidden states (1, time, hidden) of tokens (1, time), in one pass.

    A model marked with a quantized cache reads CHUNK tokens at a time through it, so that it attends to a
    quantized past, as in decoding; a chunk sees itself before it is rounded, so at most CHUNK - 1 tokens later.
    """
    grid = marks_of(model).cache
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
