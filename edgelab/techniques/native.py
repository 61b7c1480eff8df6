"""Native: leave the weights as they are, and let an engine round them with a quantizer of its own.

Some engines take nothing but what their own converter made. Rows of `native.int8 @ litert` say so by their name: what
differs from `quantize.rtn:bits=8` is the algorithm, not only the kernel.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PreTrainedModel

from edgelab.recipes import Context, RecipeError, register


def marked(model: PreTrainedModel, width: str) -> PreTrainedModel:
    """The same weights, with the wish for an engine's own quantizer. Raises RecipeError where there is one already."""
    if hasattr(model, "native"):
        raise RecipeError(
            f"native.{width} stands alone; the weights are marked native.{model.native} already."
        )
    model = copy.copy(model)  # the parameters are shared: nothing changes them
    model.native = width
    return model


@register("native.int8")
@dataclass(frozen=True)
class NativeInt8:
    """8 bits by the engine's own quantizer, as in `native.int8 @ litert`."""

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """The model itself, marked."""
        return marked(model, "int8")


@register("native.int4")
@dataclass(frozen=True)
class NativeInt4:
    """4 bits by the engine's own quantizer, as in `native.int4 @ openvino`."""

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """The model itself, marked."""
        return marked(model, "int4")
