"""Which range of weights a uniform grid covers: what is lost at the ends is won as finer steps between them.

scale = (high - low) / (2**bits - 1)      zero_point = round(-low / scale)      low <= 0 <= high
minmax:     low, high = min(w), max(w)
percentile: low, high = percentiles 100 - p and p of w
mse:        low, high = c * (min(w), max(w)) with c = argmin over [0.3, 1] of sum(importance * (w - rounded(w))**2)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from edgelab.storage.scales import as_stored

Range = Literal["minmax", "percentile", "mse"]

SHRINKING = tuple(
    1 - step / 50 for step in range(36)
)  # 1 to 0.3; Gaussian groups of 64 at 2 bits end near 0.6


def find_grid(
    groups: Tensor,
    bits: int,
    symmetric: bool,
    range: Range = "minmax",
    percentile: float = 99.9,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of each group, its range chosen by one of three rules.

    groups: (..., group_size), float. percentile: 50 to 100, where that is the rule. importance: weight of each squared
    error where mse is the rule, of a shape that broadcasts to groups, as (group_size,); None counts all alike.
    Returns scale (...), float32 as it is stored, and zero_point (...) in uint8, or None where symmetric.
    """
    groups = groups.float()
    if range == "percentile":
        return percentile_grid(groups, bits, symmetric, percentile)
    if range == "mse":
        return mse_grid(groups, bits, symmetric, importance)
    return affine_grid(groups, bits, symmetric)


def affine_grid(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of the min-max range of each group, widened so that it holds zero.

    groups: (..., group_size), float32. Returns scale (...) in float32 and zero_point (...) in uint8, or None.
    """
    if symmetric:
        return grid_of(None, groups.abs().amax(-1), bits)
    return grid_of(groups.amin(-1), groups.amax(-1), bits)


def percentile_grid(
    groups: Tensor, bits: int, symmetric: bool, percentile: float
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of the range between two percentiles of each group; of |w| where symmetric."""
    share = percentile / 100
    if symmetric:
        return grid_of(None, quantile(groups.abs().sort(-1).values, share), bits)
    ordered = groups.sort(-1).values
    return grid_of(quantile(ordered, 1 - share), quantile(ordered, share), bits)


def mse_grid(
    groups: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of the shrunken min-max range with the least squared error of each group.

    As the ranges of GPTQ's code, arXiv:2210.17323, with squares instead of the power 2.4. Never worse than min-max.
    """
    low, high = groups.amin(-1), groups.amax(-1)
    if symmetric:
        low, high = None, torch.maximum(high, -low)
    best, least = None, None
    for factor in SHRINKING:
        scale, zero_point = grid_of(None if low is None else low * factor, high * factor, bits)
        error = (on_grid(groups, scale, zero_point, bits) - groups).square_()
        error = (error if importance is None else error * importance).sum(-1)
        if best is None:
            best, least = (scale, zero_point), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(
            None if old is None else torch.where(better, new, old)
            for new, old in zip((scale, zero_point), best, strict=True)
        )
    return best


def grid_of(low: Tensor | None, high: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point that cover [low, high] and zero; low None: symmetric, [-high, high].

    The stored scale is the one that rounding uses, so that its eleven bits cost nothing but range.
    """
    if low is None:
        return as_stored(high / (2 ** (bits - 1) - 1)), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = as_stored((high - low) / (2**bits - 1))
    zero_point = torch.round(-low / scale).clamp(0, 2**bits - 1)
    return scale, zero_point.to(torch.uint8)


def round_to_grid(groups: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Integers in [0, 2**bits - 1] of groups (..., group_size), as float32. A float zero_point is rounded with w."""
    if zero_point is not None and zero_point.is_floating_point():
        integers = torch.round_(groups / scale[..., None] + zero_point.float()[..., None])
        return integers.clamp_(0, 2**bits - 1)
    centre = 2 ** (bits - 1) if zero_point is None else zero_point.float()[..., None]
    return torch.round_(groups / scale[..., None]).add_(centre).clamp_(0, 2**bits - 1)


def on_grid(groups: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Groups (..., group_size) rounded to their grid, float32."""
    centre = 2 ** (bits - 1) if zero_point is None else zero_point.float()[..., None]
    return round_to_grid(groups, scale, zero_point, bits).sub_(centre).mul_(scale[..., None])


def quantile(ordered: Tensor, share: float) -> Tensor:
    """Quantile along the last dimension of sorted values, between two of them linear.

    torch.quantile gives the same, for at most 2**24 values, fewer than a matrix of a 7B model has.
    """
    position = share * (ordered.shape[-1] - 1)
    below = int(position)
    above = min(below + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., below], ordered[..., above], position - below)
