"""What training teaches a model: the token that comes next, or all that a teacher thinks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.losses import Divergence, Loss, cross_entropy, live
from edgelab.model.marks import marks_of
from edgelab.recipes import Context, RecipeError
from edgelab.techniques.quantization.floats import BFloat16
from edgelab.techniques.quantization.rtn import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lesson(
    technique: str,
    loss: Literal["kl", "ce"],
    model: PreTrainedModel,
    context: Context,
    otherwise: PreTrainedModel | None = None,
) -> Loss:
    """The loss that a model is trained on: ce, the next token, or kl, the divergence from the reference.

    otherwise: what is taken for the reference where there is none. Raises RecipeError where neither is there, or where
    it predicts other tokens than the model.
    """
    if loss == "ce":
        return cross_entropy
    reference = context.reference or otherwise
    if reference is None:
        raise RecipeError(f"{technique} needs the reference for its loss; use loss=ce.")
    rows, wanted = predicted(model), predicted(reference)
    if rows != wanted:
        raise RecipeError(
            f"The model predicts {rows} tokens and the reference {wanted}, which have no divergence; use loss=ce."
        )
    return Divergence(live(teaching(reference, context)))


def predicted(model: PreTrainedModel) -> int:
    """The number of tokens that a model predicts."""
    head = model.get_output_embeddings()
    return getattr(head, "out_features", None) or head.weight.shape[0]


def where_weights_may_move(model: PreTrainedModel, parameters: list[nn.Parameter]) -> dict[int, Tensor]:
    """Masks by place for training, in the layers of a model with single weights removed: zeros stay zeros."""
    if not marks_of(model).pruned:
        return {}
    place = {id(parameter): number for number, parameter in enumerate(parameters)}
    return {place[id(layer.weight)]: layer.weight.detach() != 0 for layer in linear_layers(model).values()}


def teaching(teacher: PreTrainedModel, context: Context) -> PreTrainedModel:
    """A teacher ready for its lessons: in bfloat16 where the processor computes quickly in it, and never trained."""
    return BFloat16().apply(teacher, context).requires_grad_(False) if bfloat16_is_fast() else teacher
