"""What a model needs and what a device has: every need is *analytic*, computed from shapes, none measured.

    weights    = parameters x bits / 8, and scales where the weights are quantized
    KV cache   = 2 x layers x kv_heads x head_dim x context x batch x kv_bits / 8
    training   = weights + gradients + optimizer moments (AdamW keeps two) + activations

GB is 10^9 bytes, MB 10^6. `data/models.csv` and `data/devices.csv` hold the figures and where they come from.
"""

from __future__ import annotations

import csv
import math
import platform
from dataclasses import dataclass
from typing import Any

import pandas as pd
import psutil

from edgelab.assets import data_dir
from edgelab.errors import EdgeLabError

SCALE_BITS = 16
OPTIMIZER_MOMENTS = {"sgd": 0, "momentum": 1, "adamw": 2}  # float32 values kept per parameter


class ShapeError(EdgeLabError):
    """A model layout or a memory setting that cannot be computed."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that determine how many parameters and bytes it has.

    attention_bias is "none", "qkv" or "all" (with the output projection); head_norms says whether queries and
    keys are normalised per head, as in Qwen3. The rotary position encoding of all these models has no
    parameters.
    """

    name: str
    model_type: str  # as transformers calls it
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    attention_bias: str = "none"
    mlp_bias: bool = False
    head_bias: bool = False
    norm: str = "rmsnorm"
    norms_per_layer: int = 2
    head_norms: bool = False
    context_length: int = 0
    source: str = ""

    @classmethod
    def from_config(cls, config: Any, name: str = "") -> ModelShape:
        """The shape of a transformers configuration of Llama, Mistral, Qwen2, Qwen3, Gemma, Phi or StableLM.

        Raises ShapeError, naming the supported layouts, for any other model_type and for query-key norms that
        are not Qwen3's.
        """
        layout = config.model_type
        if layout not in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "stablelm"):
            raise ShapeError(
                f"The parameters of a {layout!r} model cannot be counted from its configuration; "
                "supported are llama, mistral, qwen2, qwen3, gemma, phi and stablelm."
            )
        if getattr(config, "qk_layernorm", False):
            raise ShapeError(
                f"A {layout} model with qk_layernorm cannot be counted; only Qwen3's query-key norms can."
            )
        bias = "all" if layout == "phi" or getattr(config, "attention_bias", False) else "none"
        if layout == "qwen2" or getattr(config, "use_qkv_bias", False):
            bias = "qkv"
        one_norm = layout == "phi" or getattr(config, "use_parallel_residual", False)
        return cls(
            name=name or layout,
            model_type=layout,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            gated_mlp=layout != "phi",
            attention_bias=bias,
            mlp_bias=layout == "phi" or bool(getattr(config, "mlp_bias", False)),
            head_bias=layout == "phi",
            norm="layernorm" if layout in ("phi", "stablelm") else "rmsnorm",
            norms_per_layer=1 if one_norm else 2,
            head_norms=layout == "qwen3",
            context_length=config.max_position_embeddings,
        )

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every linear layer in one transformer layer; the head is apart."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = [(self.intermediate_size, self.hidden_size)] * (2 if self.gated_mlp else 1)
        attention = [
            (query, self.hidden_size),
            (key, self.hidden_size),
            (key, self.hidden_size),
            (self.hidden_size, query),
        ]
        return [*attention, *up, (self.hidden_size, self.intermediate_size)]

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head."""
        return self.layers * sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding and, where it is not the same matrix, of the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def other_parameters(self) -> int:
        """Norms and biases."""
        rows = [rows for rows, _ in self.linear_shapes]
        biased = {"none": [], "qkv": rows[:3], "all": rows[:4]}[self.attention_bias] + rows[
            4:
        ] * self.mlp_bias
        norm = self.hidden_size * (
            2 if self.norm == "layernorm" else 1
        )  # a LayerNorm has a bias, an RMSNorm has none
        layer = sum(biased) + self.norms_per_layer * norm + 2 * self.head_dim * self.head_norms
        return self.layers * layer + norm + self.vocab_size * self.head_bias

    @property
    def parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters


@dataclass(frozen=True)
class Device:
    """What a model runs on. A figure that no source gives is None.

    memory_gb is the size as sold. Memory sold as 8 GB holds 8 x 2^30 = 8.59 x 10^9 bytes; the difference of 7
    % is left to the operating system, which usually takes more.
    """

    name: str
    device_class: str
    memory_gb: float | None
    memory_bandwidth_gb_s: float | None = None  # peak
    memory_source: str = ""
    bandwidth_source: str = ""

    def holds(self, need: MemoryNeed) -> bool:
        """Whether the memory is at least as large as the need."""
        return self.memory_gb is not None and need.total_gb <= self.memory_gb


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
    zero-point, and norms and biases stay at 16 bits. `embedding_bits` is for embedding and head, by default
    `bits`. The activations are the widest moment of a prefill of the whole context in one pass: residual and
    normalised stream, the MLP's intermediate tensors, and float32 logits of the last token; attention scores
    are taken as never stored (as in FlashAttention). Engines that prefill in pieces need less, and every
    engine adds its own buffers.
    Raises ShapeError for sizes that are not positive.
    """
    _positive(bits=bits, context=context, batch=batch, kv_bits=kv_bits, activation_bits=activation_bits)
    if group_size < 0:
        raise ShapeError(f"group_size is {group_size}, but must be 0 (one group per row) or larger.")
    return MemoryNeed(
        weights_gb=_weight_bits(shape, bits, group_size, embedding_bits or bits) / 8e9,
        kv_cache_gb=_kv_cache_bits(shape, context * batch, kv_bits) / 8e9,
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


def kv_cache_mb_per_1k(shape: ModelShape, bits: int = 16) -> float:
    """MB of keys and values for 1,000 tokens of one sequence."""
    return _kv_cache_bits(shape, 1000, bits) / 8e6


def longest_context(
    shape: ModelShape,
    weights_gb: float,
    device: Device,
    kv_bits: int = 16,
    group_size: int = 32,
    residual: int = 32,
) -> int | None:
    """Tokens of one sequence whose keys and values fit the device's memory beside the weights; 0 where none do.

    Below 16 bits every `group_size` keys or values add a 16-bit scale and a 16-bit minimum, and the last `residual`
    tokens stay at 16 bits. Activations and the system are left out, and so is how far the model was trained to look
    (`shape.context_length`). None where the device's memory is not known.
    Raises ShapeError for sizes that are not positive.
    """
    _positive(kv_bits=kv_bits, group_size=group_size)
    if device.memory_gb is None:
        return None
    room = max(0.0, device.memory_gb - weights_gb) * 8e9
    full = _kv_cache_bits(shape, 1, max(kv_bits, 16))  # bits of one token
    recent = min(residual if kv_bits < 16 else 0, int(room // full))
    scales = _kv_cache_bits(shape, 1, 2 * SCALE_BITS) / group_size if kv_bits < 16 else 0
    return recent + int((room - recent * full) // (_kv_cache_bits(shape, 1, kv_bits) + scales))


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
        if device.memory_gb is not None
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("device")


def models() -> dict[str, ModelShape]:
    """The models of `data/models.csv` by name."""
    rows = [{name: _value(text) for name, text in row.items()} for row in _table("models.csv")]
    return {row["name"]: ModelShape(**row) for row in rows}


def catalogue() -> list[Device]:
    """The devices of `data/devices.csv`, from the smallest memory to the largest."""
    devices = [
        Device(
            name=row["name"],
            device_class=row["class"],
            memory_gb=float(row["memory_gb"]) if row["memory_gb"] else None,
            memory_bandwidth_gb_s=float(row["memory_bandwidth_gb_s"])
            if row["memory_bandwidth_gb_s"]
            else None,
            memory_source=row["memory_source"],
            bandwidth_source=row["bandwidth_source"],
        )
        for row in _table("devices.csv")
    ]
    return sorted(
        devices, key=lambda device: (device.memory_gb or math.inf, device.memory_bandwidth_gb_s or 0)
    )


def this_machine() -> Device:
    """The machine this runs on, with the memory its system reports; its bandwidth is not measured here."""
    return Device(
        name="This machine",
        device_class=platform.machine(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        memory_source="psutil",
    )


def _weight_bits(shape: ModelShape, bits: int, group_size: int, embedding_bits: int) -> int:
    embedding = (shape.vocab_size, shape.hidden_size)
    matrices = [(linear, shape.layers, bits) for linear in shape.linear_shapes]
    matrices.append((embedding, 1 if shape.tied_embeddings else 2, embedding_bits))
    total = shape.other_parameters * max(bits, 16)
    for (rows, columns), count, width in matrices:
        groups = math.ceil(columns / group_size) if group_size else 1
        scales = rows * groups * (SCALE_BITS + width) if width < 16 else 0
        total += count * (rows * columns * width + scales)
    return total


def _kv_cache_bits(shape: ModelShape, tokens: int, bits: int) -> int:
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * bits  # keys and values


def _layer_activations(shape: ModelShape) -> int:
    """Values per token that live at once inside an MLP: two streams, and gate, up and their product."""
    return 2 * shape.hidden_size + (3 if shape.gated_mlp else 2) * shape.intermediate_size


def _positive(**settings: int) -> None:
    for name, value in settings.items():
        if value <= 0:
            raise ShapeError(f"{name} is {value}, but must be at least 1.")


def _table(file: str) -> list[dict[str, str]]:
    with (data_dir() / file).open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _value(text: str) -> int | bool | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isdigit() else text
