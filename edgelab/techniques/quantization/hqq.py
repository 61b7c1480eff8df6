"""HQQ, half-quadratic quantization: move the zero-points so that most weights err little, and outliers as they must.

min over z of |w - (q - z) s|_p^p with p < 1, made half-quadratic by errors e that shrinkage sets:
q = clamp(round(w / s + z), 0, 2**bits - 1)
e = shrink(w - (q - z) s)      shrink(x) = sign(x) max(|x| - |x|**(p - 1) / beta, 0)
z = mean(q - (w - e) / s)      beta = kappa beta

beta has a unit, as in the authors' code: where errors stay below beta**(-1 / (2 - p)) = 0.17, every e is 0, and z is
what makes the mean error of a group 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, register
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.ranges import affine_grid, round_to_grid
from edgelab.techniques.quantization.rtn import check_settings, in_groups, replace_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20  # as in the authors' code


def shrink(error: Tensor, beta: float) -> Tensor:
    """The proximal operator of |x|**0.7 as HQQ approximates it, element by element: small errors become 0."""
    return error.sign() * (error.abs() - error.abs() ** (NORM - 1) / beta).clamp_(min=0)


def half_quadratic_zero_point(groups: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The zero-points that half-quadratic splitting ends with, (..., 1) float32.

    groups: (..., group_size), float32. scale, zero_point: (..., 1), float32, where it starts. It stops where the mean
    absolute error over all groups no longer falls, after 20 rounds at the latest.
    Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """
    beta, least = BETA, torch.inf
    for _ in range(ITERATIONS):
        integers = torch.round(groups / scale + zero_point).clamp_(0, 2**bits - 1)
        error = groups - (integers - zero_point) * scale
        zero_point = (integers - (groups - shrink(error, beta)) / scale).mean(-1, keepdim=True)
        beta *= KAPPA
        mean_error = float(error.abs().mean())
        if mean_error >= least:
            break
        least = mean_error
    return zero_point


def quantize_half_quadratic(weight: Tensor, bits: int, group_size: int) -> QuantizedTensor:
    """Round `weight` onto min-max scales with optimised zero-points that lie between integers, stored in float16.

    weight: (out_features, in_features), float. group_size must divide in_features; 0 means one group per row.
    Raises GroupSizeError where it does not.
    """
    groups = in_groups(weight, group_size)  # (out, groups, group_size)
    scale, zero_point = affine_grid(groups, bits, symmetric=False)
    start = scale[..., None], zero_point.float()[..., None]
    zero_point = half_quadratic_zero_point(groups, *start, bits)[..., 0].half()
    integers = round_to_grid(groups, scale, zero_point, bits)
    return QuantizedTensor(integers.to(torch.uint8).reshape(weight.shape), scale, zero_point, bits)


@register("quantize.hqq", shown=("bits", "group_size"))
@dataclass(frozen=True)
class HalfQuadratic:
    """HQQ on every linear layer but the head, without data. bits: 2 to 8. group_size: 0 for a whole row."""

    bits: int = 4
    group_size: int = 64

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size, self.bits)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the linear layers."""
        refuse_zeros(model, self.method)  # its zero-points lie between integers
        return replace_linear(
            model, context, quantize_half_quadratic, bits=self.bits, group_size=self.group_size
        )
