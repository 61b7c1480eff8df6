"""Quantization-aware training: the forward pass sees rounded weights, the gradient goes to the weights behind them.

q(w) = (clamp(round(w / s + z), low, high) - z) s
dq/dw = 1 where round(w / s + z) is on the grid, else 0                                    (straight through)
dq/ds = (q(w) - w) / s on the grid, else low - z or high - z                               (learned step size)

What comes out is stored like the result of any other quantization: the same bytes and kernels, other integers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, Record, register
from edgelab.storage.codebook import CodebookTensor
from edgelab.storage.layers import ActivationGrid, PackedLinear
from edgelab.storage.scales import SMALLEST, as_stored
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.lessons import lesson
from edgelab.techniques.quantization.one_bit import binary_scale, ternary_scale
from edgelab.techniques.quantization.ranges import Range, find_grid
from edgelab.techniques.quantization.rtn import check_group_size, check_settings, linear_layers
from edgelab.training import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def nearest(steps: Tensor, centre: Tensor) -> Tensor:
    """Integers round(w / s + z), float32, in place of steps = w / s, (out_features, groups, group_size).

    centre: (out_features, groups). Whole numbers are added after rounding, as rounding to nearest does it.
    """
    whole = centre.floor()
    fraction = centre - whole
    if fraction.any():
        steps.add_(fraction[..., None])
    return steps.round_().add_(whole[..., None])


class FakeQuantize(torch.autograd.Function):
    """Weights rounded to their grid in the forward pass; see the top of the file for the backward pass.

    weight: (out_features, in_features). scale, centre: (out_features, groups) float32. bounded: gradients stop where
    the grid ends; otherwise they always pass, since a grid that moves with the weights has no end. dtype: of the
    result.
    """

    @staticmethod
    def forward(ctx, weight, scale, centre, low: int, high: int, bounded: bool, dtype: torch.dtype) -> Tensor:
        stored = stored_scale(scale, ctx.needs_input_grad[1])
        rounded = nearest(weight.unflatten(-1, (scale.shape[-1], -1)) / stored[..., None], centre)
        integers = rounded.clamp(low, high)
        inside = (integers == rounded).flatten(-2) if bounded else None
        ctx.save_for_backward(weight, scale, centre, inside)
        ctx.ends = low, high
        return integers.sub_(centre[..., None]).mul_(stored[..., None]).flatten(-2).to(dtype)

    @staticmethod
    def backward(ctx, outer: Tensor):
        weight, scale, centre, inside = ctx.saved_tensors
        low, high = ctx.ends
        outer = outer.to(weight.dtype)
        by_scale = None
        if inside is not None and ctx.needs_input_grad[1]:
            grouped, inner = (one.unflatten(-1, (scale.shape[-1], -1)) for one in (outer, inside))
            steps = weight.unflatten(-1, (scale.shape[-1], -1)) / stored_scale(scale, True)[..., None]
            integers = nearest(steps.clone(), centre).clamp_(low, high)
            slope = integers.sub_(centre[..., None]).sub_(steps * inner)
            share = 1 / math.sqrt(weight.numel() / scale.numel() * (high - low))
            by_scale = (grouped * slope).sum(-1).sum_to_size(scale.shape) * share
        return outer if inside is None else outer * inside, by_scale, None, None, None, None, None


def stored_scale(scale: Tensor, learned: bool) -> Tensor:
    """The scale as it will be stored, float32; a learned one is kept from falling to zero and below."""
    if learned:  # no lower than float16 goes, or than a thousandth of the largest where all are small
        smallest = (scale.amax() / 1024).clamp(torch.finfo(torch.float32).tiny, SMALLEST)
        scale = scale.clamp(min=smallest)
    return as_stored(scale)


@dataclass(frozen=True)
class Grid:
    """The integers low to high in so many stored bits; find: groups (..., group_size) -> scale, zero_point."""

    bits: int
    low: int
    high: int
    find: Callable[[Tensor], tuple[Tensor, Tensor | None]]


def grid_of(bits: str, range: Range = "minmax") -> Grid:
    """The grid of a setting of bits: two levels for 1, three for 1.58, else 2**bits."""
    if bits == "1":
        return Grid(1, 0, 1, lambda groups: (binary_scale(groups), None))
    if bits == "1.58":
        return Grid(2, 1, 3, lambda groups: (ternary_scale(groups), None))
    width = int(bits)
    return Grid(width, 0, 2**width - 1, partial(find_grid, bits=width, symmetric=False, range=range))


class FakeQuantLinear(nn.Module):
    """A linear layer that computes with rounded weights and keeps the float weights behind them for training.

    scale, zero_point: the grid, as in QuantizedTensor; None for a grid found anew from the weights at each step.
    learned: the scale is a parameter.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        grid: Grid,
        groups: int,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        learned: bool = False,
        activation: ActivationGrid | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = bias
        self.grid, self.groups, self.activation = grid, groups, activation
        self.scale = None if scale is None else nn.Parameter(scale.float(), requires_grad=learned)
        self.zero_point = zero_point

    def current(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero-point now."""
        if self.scale is not None:
            return self.scale, self.zero_point
        return self.grid.find(self.weight.detach().unflatten(-1, (self.groups, -1)))

    def rounded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights on their grid, with the gradients of the top of the file."""
        scale, zero_point = self.current()
        centre = _centre(scale, zero_point, self.grid)
        bounded = self.scale is not None
        return FakeQuantize.apply(
            self.weight, scale.float(), centre, self.grid.low, self.grid.high, bounded, dtype
        )

    def forward(self, inputs: Tensor) -> Tensor:
        if self.activation is not None:
            inputs = inputs + (self.activation.round(inputs) - inputs).detach()
        half = torch.is_autocast_enabled("cpu")
        weight = self.rounded(torch.get_autocast_dtype("cpu") if half else inputs.dtype)
        return functional.linear(inputs, weight, self.bias)

    @torch.no_grad()
    def packed(self) -> PackedLinear:
        """The layer as it is stored: the same rounded weights."""
        scale, zero_point = self.current()
        stored = stored_scale(scale.float(), self.scale is not None and self.scale.requires_grad)
        centre = _centre(scale, zero_point, self.grid)
        steps = self.weight.unflatten(-1, (self.groups, -1)) / stored[..., None]
        integers = nearest(steps, centre).clamp_(self.grid.low, self.grid.high)
        tensor = QuantizedTensor(integers.flatten(-2).to(torch.uint8), stored, zero_point, self.grid.bits)
        return PackedLinear(tensor, self.bias, self.activation)


def _centre(scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    return QuantizedTensor(torch.empty(0), scale.detach(), zero_point, grid.bits).centre()


@register("qat", version=2, shown=("bits", "group_size"))
@dataclass(frozen=True)
class QuantizationAwareTraining(Trained):
    """Train every linear layer but the head behind its rounding; then store it like any other quantized layer.

    bits: 1 (signs), 1.58 (-1, 0, 1) or 2 to 8. group_size: inputs that share a scale, 0 for a whole row. loss: kl, the
    divergence to the reference's predictions, or ce, next-token cross-entropy. range: from 2 bits on, how the ends of
    the grid are chosen: mse and percentile once, to stay; minmax follows the weights as they are trained, and so do
    the mean magnitudes of 1 and 1.58 bits. learned_step: the scales are trained too, from where they are at the
    beginning. activation_bits: 8 rounds the inputs of the layers per token as well, 0 leaves them. Norms and biases
    are trained along, a few thousand numbers that are stored in float anyway; the embedding and a head tied to it are
    not: they would take a quarter more time and memory, and what is gained would no longer come from quantized weights
    alone.

    Layers that are quantized already start from their own weights and grid, which stays or is learned, and the
    reference is then the model before all techniques.
    Jacob et al. 2018, arXiv:1712.05877; Bengio et al. 2013, arXiv:1308.3432; Esser et al. 2020, arXiv:1902.08153.
    """

    bits: Literal["1", "1.58", "2", "3", "4", "5", "6", "7", "8"] = "3"
    group_size: int = 64
    loss: Literal["kl", "ce"] = "kl"
    range: Range = "mse"
    learned_step: bool = False
    activation_bits: int = 0
    learning_rate: float = field(default=3e-4, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "bits", str(self.bits))  # bits=3 reads better in Python than bits="3"
        if self.bits not in ("1", "1.58", *"2345678"):
            raise RecipeError(f"qat:bits={self.bits} is none of 1, 1.58 and 2 to 8.")
        check_settings(self.method, self.group_size)
        if self.activation_bits not in (0, 8):
            raise RecipeError(f"qat:activation_bits={self.activation_bits} is neither 8 nor 0 (float).")
        if self.range != "mse" and self.bits in ("1", "1.58"):
            raise RecipeError(
                f"qat:bits={self.bits} takes its scale from mean magnitudes; leave out range={self.range}."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model, trained, with PackedLinear in place of the linear layers."""
        refuse_zeros(model, self.method)
        half = bfloat16_is_fast()
        given, model = model, self.prepare(model, context.record)
        packed = any(isinstance(module, PackedLinear) for module in given.modules())
        loss = lesson(self.method, self.loss, given, context, otherwise=None if packed else given)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.fit(model, loss, parameters, context, half)
        return convert(model)

    def prepare(self, model: PreTrainedModel, record: Record | None = None) -> PreTrainedModel:
        """A copy of the model with FakeQuantLinear layers; what is to be trained, and only that, requires gradients."""
        layers = linear_layers(model, record, packed=True, group_size=self.group_size)
        check_group_size(self.group_size, [layer.in_features for layer in layers.values()])
        for name, layer in layers.items():
            if isinstance(layer, PackedLinear):
                self._check_grid(name, layer.tensor)
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() < 2)
        for name in layers:
            model.set_submodule(name, self.prepare_layer(model.get_submodule(name)))
        return model

    def _check_grid(self, name: str, tensor: QuantizedTensor | CodebookTensor) -> None:
        if not isinstance(tensor, QuantizedTensor):
            raise RecipeError(
                f"qat trains uniform grids, and {name} has a codebook; quantize it another way."
            )
        if self.bits == "1.58" and (tensor.zero_point is not None or int(tensor.integers.min()) < 1):
            raise RecipeError(
                f"{name} is not ternary, as qat:bits=1.58 needs it; start from quantize.ternary."
            )
        width, group_size = grid_of(self.bits).bits, self.group_size or tensor.integers.shape[1]
        if (tensor.bits, tensor.group_size) != (width, group_size):
            raise RecipeError(
                f"{name} is quantized to {tensor.bits} bits in groups of {tensor.group_size}, and qat keeps its grid; "
                f"use the same bits and group_size, not bits={self.bits},group_size={self.group_size}."
            )

    def prepare_layer(self, layer: nn.Linear | PackedLinear) -> FakeQuantLinear:
        """A layer to train in place of a float or a quantized one, whose bias it shares."""
        activation = ActivationGrid() if self.activation_bits else getattr(layer, "activation", None)
        grid = grid_of(self.bits, self.range)
        scale = zero_point = None
        if isinstance(layer, PackedLinear):
            weight, scale, zero_point = layer.tensor.dequantize(), layer.tensor.scale, layer.tensor.zero_point
            groups = scale.shape[-1]
        else:
            weight = layer.weight.detach().float()
            groups = layer.in_features // (self.group_size or layer.in_features)
            if self.learned_step or (self.range != "minmax" and self.bits not in ("1", "1.58")):
                scale, zero_point = grid.find(weight.unflatten(-1, (groups, -1)))
        return FakeQuantLinear(
            weight, layer.bias, grid, groups, scale, zero_point, self.learned_step, activation
        )


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Put PackedLinear layers in place of FakeQuantLinear, in place; returns the model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FakeQuantLinear):
            model.set_submodule(name, layer.packed())
    return model.requires_grad_(True)
