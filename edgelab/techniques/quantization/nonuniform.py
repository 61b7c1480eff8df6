"""Non-uniform grids: levels where the weights are, not at equal distances. w ~ codebook[integers] * scale

NF4:     levels are quantiles of the normal distribution, the same for every matrix, and 0 and both ends are among them.
k-means: levels are the centres that Lloyd's algorithm ends at, one codebook per matrix.
scale = max|w| of each group of inputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, register
from edgelab.storage.codebook import CodebookTensor
from edgelab.storage.scales import eleven_bits
from edgelab.techniques.quantization.rtn import check_settings, in_groups, replace_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 100  # Lloyd's algorithm on weights of the embedded model stands still after about 30


def normal_float() -> Tensor:
    """The 16 levels of NF4, ascending from -1 to 1, float32: 8 quantiles above zero, 7 below, and zero itself.

    Each side starts at the mean of the outermost quantiles 1 - 1/32 and 1 - 1/30 and goes to 1/2 in equal steps.
    Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return (levels / levels.max()).float()


def k_means(points: Tensor, importance: Tensor, levels: int) -> Tensor:
    """Centres (levels,) float32, ascending, at which the weighted squared distance of the points stands still.

    points, importance: (count,), float32, importance 0 or above. Starts at quantiles, so that there is no seed. In one
    dimension a cluster is an interval of the sorted points, and its sums are differences of two cumulated sums.
    Lloyd 1982, "Least squares quantization in PCM".
    """
    points, order = points.sort()
    importance = importance[order].double()
    mass = functional.pad(importance.cumsum(0), (1, 0))  # (count + 1,): before each point
    moment = functional.pad((importance * points).cumsum(0), (1, 0))
    middles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels * mass[-1]
    centres = points[(torch.searchsorted(mass, middles) - 1).clamp(0, len(points) - 1)]
    ends = torch.tensor([0, len(points)])
    for _ in range(ROUNDS):
        between = torch.searchsorted(points, midpoints(centres), right=True)
        edges = torch.cat([ends[:1], between, ends[1:]])  # cluster k holds points edges[k] to edges[k + 1]
        weights = mass[edges].diff()
        moved = (moment[edges].diff() / weights).float()
        moved = torch.where(weights > 0, moved, centres)  # an empty cluster stays where it is
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def midpoints(levels: Tensor) -> Tensor:
    """What separates the nearest neighbourhoods of ascending levels, (levels - 1,)."""
    return (levels[1:] + levels[:-1]) / 2


def absmax_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Groups of inputs divided by their largest magnitude, and that magnitude, 0 for a group of zeros.

    Returns (out_features, groups, group_size) and (out_features, groups), both float32. Raises GroupSizeError.
    """
    groups = in_groups(weight, group_size)
    scale = eleven_bits(groups.abs().amax(-1))
    return groups / torch.where(scale == 0, 1.0, scale)[..., None], scale


def to_nearest(groups: Tensor, scale: Tensor, codebook: Tensor, bits: int) -> CodebookTensor:
    """The nearest level of every weight. groups: as of `absmax_groups`. codebook: (2**bits,), ascending."""
    codebook = codebook.half()  # as it is stored
    integers = torch.bucketize(groups, midpoints(codebook.float()), out_int32=True).to(torch.uint8)
    return CodebookTensor(integers.flatten(1), codebook[None], scale, bits)


def quantize_normal_float(weight: Tensor, group_size: int) -> CodebookTensor:
    """Round `weight` (out_features, in_features) to NF4 with one scale per group of inputs; 0 means a whole row."""
    return to_nearest(*absmax_groups(weight, group_size), normal_float(), bits=4)


def quantize_codebook(weight: Tensor, bits: int, group_size: int) -> CodebookTensor:
    """Round `weight` (out_features, in_features) to a codebook of its own, found by k-means over all its groups.

    An error counts by the square of its group's scale: what is least is the squared error of the weights themselves.
    One codebook per row instead costs 2**bits float16 values a row, and on the embedded model errs more per bit.
    """
    groups, scale = absmax_groups(weight, group_size)
    importance = scale.square()[..., None].expand_as(groups)
    return to_nearest(groups, scale, k_means(groups.flatten(), importance.flatten(), 2**bits), bits)


@register("quantize.nf4", shown=("group_size",))
@dataclass(frozen=True)
class NormalFloat4:
    """NF4 on every linear layer but the head, without data. group_size: 0 for a whole row."""

    group_size: int = 64

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the linear layers."""
        return replace_linear(model, context, quantize_normal_float, group_size=self.group_size)


@register("quantize.codebook", shown=("bits", "group_size"))
@dataclass(frozen=True)
class Codebook:
    """k-means on every linear layer but the head, without data. bits: 2 to 8. group_size: 0 for a whole row."""

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size, self.bits)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the linear layers."""
        refuse_zeros(model, self.method)
        return replace_linear(model, context, quantize_codebook, bits=self.bits, group_size=self.group_size)
