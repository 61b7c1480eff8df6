"""LoftQ: round a weight so that what rounding loses is nearly of low rank, for an adapter to make up for it.

min over Q on the grid, B A of rank r of |W - Q - B A|_F        in turns: Q = round(W - B A), B A = largest r of W - Q

The adapter itself belongs to the stage behind, `qlora:start=residual` of the same rank, which takes the last step.
Li et al. 2023, arXiv:2310.08659.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.rtn import check_settings, quantize_affine, replace_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def largest_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (rows, rank) and A (rank, columns) with the product nearest to a matrix, its roots shared between them.

    Eckart and Young 1936.
    """
    left, sizes, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    roots = sizes[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def quantize_beside_rank(
    weight: Tensor, bits: int, group_size: int, rank: int, rounds: int
) -> QuantizedTensor:
    """Round a weight (out_features, in_features) beside an adapter of that rank.

    Raises GroupSizeError where group_size does not divide in_features.
    """
    weight = weight.float()
    found = quantize_affine(weight, bits, group_size)
    best, least = found, torch.inf
    for _ in range(rounds):
        b, a = largest_directions(weight - found.dequantize(), rank)
        left = (weight - found.dequantize() - b @ a).square().sum().item()
        if left < least:  # the rounds do not fall for certain: a grid moves with what it rounds
            best, least = found, left
        found = quantize_affine(weight - b @ a, bits, group_size)
    return best


@register("quantize.loftq", shown=("bits", "group_size"))
@dataclass(frozen=True)
class LoftQ:
    """Round every linear layer but the head for an adapter to come: `+ qlora:start=residual` of the same rank.

    bits: 2 to 8. group_size: 0 for a whole row. rank: of the adapter. rounds: of rounding and decomposing in turns;
    the best of them is taken, and 1 is rounding to nearest.
    """

    bits: int = 2
    group_size: int = 64
    rank: int = 8
    rounds: int = 5

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size, self.bits)
        if min(self.rank, self.rounds) < 1:
            raise RecipeError(
                f"{self.method}:rank={self.rank},rounds={self.rounds} should both be at least 1."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the linear layers."""
        refuse_zeros(model, self.method)
        settings = {
            "bits": self.bits,
            "group_size": self.group_size,
            "rank": self.rank,
            "rounds": self.rounds,
        }
        return replace_linear(model, context, quantize_beside_rank, **settings)
