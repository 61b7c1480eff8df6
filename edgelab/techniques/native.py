"""Native: leave the weights as they are, and let an engine round them with a quantizer of its own.

Some engines take nothing but what their own converter made. Rows of `native.int8 @ litert` say so by their name: what
differs from `quantize.rtn:bits=8` is the algorithm, not only the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelab.model.marks import marked, marks_of
from edgelab.recipes import Context, RecipeError, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def left_to_engine(model: PreTrainedModel, width: str) -> PreTrainedModel:
    """The same weights, with the wish for an engine's own quantizer. Raises RecipeError where there is one already."""
    if already := marks_of(model).native:
        raise RecipeError(f"native.{width} stands alone; the weights are marked native.{already} already.")
    return marked(model, native=width)


@register("native.int8")
@dataclass(frozen=True)
class NativeInt8:
    """8 bits by the engine's own quantizer, as in `native.int8 @ litert`."""

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """The model itself, marked."""
        return left_to_engine(model, "int8")


@register("native.int4")
@dataclass(frozen=True)
class NativeInt4:
    """4 bits by the engine's own quantizer, as in `native.int4 @ openvino`."""

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """The model itself, marked."""
        return left_to_engine(model, "int4")
