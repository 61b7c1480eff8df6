"""GPTQ: round one input column after the other, and let the columns that are left make up for the error.

H = X^T X / n + damping * mean(diag) * I         U = upper Cholesky factor of H^-1
for each column j:  q_j = round(w_j);  e = (w_j - q_j) / U_jj;  w_k -= e * U_jk  for every k > j
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from edgelab.model.blocks import Block, Group, blocks, half_precision, longest
from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.calibration import Calibrated, CalibrationError
from edgelab.techniques.quantization.ranges import find_grid
from edgelab.techniques.quantization.rtn import check_group_size, check_settings, linear_layers, round_rest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 4096  # tokens whose products are summed in one matrix product
STRIPE = 192  # columns of the product that are made at one time
LAZY = 128  # columns that are rounded before the error reaches the rest of the matrix
LARGEST_DAMPING = 1.0

# Weights (out_features, groups, group_size), and which groups these are -> scale, zero_point (out_features, groups)
FindGrid = Callable[..., tuple[Tensor, Tensor | None]]


@torch.autocast("cpu", enabled=False)  # in bfloat16 what is made up for would be rounded again
def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group_size: int,
    find: FindGrid,
    activation_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
) -> tuple[QuantizedTensor, float]:
    """Round `weight` so that the outputs on the calibration text change little; also returns the damping it took.

    weight: (out_features, in_features). hessian: (in_features, in_features), mean of x x^T over tokens. find: scale
    and zero_point of groups of weights. activation_order: columns with the largest inputs first. static_groups: the
    grid of a group comes from the original weights, else from the weights as they are when its first column is due.
    damping: share of the mean diagonal added to it; tenfold until the Cholesky factor exists. Inputs that are never
    seen are rounded to nearest.
    Frantar et al. 2023, arXiv:2210.17323.
    """
    out_features, in_features = weight.shape
    size = group_size or in_features
    weight = weight.float().clone()
    groups = weight.view(out_features, -1, size)  # a view: follows the updates
    scale, zero_point = find(groups)
    order = hessian.diagonal().argsort(descending=True) if activation_order else torch.arange(in_features)
    factor, damping = inverse_factor(hessian[order][:, order], damping)
    columns = weight.T[order]  # (in_features, out_features), so that one column lies in one piece
    integers = torch.empty_like(columns)
    begun: set[int] = set()
    for start in range(0, in_features, LAZY):
        end = min(start + LAZY, in_features)
        part, triangle = columns[start:end], factor[start:end, start:end]
        errors = torch.empty_like(part)
        for j in range(end - start):
            index = int(order[start + j])
            group = index // size
            if not static_groups and group not in begun:
                begun.add(group)
                weight.T[order[start:]] = columns[start:]
                now_scale, now_zero = find(groups[:, [group]], [group])
                scale[:, group] = now_scale[:, 0]
                if zero_point is not None:
                    zero_point[:, group] = now_zero[:, 0]
            step = scale[:, group]
            centre = 2.0 ** (bits - 1) if zero_point is None else zero_point[:, group].float()
            rounded = torch.round(part[j] / step).add_(centre).clamp_(0, 2**bits - 1)
            integers[index] = rounded
            errors[j] = (part[j] - (rounded - centre) * step) / triangle[j, j]
            part[j + 1 :].addr_(triangle[j, j + 1 :], errors[j], alpha=-1)
        columns[end:] -= factor[start:end, end:].T @ errors
    integers = integers.T.contiguous()
    return QuantizedTensor(integers.to(torch.uint8), scale, zero_point, bits), damping


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the inverse of the damped matrix, and the damping that made it possible.

    hessian: (n, n). An input that is never seen stays apart from the others. Raises RecipeError where LARGEST_DAMPING
    is not enough.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    extra = (diagonal == 0).float() * mean
    while True:
        damped = hessian + torch.diag(damping * mean + extra)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and upper.isfinite().all():
                return upper, damping
        if damping >= LARGEST_DAMPING:
            raise RecipeError(
                "The Hessian of a layer cannot be inverted; use more or longer calibration samples."
            )
        damping = min(10 * damping, LARGEST_DAMPING)


def input_products(inputs: Tensor) -> tuple[Tensor, int]:
    """Mean of x x^T over tokens (in_features, in_features), and how many tokens were left out as not finite.

    inputs: (..., in_features). float32: sums of bfloat16 products would leave small matrices without a factor.
    Raises CalibrationError where no token is left.
    """
    tokens = inputs.flatten(0, -2)
    finite = tokens.isfinite().all(-1)
    lost = len(tokens) - int(finite.sum())
    if lost:
        tokens = tokens[finite]
        if not len(tokens):
            raise CalibrationError(
                "No token of the calibration text gives finite activations; use a model whose outputs are numbers."
            )
    total = torch.zeros(tokens.shape[-1], tokens.shape[-1])
    with torch.autocast("cpu", enabled=False):
        for chunk in tokens.split(CHUNK):
            chunk = chunk.float()
            for start in range(0, total.shape[0], STRIPE):  # the lower triangle is enough
                stripe = slice(start, start + STRIPE)
                total[start:, stripe].addmm_(chunk[:, start:].T, chunk[:, stripe])
    total = total.tril()
    return (total + total.tril(-1).T) / max(len(tokens), 1), lost


@register("quantize.gptq", version=2, shown=("bits", "group_size"))
@dataclass(frozen=True, kw_only=True)
class GPTQ(Calibrated):
    """Round every linear layer but the head with GPTQ, block after block, on the inputs that rounded blocks give.

    bits: 2 to 8. group_size: inputs that share a scale, 0 for a whole row. symmetric: zero in the middle of the grid.
    range: how each group's grid is found. activation_order: the columns with the largest inputs first. static_groups:
    grids are found before the first column is rounded. true_sequential: within a block, a layer sees its inputs after
    the layers before it have been rounded. damping: added to the diagonal of the Hessian, as a share of its mean.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    range: Literal["minmax", "mse"] = "minmax"
    activation_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.method, self.group_size, self.bits)
        if not 0 < self.damping <= LARGEST_DAMPING:
            raise RecipeError(f"quantize.gptq:damping={self.damping} is outside 0 to 1; 0.01 is usual.")

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the rounded layers."""
        refuse_zeros(model, self.method)
        layers = linear_layers(model, context.record)
        check_group_size(self.group_size, [layer.in_features for layer in layers.values()])
        tokens = self.draw(context, longest(model))
        model = copy.deepcopy(model)
        found, hidden = blocks(model, tokens)
        with torch.no_grad():
            for done, block in enumerate(found, 1):
                hidden = self._round_block(block, hidden, context)
                context.progress(done, len(found))
        round_rest(model, context, self.bits, self.group_size, self.symmetric)
        return model

    def _round_block(self, block: Block, hidden: Tensor, context: Context) -> Tensor:
        """Round the layers of one block in place; returns the hidden states behind it."""
        groups = block.groups(hidden[:1])
        layers = block.linear()
        packed: dict[str, PackedLinear] = {}
        products: dict[Group, Tensor] = {}

        def round_group(group: Group, hessian: Tensor) -> None:
            weights = [layers[name].weight for name in group.layers]
            tensor, damping = gptq(
                torch.cat(weights),  # layers with the same inputs share one factor
                hessian,
                self.bits,
                self.group_size,
                self._find(hessian),
                self.activation_order,
                self.static_groups,
                self.damping,
            )
            if damping > self.damping:
                context.record.notes.append(f"{block.name}.{group.layers[0]}: damping raised to {damping:g}.")
            parts = split_rows(tensor, [len(weight) for weight in weights])
            for name, weight, part in zip(group.layers, weights, parts, strict=True):
                packed[name] = PackedLinear(part, layers[name].bias)
                weight.data = part.dequantize(weight.dtype)

        def visit(group: Group, inputs: Tensor) -> None:
            hessian, lost = input_products(inputs)
            if lost:
                context.record.notes.append(f"{block.name}: {lost} tokens with non-finite inputs left out.")
            if self.true_sequential:
                round_group(group, hessian)
            else:
                products[group] = hessian

        with half_precision():
            outputs = block.on_the_way(hidden, groups, visit)
            for group, hessian in products.items():
                round_group(group, hessian)
            if products:
                outputs = block(hidden)
        for name, layer in packed.items():
            block.module.set_submodule(name, layer)
        return outputs

    def _find(self, hessian: Tensor) -> FindGrid:
        importance = hessian.diagonal().view(-1, self.group_size or len(hessian))  # (groups, group_size)

        def find(groups: Tensor, which: slice | list[int] = slice(None)) -> tuple[Tensor, Tensor | None]:
            return find_grid(groups, self.bits, self.symmetric, self.range, importance=importance[which])

        return find


def split_rows(tensor: QuantizedTensor, rows: list[int]) -> list[QuantizedTensor]:
    """A quantized matrix cut into parts of so many rows."""
    zero_points = [None] * len(rows) if tensor.zero_point is None else tensor.zero_point.split(rows)
    parts = zip(tensor.integers.split(rows), tensor.scale.split(rows), zero_points, strict=True)
    return [QuantizedTensor(*part, tensor.bits) for part in parts]
