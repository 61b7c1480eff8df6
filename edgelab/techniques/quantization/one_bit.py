"""One bit and 1.58 bits: a scale per group and nothing but signs, with or without a zero.

ternary   scale = mean |w|      q = clamp(round(w / scale), -1, 1)    w ~ q * scale            q + 2 stored in 2 bits
binary    scale = 2 mean |w|    q = 1 where w >= 0 else 0             w ~ (q - 1/2) * scale    q stored in 1 bit

mean |w| is the best scale that signs can have: sum (w - a sign(w))^2 is smallest at a = mean |w|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, register
from edgelab.storage.scales import as_stored, eleven_bits
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.rtn import check_settings, in_groups, replace_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ternary_scale(groups: Tensor) -> Tensor:
    """mean |w| of each group, (..., group_size) -> (...), float32, positive."""
    return as_stored(groups.abs().mean(-1))


def binary_scale(groups: Tensor) -> Tensor:
    """2 mean |w| of each group, the distance of its two levels, (..., group_size) -> (...), float32; 0 for zeros."""
    return eleven_bits(groups.abs().mean(-1).mul_(2))


def quantize_ternary(weight: Tensor, group_size: int) -> QuantizedTensor:
    """Round `weight` to -1, 0 and 1 times the mean magnitude of its group.

    weight: (out_features, in_features), float. group_size must divide in_features; 0 means one group per row.
    Returns integers 1, 2, 3 of 2 bits without zero-point (2 stands for zero), scale (out_features, groups).
    Ma et al. 2024 (BitNet b1.58), arXiv:2402.17764, equations 1 to 3.
    """
    groups = in_groups(weight, group_size)
    scale = ternary_scale(groups)
    integers = torch.round(groups / scale[..., None]).clamp_(-1, 1).add_(2)
    return QuantizedTensor(integers.to(torch.uint8).reshape(weight.shape), scale, None, 2)


def quantize_binary(weight: Tensor, group_size: int) -> QuantizedTensor:
    """Round `weight` to plus or minus the mean magnitude of its group; zero counts as positive.

    weight: (out_features, in_features), float. group_size must divide in_features; 0 means one group per row.
    Returns integers 0 and 1 of 1 bit without zero-point, scale (out_features, groups).
    Rastegari et al. 2016 (XNOR-Net), arXiv:1603.05279, equation 6; Wang et al. 2023 (BitNet), arXiv:2310.11453.
    """
    groups = in_groups(weight, group_size)
    integers = (groups >= 0).to(torch.uint8)
    return QuantizedTensor(integers.reshape(weight.shape), binary_scale(groups), None, 1)


@register("quantize.ternary", shown=("group_size",))
@dataclass(frozen=True)
class Ternary:
    """Every linear layer but the head to -1, 0 and 1 after training, which no trained model survives: see `qat`.

    group_size: inputs that share a scale, 0 for a whole row.
    """

    group_size: int = 64

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear of 2 bits in place of the linear layers."""
        return replace_linear(model, context, quantize_ternary, group_size=self.group_size)


@register("quantize.binary", shown=("group_size",))
@dataclass(frozen=True)
class Binary:
    """Every linear layer but the head to two levels after training, which no trained model survives: see `qat`.

    group_size: inputs that share a scale, 0 for a whole row.
    """

    group_size: int = 64

    def __post_init__(self) -> None:
        check_settings(self.method, self.group_size)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear of 1 bit in place of the linear layers."""
        refuse_zeros(model, self.method)
        return replace_linear(model, context, quantize_binary, group_size=self.group_size)
