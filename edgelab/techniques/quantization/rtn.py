"""Round-to-nearest: zero-shot uniform quantization of the weights, one scale and zero-point per group.

scale = (max(w, 0) - min(w, 0)) / (2**bits - 1)      zero_point = round(-min(w, 0) / scale)
q = clamp(round(w / scale) + zero_point, 0, 2**bits - 1)      w ~ (q - zero_point) * scale

The range from min to max is the first choice and not the best one: see `ranges`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.errors import listed
from edgelab.model.blocks import float_linear, looks_at_weight
from edgelab.recipes import Context, RecipeError, Record, register
from edgelab.storage.codebook import CodebookTensor
from edgelab.storage.layers import PackedEmbedding, PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.ranges import Range, find_grid, round_to_grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "GroupSizeError",
    "RoundToNearest",
    "check_group_size",
    "check_settings",
    "in_groups",
    "linear_layers",
    "quantize_affine",
    "quantize_embedding",
    "replace_linear",
    "round_rest",
]


SMALLEST_GROUP = 32  # that engines and files have


class GroupSizeError(RecipeError):
    """The group size does not divide the inputs of a layer."""


def quantize_affine(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    per_tensor: bool = False,
    range: Range = "minmax",
    percentile: float = 99.9,
) -> QuantizedTensor:
    """Round `weight` onto a uniform grid, one scale and zero-point per group of inputs, or one for the matrix.

    weight: (out_features, in_features), float. group_size must divide in_features; 0 means one group per row.
    Returns integers in [0, 2**bits - 1] of the same shape, scale and zero_point (uint8) of shape
    (out_features, groups), per_tensor (1, 1); zero_point is None where symmetric, and then stands for 2**(bits - 1).
    Raises GroupSizeError, naming group sizes that fit, where group_size does not divide in_features.
    Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """
    groups = in_groups(weight, group_size)  # (out, groups, group_size)
    if per_tensor:
        groups = groups.reshape(1, 1, -1)
    scale, zero_point = find_grid(groups, bits, symmetric, range, percentile)
    integers = round_to_grid(groups, scale, zero_point, bits)
    return QuantizedTensor(integers.to(torch.uint8).reshape(weight.shape), scale, zero_point, bits)


def in_groups(weight: Tensor, group_size: int) -> Tensor:
    """Reshape (out_features, in_features) to (out_features, groups, group_size), float32. Raises GroupSizeError."""
    out_features, in_features = weight.shape
    check_group_size(group_size, [in_features])
    return weight.float().reshape(out_features, -1, group_size or in_features)


def check_group_size(group_size: int, in_features: list[int]) -> None:
    """Raise GroupSizeError, naming group sizes that fit all layers, where one is not divided by group_size."""
    if group_size < 0 or any(group_size and inputs % group_size for inputs in in_features):
        widths = sorted(set(in_features))
        fitting = [
            str(size)
            for size in range(SMALLEST_GROUP, min(widths) + 1, SMALLEST_GROUP)
            if all(w % size == 0 for w in widths)
        ]
        raise GroupSizeError(
            f"group_size={group_size} does not divide the {listed(widths)} inputs of the layers; "
            f"use {', '.join([*fitting, '0 (one group per row)'])}."
        )


def check_settings(method: str, group_size: int, bits: int | None = None) -> None:
    """Raise RecipeError, before there is a model, for a negative group_size or bits outside 2 to 8."""
    if bits is not None and not 2 <= bits <= 8:
        raise RecipeError(f"{method}:bits={bits} is outside 2 to 8.")
    if group_size < 0:
        raise RecipeError(f"{method}:group_size={group_size} is negative; 0 means one group per row.")


@register("quantize.rtn", shown=("bits", "group_size"))
@dataclass(frozen=True)
class RoundToNearest:
    """Round every linear layer but the head; quantize.embedding rounds that and the embedding.

    bits: 2 to 8. group_size: inputs that share a scale, 0 for a whole row. symmetric: zero-point in the middle.
    per_tensor: one scale for a whole matrix, with group_size=0. range: how the ends of the grid are chosen;
    percentile: above 50 to 100, where that is the range.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    per_tensor: bool = False
    range: Range = "minmax"
    percentile: float = 99.9

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size, self.bits)
        if self.per_tensor and self.group_size:
            raise RecipeError(
                f"quantize.rtn:per_tensor=true has no groups of {self.group_size}; write group_size=0 beside it."
            )
        if not 50 < self.percentile <= 100:
            raise RecipeError(
                f"quantize.rtn:percentile={self.percentile} is outside what is above 50 and at most 100."
            )
        if self.percentile != 99.9 and self.range != "percentile":
            raise RecipeError(
                f"quantize.rtn:percentile={self.percentile} has no effect with range={self.range}; "
                "write range=percentile beside it."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the rounded layers."""
        return replace_linear(
            model,
            context,
            quantize_affine,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            per_tensor=self.per_tensor,
            range=self.range,
            percentile=self.percentile,
        )


def linear_layers(
    model: PreTrainedModel, record: Record | None = None, packed: bool = False, group_size: int = 0
) -> dict[str, nn.Linear | PackedLinear]:
    """Every linear layer but the output head, by name.

    record: where what stays in float is noted, such as the weights of experts that are no linear layers. packed:
    whether layers may be quantized already. group_size: that of rounding, where it goes by groups; tiny layers with
    fewer inputs, as Gemma 3n mixes its streams with, are left out then. Raises RecipeError where a layer is quantized
    and may not be, or where none is found.
    """
    head = model.get_output_embeddings()
    in_float = float_linear(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, PackedLinear) or name in in_float) and module is not head
    }
    quantized = [name for name, module in layers.items() if isinstance(module, PackedLinear)]
    if quantized and not packed:
        raise RecipeError(
            f"{len(quantized)} of {len(layers)} linear layers are quantized already, {quantized[0]} first; put "
            "quantize.unpack before what shall change them again."
        )
    others = _other_matrices(model, layers)
    tiny = {
        name: layer.weight.numel()
        for name, layer in layers.items()
        if name in in_float and layer.in_features < group_size and max(layer.weight.shape) < SMALLEST_GROUP
    }
    layers = {name: layer for name, layer in layers.items() if name not in tiny}
    if not layers:
        kinds = {type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in others}
        raise RecipeError(
            f"{type(model).__name__} has no linear layers (torch.nn.Linear) that could be changed, but matrices in "
            f"{', '.join(sorted(kinds)) or 'embeddings alone'}; use a model built from linear layers, such as a Llama."
        )
    if record is not None:
        _note(record, "outside of plain linear layers", others)
        _note(record, f"of layers smaller than a group of {group_size}", tiny)
    return layers


def _note(record: Record, where: str, sizes: dict[str, int]) -> None:
    """Note parameters that stay in float, once. sizes: how many by name."""
    names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in sizes)  # the same in every block
    note = f"{sum(sizes.values()):,} parameters {where} stay in float: {', '.join(names)}."
    if sizes and note not in record.notes:
        record.notes.append(note)


def _other_matrices(model: PreTrainedModel, layers: dict[str, nn.Module]) -> dict[str, int]:
    """Size of every parameter of two dimensions and more that is in no linear layer, embedding or head, by name."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    known = [*layers.values(), *(one for one in ends if one is not None)]
    inside = {id(parameter) for module in known for parameter in module.parameters()}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and id(parameter) not in inside
    }


