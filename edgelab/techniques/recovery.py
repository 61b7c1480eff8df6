"""Recovery: train what is left after removing, so that it takes over the work of what has gone.

All weights move, embedding and norms too; the zeros that pruning has left stay zeros, bit for bit. Or none of them
moves, and an adapter beside them is trained (LoRA, which see): less memory, and zeros and packed layers stay as well.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

import torch

from edgelab.model.blocks import bfloat16_is_fast
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import packed_layers
from edgelab.techniques.lessons import lesson, where_weights_may_move
from edgelab.techniques.lora import LoRA
from edgelab.training import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("recover")
@dataclass(frozen=True, kw_only=True)
class Recover(Trained):
    """Train every weight of a model from which something was removed.

    loss: kl, the divergence to the reference's predictions, or ce, next-token cross-entropy. adapter: none trains all
    weights, lora an adapter beside them instead, at ten times the learning rate. rank: of the adapter.
    """

    loss: Literal["kl", "ce"] = "kl"
    adapter: Literal["none", "lora"] = "none"
    rank: int = 8
    learning_rate: float = field(default=3e-4, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"recover:rank={self.rank} should be at least 1; 8 is usual.")
        if self.adapter == "none" and self.rank != type(self).rank:
            raise RecipeError(f"recover:rank={self.rank} belongs to adapter=lora.")

    def reads(self) -> list[str]:
        """A text file, and with an adapter the version of lora."""
        return [*super().reads(), *([f"lora, version {LoRA.version}"] if self.adapter == "lora" else [])]

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model, trained; zeros of single weights stay where pruning has put them."""
        if self.adapter == "lora":
            return self.beside().apply(model, context)
        packed = next(iter(packed_layers(model)), None)
        if packed is not None:
            raise RecipeError(
                f"recover trains float weights, and {packed} is quantized or stored without its zeros; put it before "
                "quantizing and prune.store, or use qat."
            )
        if model.dtype != torch.float32:
            raise RecipeError(
                f"recover trains in float32, and the model is in {str(model.dtype).removeprefix('torch.')}, "
                "whose steps are too coarse; put it before quantize.bf16 or quantize.fp16."
            )
        half = bfloat16_is_fast()
        loss = lesson(self.method, self.loss, model, context)
        model = copy.deepcopy(model).requires_grad_(True)
        parameters = list(model.parameters())
        self.fit(model, loss, parameters, context, half, where_weights_may_move(model, parameters))
        return model

    def beside(self) -> LoRA:
        """The training of an adapter with the same settings."""
        shared = {field.name: getattr(self, field.name) for field in fields(Trained)}
        return LoRA(**shared | {"learning_rate": 10 * self.learning_rate}, loss=self.loss, rank=self.rank)
