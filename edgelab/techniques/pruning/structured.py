"""Criteria for structures: which heads or channels matter least, and how many stay in each block.

magnitude    root of the sum of squares of all weights of the structure
activation   size of what it hands on, times the norm of the column that reads it
taylor       what the loss would say to its absence, to first order
random       no criterion: the control that every other has to beat
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from edgelab.model.blocks import longest
from edgelab.model.structures import Part
from edgelab.recipes import Context, RecipeError
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.observing import input_sizes, taylor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Share:
    """Settings of techniques that make a dimension narrower.

    share: of the dimension that goes, from 0 to below 1. multiple: what stays is rounded up to a multiple of this.
    """

    share: float = 0.25
    multiple: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1 or self.multiple < 1:
            raise RecipeError(
                f"{self.method}:share={self.share},multiple={self.multiple} should be a share from 0 to below 1 and a "
                "multiple of at least 1."
            )


@dataclass(frozen=True, kw_only=True)
class Structured(Calibrated):
    """Settings of techniques that remove whole structures.

    by: the criterion: taylor, activation, magnitude, or random, where the seed of the recipe decides. by_layer:
    uniform, as many from each block, or global, ranked among all blocks, which then have widths of their own.
    """

    by: Literal["taylor", "activation", "magnitude", "random"] = "taylor"
    by_layer: Literal["uniform", "global"] = "uniform"
    samples: int = 16

    def channel_scores(self, model: PreTrainedModel, parts: list[Part], context: Context) -> Tensor:
        """A score for each input of each part's reader, (parts, inputs); the lowest go first.

        A structure of several inputs, such as a head, has the sum of theirs. Those of activation and magnitude are
        squares; magnitude counts the reader's column and the row of each writer.
        """
        names = [part.reader for part in parts]
        if self.by == "random":
            generator = torch.Generator().manual_seed(context.seed)
            width = model.get_submodule(names[0]).in_features
            return torch.rand(len(parts), width, generator=generator)
        if self.by == "magnitude":
            return torch.stack([_squares(model, part) for part in parts])
        tokens = self.draw(context, longest(model))
        if self.by == "taylor":
            found = taylor(model, names, tokens, context.progress)
            return torch.stack([found[name] for name in names])
        sizes = input_sizes(model, names, tokens, context.progress)
        columns = [model.get_submodule(name).weight.detach().float().square().sum(0) for name in names]
        return torch.stack(
            [sizes[name].square() * column for name, column in zip(names, columns, strict=True)]
        )


def _squares(model: PreTrainedModel, part: Part) -> Tensor:
    """Sum of squares of the weights that make and read each input of the reader, (inputs,)."""
    columns = model.get_submodule(part.reader).weight.detach().float().square().sum(0)
    rows = [model.get_submodule(name).weight.detach().float().square().sum(1) for name in part.writers]
    return columns + sum(rows)


def stay(scores: Tensor, share: float, by_layer: str, multiple: int = 1) -> list[Tensor]:
    """Indices of structures that stay in each block, ascending. scores: (blocks, structures); share: that goes.

    uniform: every block keeps as many. global: the lowest of all blocks go, at least `multiple` stay in each. Counts
    that stay are rounded up to a multiple, which kernels like. Raises RecipeError where nothing would be left.
    """
    blocks, count = scores.shape
    if by_layer == "uniform":
        counts = [count - round(share * count)] * blocks
    else:
        ranks = scores.flatten().argsort(stable=True)
        gone = torch.zeros(scores.numel(), dtype=torch.bool)
        gone[ranks[: round(share * scores.numel())]] = True
        counts = (count - gone.view(blocks, count).sum(1)).tolist()
    if by_layer == "uniform" and counts[0] < 1:
        raise RecipeError(f"A share of {share} of {count} leaves none; remove less.")
    kept = []
    for row, number in zip(scores, counts, strict=True):
        number = min(count, max(multiple, -(-number // multiple) * multiple))
        kept.append(row.argsort(dim=-1, stable=True)[count - number :].sort().values)
    return kept