def round_rest(model: PreTrainedModel, context: Context, bits: int, group_size: int, symmetric: bool) -> None:
    """Round to nearest, in place, the linear layers that a technique has not reached, and note it.

    These are layers outside of the blocks, and those that no calibration text runs, such as an expert never chosen.
    """
    head = model.get_output_embeddings()
    rest = {name: layer for name, layer in float_linear(model).items() if layer is not head}
    for name, layer in rest.items():
        tensor = quantize_affine(layer.weight.detach(), bits, group_size, symmetric)
        model.set_submodule(name, PackedLinear(tensor, layer.bias))
    if rest:
        context.record.notes.append(
            f"Layers that calibration does not reach are rounded to nearest: {', '.join(rest)}."
        )


def replace_linear(
    model: PreTrainedModel,
    context: Context,
    quantize: Callable[..., QuantizedTensor | CodebookTensor],
    *,
    group_size: int,
    **settings: object,
) -> PreTrainedModel:
    """A copy of the model with PackedLinear over quantize(weight, group_size=..., **settings) in `linear_layers`.

    Raises GroupSizeError, before it starts, where group_size does not divide the inputs of every one of them.
    """
    layers = linear_layers(model, context.record, group_size=group_size)
    check_group_size(group_size, [layer.in_features for layer in layers.values()])
    model = copy.deepcopy(model)
    for done, name in enumerate(layers, 1):
        layer = model.get_submodule(name)
        tensor = quantize(layer.weight.detach(), group_size=group_size, **settings)
        model.set_submodule(name, PackedLinear(tensor, layer.bias))
        context.progress(done, len(layers))
    return model


def quantize_embedding(model: PreTrainedModel, bits: int, symmetric: bool = False) -> None:
    """Round the embedding of the model in place, one group per row; a tied head shares its integers."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    multiplier = getattr(embedding, "scalar_embed_scale", 1.0)  # Gemma's embedding
    plain = type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale")
    if not plain or not isinstance(head, nn.Linear):
        raise RecipeError(
            f"quantize.embedding rounds plain float embeddings, not {type(embedding).__name__}."
        )
    name = next(name for name, module in model.named_modules() if module is embedding)
    if looks_at_weight(model, name):
        raise RecipeError(
            f"{type(model).__name__} looks at the weight of its embedding itself, so that it has to stay in float; "
            "leave out quantize.embedding."
        )
    tensor = quantize_affine(embedding.weight.detach(), bits, 0, symmetric)
    tied = head.weight is embedding.weight
    head_tensor = tensor if tied else quantize_affine(head.weight.detach(), bits, 0, symmetric)
    model.set_input_embeddings(PackedEmbedding(tensor, embedding.weight.dtype, multiplier))
    model.set_output_embeddings(PackedLinear(head_tensor, head.bias))


@register("quantize.embedding", shown=("bits",))
@dataclass(frozen=True)
class RoundEmbedding:
    """Round the embedding, and the head, per row: what stands behind a technique for the linear layers.

    bits: 2 to 8. symmetric: zero-point in the middle, which every engine takes; rows of an embedding hardly lean.
    """

    bits: int = 8
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_settings(self.method, 0, self.bits)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with a PackedEmbedding and a PackedLinear head, one matrix where they are tied."""
        if isinstance(model.get_input_embeddings(), PackedEmbedding):
            raise RecipeError("The embedding is quantized already; write quantize.embedding once.")
        model = copy.deepcopy(model)
        quantize_embedding(model, self.bits, self.symmetric)
        return model
