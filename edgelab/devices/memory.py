"""What a model needs in memory: every need is *analytic*, computed from shapes, none measured.

    weights    = parameters x bits / 8, and scales where the weights are quantized
    KV cache   = 2 x layers x kv_heads x head_dim x context x batch x kv_bits / 8, below 16 bits with scales and minima;
                 a layer with a window keeps no more tokens than that
    training   = weights + gradients + optimizer moments (AdamW keeps two) + activations

GB is 10^9 bytes, MB 10^6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd

from edgelab.devices.catalogue import Device, catalogue
from edgelab.devices.shapes import ModelShape, ShapeError

SCALE_BITS = 16
OPTIMIZER_MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2}  # float32 values kept per parameter


@dataclass(frozen=True)
class MemoryNeed:
    """Memory by what fills it, in GB of 10^9 bytes, computed from shapes."""

    weights_gb: float
    kv_cache_gb: float = 0.0
    gradients_gb: float = 0.0
    optimizer_gb: float = 0.0
    activations_gb: float = 0.0
    badge: str = "analytic"

    @property
    def total_gb(self) -> float:
        return (
            self.weights_gb + self.kv_cache_gb + self.gradients_gb + self.optimizer_gb + self.activations_gb
        )


def inference_memory(
    shape: ModelShape,
    bits: int = 16,
    context: int = 2048,
    batch: int = 1,
    kv_bits: int = 16,
    group_size: int = 0,
    embedding_bits: int | None = None,
    activation_bits: int = 16,
) -> MemoryNeed:
    """Memory for generating up to `context` tokens in each of `batch` sequences.

    Below 16 bits every group of `group_size` inputs (0: every row) adds a 16-bit scale and a `bits`-bit
    zero-point, and norms and biases stay at 16 bits; what the cache adds is in `head_cache_bytes`. `embedding_bits`
    is for embedding and head, by default `bits`. The activations are the widest moment of a prefill of the
    whole context in one pass: residual and normalised stream, the MLP's intermediate tensors, and float32 logits
    of the last token; attention scores are taken as never stored (as in FlashAttention). Engines that prefill in
    pieces need less, and every engine adds its own buffers.
    Raises ShapeError for sizes that are not positive.
    """
    _positive(bits=bits, context=context, batch=batch, kv_bits=kv_bits, activation_bits=activation_bits)
    if group_size < 0:
        raise ShapeError(f"group_size is {group_size}, but must be 0 (one group per row) or larger.")
    return MemoryNeed(
        weights_gb=_weight_bits(shape, bits, group_size, embedding_bits or bits) / 8e9,
        kv_cache_gb=kv_cache_bytes(shape, context, kv_bits) * batch / 1e9,
        activations_gb=(context * _layer_activations(shape) * activation_bits + shape.vocab_size * 32)
        * batch
        / 8e9,
    )


def training_memory(
    shape: ModelShape, optimizer: str = "adamw", bits: int = 32, context: int = 512, batch: int = 1
) -> MemoryNeed:
    """Memory for training all parameters, with activation checkpointing (Chen et al. 2016, arXiv:1604.06174).

    32 bits: weights, gradients and moments in float32, 16 bytes per parameter with AdamW, four times the
    weights. 16 bits: weights and gradients in 16 bits, moments and a copy of the weights in float32
    (Micikevicius et al. 2018, arXiv:1710.03740), which comes to the same 16 bytes. Activations: the input of
    every layer, the tensors of the one layer being recomputed and their gradients, and float32 logits with
    theirs.
    Raises ShapeError for other bits and for an optimizer other than sgd, momentum and adamw.
    """
    _positive(context=context, batch=batch)
    if optimizer not in OPTIMIZER_MOMENTS:
        raise ShapeError(f"No optimizer is called {optimizer!r}; there are {', '.join(OPTIMIZER_MOMENTS)}.")
    if bits not in (16, 32):
        raise ShapeError(f"Weights cannot be trained in {bits} bits; 16 and 32 work.")
    tokens, master_copy = context * batch, bits == 16
    activations = shape.layers * shape.hidden_size + 2 * _layer_activations(shape)  # per token
    return MemoryNeed(
        weights_gb=shape.parameters * bits / 8e9,
        gradients_gb=shape.parameters * bits / 8e9,
        optimizer_gb=shape.parameters * 32 * (OPTIMIZER_MOMENTS[optimizer] + master_copy) / 8e9,
        activations_gb=tokens * (activations * bits + 2 * shape.vocab_size * 32) / 8e9,
    )


def stored_bits(
    bits: float, group_size: float, zero_point: bool = True, scale_bits: int = SCALE_BITS
) -> float:
    """Bits of a weight with its share of what its group stores: a scale, and a zero-point of `bits` bits."""
    return bits + (scale_bits + bits * zero_point) / group_size


def kv_cache_mb_per_1k(shape: ModelShape, bits: int = 16) -> float:
    """MB of keys and values of one sequence of 1,000 tokens."""
    return kv_cache_bytes(shape, 1000, bits) / 1e6


def kv_cache_bytes(
    shape: ModelShape, tokens: int, bits: int = 16, group_size: int = 32, residual: int = 32
) -> float:
    """Bytes of the keys and values of one sequence, of the last `window` tokens in windowed layers.

    See `head_cache_bytes`.
    """
    layers = {tokens: shape.layers}
    if shape.window < tokens:
        layers = {tokens: shape.layers - shape.windowed_layers, shape.window: shape.windowed_layers}
    return sum(
        count * shape.kv_heads * head_cache_bytes(shape.head_dim, held, bits, group_size, residual)
        for held, count in layers.items()
    )


def head_cache_bytes(
    head_dim: int, tokens: int, bits: int, group_size: int = 32, residual: int = 32, recent_bits: float = 16
) -> float:
    """Bytes of the keys and values of one head in one layer, as `edgelab.storage.kv_cache` holds them.

    From 16 bits on, all numbers take so many. Below, the last `residual` tokens keep `recent_bits`; what is older is
    packed, `group_size` tokens at a time, with a 16-bit scale and a 16-bit minimum for every group: of a channel of
    the keys over so many tokens, and of a token of the values over as many channels.
    """
    numbers = 2 * head_dim  # of a token
    if bits >= SCALE_BITS:
        return tokens * numbers * bits / 8
    packed = max(0, (tokens - residual) // group_size) * group_size
    groups = packed // group_size * head_dim + packed * math.ceil(head_dim / group_size)
    stored = packed * numbers * bits + groups * 2 * SCALE_BITS
    return (stored + (tokens - packed) * numbers * recent_bits) / 8


def longest_context(
    shape: ModelShape,
    weights_gb: float,
    device: Device,
    kv_bits: int = 16,
    group_size: int = 32,
    residual: int = 32,
) -> int | None:
    """Tokens of one sequence whose keys and values fit a device next to the weights; 0 where none do.

    Below 16 bits every `group_size` keys or values add a 16-bit scale and a 16-bit minimum, and the last `residual`
    tokens stay at 16 bits. Activations are left out, and so is how far the model was trained to look
    (`shape.context_length`). None where the device's memory is not known.
    Raises ShapeError for sizes that are not positive.
    """
    _positive(kv_bits=kv_bits, group_size=group_size)
    if device.room_gb is None:
        return None
    room, plain = max(0.0, device.room_gb - weights_gb) * 1e9, replace(shape, windowed_layers=0)

    def held(tokens: int, shape: ModelShape = plain) -> float:
        return kv_cache_bytes(shape, tokens, kv_bits, group_size, residual)

    recent = min(residual, int(room // held(1))) if residual else 0
    packed = (held(residual + group_size) - held(residual)) / group_size  # bytes of a token
    found = recent + int((room - held(recent)) // packed)
    if found <= shape.window or not 0 < shape.windowed_layers < shape.layers:
        return found
    windows = held(shape.window, replace(plain, layers=shape.windowed_layers)) / 1e9
    others = replace(plain, layers=shape.layers - shape.windowed_layers)
    return longest_context(others, weights_gb + windows, device, kv_bits, group_size, residual)


def context_table(
    shape: ModelShape,
    weights_gb: float,
    devices: list[Device] | None = None,
    kv_bits: tuple[int, ...] = (16, 8, 4, 2),
) -> pd.DataFrame:
    """`longest_context` of every device (the catalogue's by default), a row each, and a column for each `kv_bits`."""
    rows = {
        device.name: {
            "memory_gb": device.memory_gb,
            **{f"{bits}-bit cache": longest_context(shape, weights_gb, device, bits) for bits in kv_bits},
        }
        for device in (catalogue() if devices is None else devices)
        if device.room_gb is not None
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("device")


def _weight_bits(shape: ModelShape, bits: int, group_size: int, embedding_bits: int) -> float:
    embedding = (shape.vocab_size, shape.hidden_size)
    matrices = [(linear, shape.layers, bits) for linear in shape.linear_shapes]
    matrices.append((embedding, 1 if shape.tied_embeddings else 2, embedding_bits))
    total = shape.other_parameters * max(bits, 16)
    for (rows, columns), count, width in matrices:
        groups = math.ceil(columns / group_size) if group_size else 1
        total += count * rows * columns * (stored_bits(width, columns / groups) if width < 16 else width)
    return total


def _layer_activations(shape: ModelShape) -> int:
    """Values per token that live at once inside an MLP: two streams, and gate, up and their product."""
    return 2 * shape.hidden_size + (3 if shape.gated_mlp else 2) * shape.intermediate_size


def _positive(**settings: int) -> None:
    for name, value in settings.items():
        if value <= 0:
            raise ShapeError(f"{name} is {value}, but must be at least 1.")
