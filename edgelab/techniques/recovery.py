"""Recovery: train what is left after removing, so that it takes over the work of what has gone.

All weights move, embedding and norms too; the zeros that pruning has left stay zeros, bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.losses import Divergence, Loss, cross_entropy
from edgelab.model.marks import marks_of
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import packed_layers
from edgelab.techniques.quantization.floats import BFloat16
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.training import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("recover")
@dataclass(frozen=True, kw_only=True)
class Recover(Trained):
    """Train every weight of a model from which something was removed.

    loss: kl, the divergence to the reference's predictions, or ce, next-token cross-entropy.
    """

    loss: Literal["kl", "ce"] = "kl"
    learning_rate: float = field(default=3e-4, kw_only=True)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model, trained; zeros of single weights stay where pruning has put them."""
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
        loss = self._loss(model, context, half)
        model = copy.deepcopy(model).requires_grad_(True)
        parameters = list(model.parameters())
        self.fit(model, loss, parameters, context, half, _masks(model, parameters))
        return model

    def _loss(self, model: PreTrainedModel, context: Context, half: bool) -> Loss:
        if self.loss == "ce":
            return cross_entropy
        reference = context.reference
        if reference is None:
            raise RecipeError("recover needs the reference for its loss; use loss=ce.")
        rows, wanted = (one.get_output_embeddings().weight.shape[0] for one in (model, reference))
        if rows != wanted:
            raise RecipeError(
                f"The model predicts {rows} tokens and the reference {wanted}, which have no divergence; use loss=ce."
            )
        return Divergence(BFloat16().apply(reference, context) if half else reference)


def _masks(model: PreTrainedModel, parameters: list[nn.Parameter]) -> dict[int, Tensor]:
    """Where weights may move, by place, in the layers of a model with single weights removed."""
    if not marks_of(model).pruned:
        return {}
    place = {id(parameter): number for number, parameter in enumerate(parameters)}
    return {place[id(layer.weight)]: layer.weight.detach() != 0 for layer in linear_layers(model).values()}
