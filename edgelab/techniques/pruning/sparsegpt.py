"""SparseGPT: remove weights column after column, and let the columns that are left make up for each.

H = X^T X / n + damping * mean(diag) * I         U = upper Cholesky factor of H^-1
score of a weight:  (w_j / U_jj)**2              what its removal costs once the columns before it are settled
for each column j:  q_j = 0 where it goes, else w_j, or round(w_j);  e = (w_j - q_j) / U_jj;  w_k -= e * U_jk, k > j

With bits, what stays is rounded in the same pass, and the columns that are left make up for both at once.

By hand (optimal brain surgeon): w = (1, 1), H = [[2, 1], [1, 2]]. Without the first weight the second becomes 1.5, and
the output moves by 0.75; left at 1 it would have moved by 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.pruning.calibrated import CalibratedPruning
from edgelab.techniques.pruning.masks import PATTERNS, Pattern, keep_mask
from edgelab.techniques.quantization.gptq import LARGEST_DAMPING, FindGrid, inverse_factor
from edgelab.techniques.quantization.ranges import find_grid
from edgelab.techniques.quantization.rtn import check_group_size, check_settings, linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAZY = 128  # columns whose mask is chosen together, and that are settled before the rest of the matrix hears of it


class Rounding(NamedTuple):
    """A grid for what stays. find: groups of weights (out_features, 1, group_size), their first input -> its grid."""

    bits: int
    group_size: int
    find: FindGrid


@torch.autocast("cpu", enabled=False)
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    pattern: Pattern = "unstructured",
    damping: float = 0.01,
    rounding: Rounding | None = None,
) -> Tensor | QuantizedTensor:
    """The pruned and updated weights, (out_features, in_features) float32, or on their grid where there is a rounding.

    weight: (out_features, in_features). hessian: (in_features, in_features), mean of x x^T over tokens. Of each LAZY
    columns the given share of all rows goes, so that rows differ and the matrix loses exactly round(sparsity * all);
    a pattern holds in each row. The grid of a group is found when its first column is due, from the weights as they
    are then, without those that are known to go; what stays may still round to zero.
    Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    out_features, in_features = weight.shape
    factor, _ = inverse_factor(hessian, damping)
    columns = weight.float().T.clone()  # (in_features, out_features), so that one column lies in one piece
    stays = torch.ones_like(columns, dtype=torch.bool)
    integers, scales, centres = torch.empty_like(columns), [], []
    removed = 0
    for start in range(0, in_features, LAZY):
        end = min(start + LAZY, in_features)
        part, triangle = columns[start:end], factor[start:end, start:end]
        width, errors = end - start, torch.empty_like(part)
        mask = stays[start:end]
        if pattern == "unstructured":
            due = round(sparsity * out_features * end) - removed  # exact over the matrix
            removed += due
            scores = (part / triangle.diagonal()[:, None]).square().T.reshape(1, -1)  # rows, then columns
            mask.copy_(keep_mask(scores, due / scores.numel()).view(out_features, width).T)
        for j in range(width):
            if pattern != "unstructured" and j % PATTERNS[pattern][1] == 0:
                group = slice(j, j + PATTERNS[pattern][1])
                scores = (part[group] / triangle.diagonal()[group, None]).square().T
                mask[group] = keep_mask(scores, 0.5, pattern).T
            value = part[j] * mask[j]
            if rounding is not None:
                if (start + j) % rounding.group_size == 0:
                    ahead = slice(start + j, start + j + rounding.group_size)
                    groups = (columns[ahead] * stays[ahead]).T[:, None]  # (out_features, 1, group_size)
                    for found, kept in zip(rounding.find(groups, start + j), (scales, centres), strict=True):
                        kept.append(found)
                grid = QuantizedTensor(torch.empty(0), scales[-1], centres[-1], rounding.bits)
                scale, centre = scales[-1][:, 0], grid.centre()[:, 0]
                level = torch.round(value / scale).add_(centre).clamp_(0, 2**rounding.bits - 1)
                integers[start + j] = torch.where(mask[j], level, centre)
                value = (integers[start + j] - centre) * scale
            errors[j] = (part[j] - value) / triangle[j, j]
            part[j] = value
            part[j + 1 :].addr_(triangle[j, j + 1 :], errors[j], alpha=-1)
        columns[end:] -= factor[start:end, end:].T @ errors
    if rounding is None:
        return columns.T.contiguous()
    zero_point = None if centres[0] is None else torch.cat(centres, 1)
    return QuantizedTensor(
        integers.T.to(torch.uint8).contiguous(), torch.cat(scales, 1), zero_point, rounding.bits
    )


@register("prune.sparsegpt", shown=("sparsity",))
@dataclass(frozen=True, kw_only=True)
class SparseGPT(CalibratedPruning):
    """Set weights to zero where their neighbours can make up for it, and update the neighbours.

    damping: added to the diagonal of the Hessian, as a share of its mean. bits: 2 to 8 rounds what stays in the same
    pass; 0 leaves it in float. group_size: with bits, neighbouring inputs of a row that share a grid, 0 for whole
    rows. range: with bits, where the grid of a group ends: at its extreme weights (minmax), or where its squared error
    is least (mse).
    """

    damping: float = 0.01
    bits: int = 0
    group_size: int = 64
    range: Literal["minmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= LARGEST_DAMPING:
            raise RecipeError(f"prune.sparsegpt:damping={self.damping} is outside 0 to 1; 0.01 is usual.")
        if self.bits:
            check_settings(self.method, self.group_size, self.bits)
        elif (self.group_size, self.range) != (64, "mse"):
            raise RecipeError(
                f"group_size={self.group_size},range={self.range} belong to rounding; give bits, as in bits=4."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with zeros in its linear layers, which are packed where they are rounded too."""
        refuse_zeros(model, self.method)
        if self.bits:
            check_group_size(self.group_size, [layer.in_features for layer in linear_layers(model).values()])
        return super().apply(model, context)

    def prune_layer(self, layer: nn.Linear, seen: Tensor, sparsity: float) -> PackedLinear | None:
        rounding = self._rounding(seen) if self.bits else None
        made = sparsegpt(layer.weight, seen, sparsity, self.pattern, self.damping, rounding)
        if rounding is None:
            layer.weight.copy_(made)
            return None
        layer.weight.copy_(made.dequantize())
        return PackedLinear(made, layer.bias)

    def _rounding(self, hessian: Tensor) -> Rounding:
        size = self.group_size or len(hessian)

        def find(groups: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
            importance = hessian.diagonal()[first : first + size]
            return find_grid(groups, self.bits, False, self.range, importance=importance)

        return Rounding(self.bits, size, find)
