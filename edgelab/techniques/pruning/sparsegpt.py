"""SparseGPT: remove weights column after column, and let the columns that are left make up for each.

H = X^T X / n + damping * mean(diag) * I         U = upper Cholesky factor of H^-1
score of a weight:  (w_j / U_jj)**2              what its removal costs once the columns before it are settled
for each column j:  e = w_j / U_jj where it goes, else 0;  w_k -= e * U_jk  for every k > j

By hand (optimal brain surgeon): w = (1, 1), H = [[2, 1], [1, 2]]. Without the first weight the second becomes 1.5, and
the output moves by 0.75; left at 1 it would have moved by 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.pruning.calibrated import CalibratedPruning
from edgelab.techniques.pruning.masks import PATTERNS, Pattern, keep_mask
from edgelab.techniques.quantization.gptq import LARGEST_DAMPING, inverse_factor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAZY = 128  # columns whose mask is chosen together, and that are settled before the rest of the matrix hears of it


@torch.autocast("cpu", enabled=False)
def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: Pattern = "unstructured", damping: float = 0.01
) -> Tensor:
    """The pruned and updated weights, (out_features, in_features) float32.

    weight: (out_features, in_features). hessian: (in_features, in_features), mean of x x^T over tokens. Of each LAZY
    columns the given share of all rows goes, so that rows differ and the matrix loses exactly round(sparsity * all);
    a pattern holds in each row. Frantar and Alistarh 2023, arXiv:2301.00774.
    """
    out_features, in_features = weight.shape
    factor, _ = inverse_factor(hessian, damping)
    columns = weight.float().T.clone()  # (in_features, out_features), so that one column lies in one piece
    removed = 0
    for start in range(0, in_features, LAZY):
        end = min(start + LAZY, in_features)
        part, triangle = columns[start:end], factor[start:end, start:end]
        width, errors = end - start, torch.empty_like(part)
        if pattern == "unstructured":
            due = round(sparsity * out_features * end) - removed  # exact over the matrix
            removed += due
            scores = (part / triangle.diagonal()[:, None]).square().T.reshape(1, -1)  # rows, then columns
            mask = keep_mask(scores, due / scores.numel()).view(out_features, width).T
        else:
            mask = torch.ones_like(part, dtype=torch.bool)
        for j in range(width):
            if pattern != "unstructured" and j % PATTERNS[pattern][1] == 0:
                group = slice(j, j + PATTERNS[pattern][1])
                scores = (part[group] / triangle.diagonal()[group, None]).square().T
                mask[group] = keep_mask(scores, 0.5, pattern).T
            errors[j] = torch.where(mask[j], 0.0, part[j] / triangle[j, j])
            part[j].mul_(mask[j])
            part[j + 1 :].addr_(triangle[j, j + 1 :], errors[j], alpha=-1)
        columns[end:] -= factor[start:end, end:].T @ errors
    return columns.T.contiguous()


@register("prune.sparsegpt", shown=("sparsity",))
@dataclass(frozen=True, kw_only=True)
class SparseGPT(CalibratedPruning):
    """Set weights to zero where their neighbours can make up for it, and update the neighbours.

    damping: added to the diagonal of the Hessian, as a share of its mean.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= LARGEST_DAMPING:
            raise RecipeError(f"prune.sparsegpt:damping={self.damping} is outside 0 to 1; 0.01 is usual.")

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with zeros in its linear layers."""
        refuse_zeros(model, self.method)
        return super().apply(model, context)

    def prune_layer(self, layer: nn.Linear, seen: Tensor, sparsity: float) -> None:
        layer.weight.copy_(sparsegpt(layer.weight, seen, sparsity, self.pattern, self.damping))
