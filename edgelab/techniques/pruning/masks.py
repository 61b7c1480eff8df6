"""Masks: which weights stay, with counts that are exact to one weight in spite of ties.

Weights read from a 4-bit file take at most 16 values in a block of 32, so that a threshold would remove more than was
asked for. Ranks come from a stable sort instead: of two equal scores the one that stands first goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgelab.recipes import RecipeError

Pattern = Literal["unstructured", "2:4", "4:8"]
PATTERNS = {"2:4": (2, 4), "4:8": (4, 8)}  # how many stay of how many neighbours in a row


class SparsityError(RecipeError):
    """A share of weights that cannot be removed."""


def keep_mask(scores: Tensor, sparsity: float, pattern: Pattern = "unstructured", per: str = "row") -> Tensor:
    """True where a weight stays: the highest scores of each row, of the matrix, or of each group of a pattern.

    scores: (out_features, in_features). sparsity: share that goes, 0 to 1; a pattern has its own. per: "row", where
    each row loses round(sparsity * in_features) weights, or "layer", where the matrix loses as many as it has weights
    times the sparsity. Returns (out_features, in_features) bool. Raises SparsityError where the pattern does not
    divide the inputs.
    """
    if pattern != "unstructured":
        stay, of = PATTERNS[pattern]
        check_pattern(pattern, scores.shape[1])
        return _highest(scores.unflatten(1, (-1, of)), stay).flatten(1)
    if per == "row":
        return _highest(scores, scores.shape[1] - round(sparsity * scores.shape[1]))
    return _highest(scores.reshape(-1), scores.numel() - round(sparsity * scores.numel())).view_as(scores)


def _highest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest scores along the last axis; of equal ones those that stand last."""
    order = scores.argsort(dim=-1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(-1, order[..., : scores.shape[-1] - count], False)


def check_pattern(pattern: Pattern, in_features: int, name: str = "A layer") -> None:
    """Raise SparsityError where groups of the pattern do not divide the inputs of a layer."""
    if pattern != "unstructured" and in_features % PATTERNS[pattern][1]:
        raise SparsityError(
            f"{name} has {in_features} inputs, which groups of {PATTERNS[pattern][1]} do not divide; use "
            "pattern=unstructured."
        )


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Settings of every technique that sets single weights to zero.

    sparsity: share of the weights that goes, from 0 to below 1. pattern: unstructured, or 2:4 or 4:8, where of so
    many neighbours in a row so many stay, half of them in each.
    """

    sparsity: float = 0.5
    pattern: Pattern = "unstructured"

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise SparsityError(
                f"{self.method}:sparsity={self.sparsity} is outside 0 to 1; 0.5 removes every second weight."
            )
        if self.pattern != "unstructured" and self.sparsity != 0.5:
            raise SparsityError(
                f"pattern={self.pattern} always removes half; leave out sparsity={self.sparsity}."
            )
