"""Wanda: a weight matters as much as it is large and as its input is, |w| * ‖x‖. What matters least goes: that is all.

|w| = (3, 1) with inputs of norm (1, 5): magnitude removes the second, Wanda the first, which moves the output less.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edgelab.recipes import register
from edgelab.techniques.pruning.calibrated import CalibratedPruning, input_squares
from edgelab.techniques.pruning.masks import keep_mask


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|w| times the norm of its input, (out_features, in_features), for norms (in_features,).

    Sun et al. 2023, arXiv:2306.11695.
    """
    return weight.abs() * norms


@register("prune.wanda", shown=("sparsity",))
@dataclass(frozen=True, kw_only=True)
class Wanda(CalibratedPruning):
    """Set the weights of each row to zero that have the smallest |w| * ‖x‖; nothing is updated."""

    def look_at(self, inputs: Tensor) -> tuple[Tensor, int]:
        return input_squares(inputs)

    def prune_layer(self, layer: nn.Linear, seen: Tensor, sparsity: float) -> None:
        scores = wanda_scores(layer.weight.float(), seen.sqrt())
        layer.weight.copy_(layer.weight * keep_mask(scores, sparsity, self.pattern))
