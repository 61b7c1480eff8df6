"""Unpacking: packed layers become dense float layers again, which is how a recipe asks for quantizing twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import packed_layers, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("quantize.unpack")
@dataclass(frozen=True)
class Unpack:
    """Dequantize every packed layer; the weights keep what rounding made of them, and their size is that of floats.

    quantize.rtn:bits=8 + quantize.unpack + quantize.rtn:bits=4 rounds the rounded weights again. Layers take the
    model's own dtype, float32 unless quantize.bf16 or quantize.fp16 came first. Inputs are no longer rounded either.
    """

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model without packed layers. Raises RecipeError where there are none."""
        if not packed_layers(model):
            raise RecipeError("quantize.unpack found no packed layers; put a quantizing technique before it.")
        return unpacked(model, context.progress)
