"""Round-to-nearest: zero-shot uniform quantization of the weights, one scale and zero-point per group.

scale = (max(w, 0) - min(w, 0)) / (2**bits - 1)      zero_point = round(-min(w, 0) / scale)
q = clamp(round(w / scale) + zero_point, 0, 2**bits - 1)      w ~ (q - zero_point) * scale
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.quantization.packed import PackedEmbedding, PackedLinear, QuantizedTensor

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16: a group of zeros still needs a scale to divide by


class GroupSizeError(RecipeError):
    """The group size does not divide the inputs of a layer."""


def quantize_affine(weight: Tensor, bits: int, group_size: int, symmetric: bool = False) -> QuantizedTensor:
    """Round `weight` onto a uniform grid, one scale and zero-point per group of inputs.

    weight: (out_features, in_features), float. group_size must divide in_features; 0 means one group per row.
    Returns integers in [0, 2**bits - 1] of the same shape, scale (float16) and zero_point (uint8) of shape
    (out_features, groups); zero_point is None where symmetric, and then stands for 2**(bits - 1).
    Raises GroupSizeError, naming group sizes that fit, where group_size does not divide in_features.
    Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """
    out_features, in_features = weight.shape
    check_group_size(group_size, [in_features])
    groups = weight.float().reshape(out_features, -1, group_size or in_features)  # (out, groups, group_size)
    scale, zero_point = affine_grid(groups, bits, symmetric)
    centre = 2 ** (bits - 1) if zero_point is None else zero_point.float()[..., None]
    integers = torch.round(groups / scale.float()[..., None]).add_(centre).clamp_(0, 2**bits - 1)
    return QuantizedTensor(integers.to(torch.uint8).reshape(weight.shape), scale, zero_point, bits)


def affine_grid(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of the min-max range of each group, widened so that it holds zero.

    groups: (..., group_size), float32. Returns scale (...) in float16 and zero_point (...) in uint8, or None.
    """
    if symmetric:
        scale = groups.abs().amax(-1) / (2 ** (bits - 1) - 1)
        return scale.clamp(min=SMALLEST_SCALE).half(), None
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    # The stored scale is the one that rounding uses, so that the float16 of it costs nothing but range.
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE).half()
    zero_point = torch.round(-low / scale.float()).clamp(0, 2**bits - 1)
    return scale, zero_point.to(torch.uint8)


def check_group_size(group_size: int, in_features: list[int]) -> None:
    """Raise GroupSizeError, naming group sizes that fit all layers, where one is not divided by group_size."""
    if group_size < 0 or any(group_size and inputs % group_size for inputs in in_features):
        widths = sorted(set(in_features))
        fitting = [str(size) for size in range(32, min(widths) + 1, 32) if all(w % size == 0 for w in widths)]
        raise GroupSizeError(
            f"group_size={group_size} does not divide the {' and '.join(map(str, widths))} inputs of the layers; "
            f"use {', '.join([*fitting, '0 (one group per row)'])}."
        )


@register("quantize.rtn", shown=("bits", "group_size"))
@dataclass(frozen=True)
class RoundToNearest:
    """Round every linear layer but the head; `embedding_bits` rounds the embedding (and head) per row as well.

    bits: 2 to 8. group_size: inputs that share a scale, 0 for a whole row. symmetric: zero-point in the middle.
    embedding_bits: 2 to 8, or 0 to leave the embedding as it is.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    embedding_bits: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"quantize.rtn:bits={self.bits} is outside 2 to 8.")
        if self.embedding_bits and not 2 <= self.embedding_bits <= 8:
            raise RecipeError(
                f"quantize.rtn:embedding_bits={self.embedding_bits} is outside 2 to 8 (0 leaves it)."
            )
        if self.group_size < 0:
            raise RecipeError(
                f"quantize.rtn:group_size={self.group_size} is negative; 0 means one group per row."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear (and PackedEmbedding) in place of the rounded layers."""
        layers = linear_layers(model)
        check_group_size(self.group_size, [layer.in_features for layer in layers.values()])
        model = copy.deepcopy(model)
        for done, name in enumerate(layers, 1):
            layer = model.get_submodule(name)
            tensor = quantize_affine(layer.weight.detach(), self.bits, self.group_size, self.symmetric)
            model.set_submodule(name, PackedLinear(tensor, layer.bias))
            context.progress(done, len(layers))
        if self.embedding_bits:
            quantize_embedding(model, self.embedding_bits, self.symmetric)
        return model


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer but the output head, by name. Raises RecipeError where none is left to change."""
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not layers:
        raise RecipeError("The model has no float linear layers left to change: it is quantized already.")
    return layers


def quantize_embedding(model: PreTrainedModel, bits: int, symmetric: bool = False) -> None:
    """Round the embedding of the model in place, one group per row; a tied head shares its integers."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    multiplier = getattr(embedding, "scalar_embed_scale", 1.0)  # Gemma's embedding
    plain = type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale")
    if not plain or not isinstance(head, nn.Linear):
        raise RecipeError(
            f"embedding_bits works on plain float embeddings, not on {type(embedding).__name__}."
        )
    tensor = quantize_affine(embedding.weight.detach(), bits, 0, symmetric)
    tied = head.weight is embedding.weight
    head_tensor = tensor if tied else quantize_affine(head.weight.detach(), bits, 0, symmetric)
    model.set_input_embeddings(PackedEmbedding(tensor, embedding.weight.dtype, multiplier))
    model.set_output_embeddings(PackedLinear(head_tensor, head.bias))
