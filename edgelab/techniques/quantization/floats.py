"""Sixteen-bit floats: the same weights, half the bytes. bfloat16 keeps the range, float16 the precision."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgelab.recipes import Context, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy with its parameters cast. Buffers stay: rotary frequencies in 16 bits would blur long positions."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@register("quantize.bf16")
@dataclass(frozen=True)
class BFloat16:
    """Weights and computation in bfloat16: 8 bits of exponent, 7 of mantissa (Kalamkar et al., arXiv:1905.12322)."""

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        return _cast(model, torch.bfloat16)


@register("quantize.fp16")
@dataclass(frozen=True)
class Float16:
    """Weights and computation in IEEE half precision: 5 bits of exponent, 10 of mantissa."""

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        return _cast(model, torch.float16)
