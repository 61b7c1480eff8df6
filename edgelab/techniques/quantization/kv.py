"""The technique that asks for a quantized key-value cache; `edgelab.storage.kv_cache` is the cache.

Liu et al. 2024, KIVI, arXiv:2402.02750.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import DynamicCache, DynamicLayer

from edgelab.model.marks import marked, marks_of
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.kv_cache import CacheGrid, head_shape
from edgelab.techniques.quantization.rtn import GroupSizeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = (8, 4, 2)


@register("quantize.kv", shown=("bits",))
@dataclass(frozen=True)
class QuantizedKeyValues:
    """Keep keys and values in few bits while the model generates. The weights stay as they are.

    bits: 8, 4 or 2. group_size: numbers that share a scale and a minimum, a multiple of 8: tokens of one channel for
    keys; channels of one token for values, at most those of a head. residual: most recent tokens kept as they are.
    """

    bits: int = 4
    group_size: int = 32
    residual: int = 32

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise RecipeError(f"quantize.kv:bits={self.bits} is none of 8, 4 and 2.")
        if self.group_size < 8 or self.group_size % 8:
            raise RecipeError(f"quantize.kv:group_size={self.group_size} is no multiple of 8; 32 is usual.")
        if self.residual < 0:
            raise RecipeError(f"quantize.kv:residual={self.residual} is negative; 0 packs all it can.")

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model, marked with a CacheGrid. Raises RecipeError for a model whose cache cannot be packed."""
        if marks_of(model).cache is not None:
            raise RecipeError(
                "The key-value cache is quantized already: quantize.kv stands in a recipe once."
            )
        others = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {
            DynamicLayer.__name__
        }
        if others:
            raise RecipeError(
                f"quantize.kv needs full attention in every layer; this model has {', '.join(sorted(others))}."
            )
        _, head_dim = head_shape(model.config)
        group_size = min(self.group_size, head_dim)
        if head_dim % group_size or group_size % 8:
            fitting = [str(size) for size in range(8, head_dim + 1, 8) if head_dim % size == 0]
            raise GroupSizeError(
                f"group_size={self.group_size} does not divide the {head_dim} channels of a head into whole bytes; "
                f"use {', '.join(fitting) or 'a model with a head size that 8 divides'}."
            )
        context.progress(1, 1)
        return marked(model, cache=CacheGrid(self.bits, self.group_size, self.residual))
