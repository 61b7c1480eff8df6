"""What ExecuTorch runs: a model with attention and cache as its own operators, lowered to XNNPACK.

One method, `forward(ids, start, kept)`: the next tokens of a sequence (1, time), their first position (1,) and the
places among them whose logits are wanted (places,); time and places may be anything up to CHUNK. It returns
(1, places, vocabulary). Keys and values are buffers of the program.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401, registers embedding_byte
from torch import Tensor, nn
from torch.nn import functional
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import GELUTanh
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgelab.model.logits import final_cap

CHUNK = 512  # tokens at once; memory for their logits is planned, not touched
ROOM = 2048  # tokens of the cache
GROUP = 32  # inputs under one scale of native.int4
OPS = torch.ops.quantized_decomposed  # what XNNPACK knows; each is one step of tracing, torchao's are a dozen
LINEAR_ONLY = "dqlinear_partitioner"  # one pass over each piece; all seventeen of XNNPACK do no more
ATTENTION = "edgelab_executorch"  # a name that transformers has no mask for: the operator masks by itself


class StateCache:
    """Keys and values in buffers (1, ROOM, heads, head_dim), as transformers' models use a cache."""

    def __init__(self, owner: nn.Module, config: PretrainedConfig, room: int) -> None:
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.owner = owner
        for layer in range(config.num_hidden_layers):
            for name in ("keys", "values"):
                empty = torch.zeros(1, room, heads, head_dim)
                owner.register_buffer(f"{name}_{layer}", empty, persistent=False)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write (1, heads, time, head_dim) from `start` on; returns the buffers."""
        kept = []
        for name, new in (("keys", keys), ("values", values)):
            buffer = getattr(self.owner, f"{name}_{layer}")
            torch.ops.llama.update_cache(new.transpose(1, 2).contiguous(), buffer, self.owner.start)
            kept.append(buffer)
        return kept[0], kept[1]

    def get_seq_length(self, *_: object) -> int:
        """Positions are given."""
        return 0


def attend(
    layer: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: None, **kwargs: object
) -> tuple[Tensor, None]:
    """Causal attention of (1, heads, time, head_dim) to all that the buffers hold; (1, time, heads, head_dim).

    A window goes to the operator as a mask. A cap on the scores is none of its settings: such attention is written out.
    """
    start, scaling = layer.step.start, kwargs.get("scaling")
    window, cap = kwargs.get("sliding_window"), kwargs.get("softcap")
    seen = None if window is None and cap is None else within(window, start, query.shape[2], keys.shape[1])
    if cap is not None:
        return capped(query, keys, values, seen, scaling, cap), None
    found = torch.ops.llama.custom_sdpa(
        query.transpose(1, 2).contiguous(), keys, values, start, seen, 0.0, seen is None, scaling
    )
    return found, None


def within(window: int | None, start: int, time: int, room: int) -> Tensor:
    """What is added to scores, (time, room): 0 for the last `window` tokens up to each, minus infinity for others."""
    queries, keys = torch.arange(time)[:, None] + start, torch.arange(room)[None]
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    return torch.where(seen, 0.0, float("-inf"))


def capped(query: Tensor, keys: Tensor, values: Tensor, added: Tensor, scaling: float, cap: float) -> Tensor:
    """Attention whose scores go through cap x tanh(score / cap) before the softmax; as `attend` otherwise."""
    groups = query.shape[1] // keys.shape[2]
    keys, values = (one.transpose(1, 2).repeat_interleave(groups, 1) for one in (keys, values))
    scores = torch.tanh(query @ keys.transpose(2, 3) * (scaling / cap)) * cap + added
    return (scores.softmax(-1) @ values).transpose(1, 2)


class Step(nn.Module):
    """A model with its cache as a function of the next tokens; see the head of this file. Changes the model."""

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        super().__init__()
        self.model, self.start, self.room = model, 0, room
        for name, layer in list(model.named_modules()):
            if isinstance(layer, GELUTanh):
                model.set_submodule(name, Tanh())
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        self.cache = StateCache(self, model.config, room)
        self.cap = final_cap(model.config)
        for layer in model.modules():
            if hasattr(layer, "layer_idx") and hasattr(layer, "head_dim"):
                object.__setattr__(layer, "step", self)  # no submodule: it would be its own child

    def forward(self, ids: Tensor, start: Tensor, kept: Tensor) -> Tensor:
        self.start = start[0].item()
        torch._check(self.start >= 0)
        torch._check(self.start + ids.shape[1] <= self.room)
        places = (torch.arange(ids.shape[1]) + self.start)[None]
        hidden = self.model.base_model(
            input_ids=ids, position_ids=places, past_key_values=self.cache, use_cache=True
        )[0]
        logits = self.model.lm_head(hidden[:, kept])
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class Rounded(nn.Module):
    """A layer of torchao as plain operators, in the pattern that XNNPACK knows: exporting them takes far less time."""

    def __init__(self, layer: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        weight = layer.weight
        self.looks_up, self.block, self.bias = isinstance(layer, nn.Embedding), weight.block_size, None
        self.low, self.high = (-8, 7) if weight.target_dtype == torch.int4 else (-128, 127)
        rows = self.block[1] == weight.shape[1]  # one scale each
        self.multiplier = getattr(layer, "scalar_embed_scale", None)  # of Gemma's embedding
        self.register_buffer("qdata", weight.qdata)
        for name in ("scale", "zero_point"):
            values = getattr(weight, name)
            self.register_buffer(name, values.flatten() if rows else values)
        if getattr(layer, "bias", None) is not None:
            self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        if self.looks_up:
            rows = OPS.embedding_byte(self.qdata, self.scale, None, self.low, self.high, inputs)
            return rows if self.multiplier is None else rows * self.multiplier
        limits = (-128, 127, torch.int8)
        scale, zero_point = OPS.choose_qparams_per_token_asymmetric(inputs, torch.int8)
        integers = OPS.quantize_per_token(inputs, scale, zero_point, *limits)
        inputs = OPS.dequantize_per_token(integers, scale, zero_point, *limits, torch.float32)
        return functional.linear(inputs, self._weight(), self.bias)

    def _weight(self) -> Tensor:
        limits = (self.low, self.high, torch.int8)
        if self.scale.dim() == 1:
            return OPS.dequantize_per_channel(self.qdata, self.scale, self.zero_point, 0, *limits)
        group = (self.block[1], torch.float32)
        return OPS.dequantize_per_channel_group(self.qdata, self.scale, self.zero_point, *limits, *group)


class Tanh(nn.Module):
    """GELU in its form with a hyperbolic tangent, written out: XNNPACK computes the exact one under that name."""

    def forward(self, inputs: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs * inputs * inputs)
        return 0.5 * inputs * (1 + torch.tanh(inner))


def round_weights(model: PreTrainedModel, width: str) -> None:
    """Round with torchao, in place: linear layers to `width`, the embedding to int8, one scale per row."""
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # no longer the embedding's
    dtype, granularity = (torch.int4, PerGroup(GROUP)) if width == "int4" else (torch.int8, PerAxis(0))
    quantize_(
        model, Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    )
    whole = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(model, whole, lambda layer, _: isinstance(layer, nn.Embedding))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | nn.Embedding):
            model.set_submodule(name, Rounded(layer))


def write(model: PreTrainedModel, native: str | None, file: Path) -> None:
    """Round if wanted, trace, lower to XNNPACK and write the program. Changes the model."""
    with _uncollected():
        _write(model, native, file)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Tracing makes millions of objects that stay; looking for garbage among them takes a fifth of its time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _write(model: PreTrainedModel, native: str | None, file: Path) -> None:
    room = min(ROOM, model.config.max_position_embeddings)
    chunk = min(CHUNK, room // 2)
    if native is not None:
        round_weights(model, native)
    step = Step(model.eval(), room).eval()
    some = {"min": 1, "max": chunk}
    time, places = torch.export.Dim("time", **some), torch.export.Dim("places", **some)
    example = torch.zeros(1, 5, dtype=torch.long), torch.tensor([0]), torch.arange(3)
    with torch.no_grad():
        shapes = ({1: time}, {}, {0: places})
        traced = torch.export.export(step, example, dynamic_shapes=shapes, strict=False)
    notes = {"room": room, "chunk": chunk, "bits": int(native.removeprefix("int")) if native else 32}
    settings = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    to_xnnpack = XnnpackPartitioner()
    backend = to_xnnpack.delegation_spec.backend_id
    to_xnnpack.delegation_spec = DelegationSpec(backend, [CompileSpec(LINEAR_ONLY, b"")])
    lowered = to_edge_transform_and_lower(
        traced, partitioner=[to_xnnpack], compile_config=settings, constant_methods=notes
    )
    program = lowered.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
    with file.open("wb") as stream:
        program.write_to_file(stream)
