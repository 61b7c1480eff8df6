"""Channels: narrower MLPs, really smaller matrices, in the same number of layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgelab.model.structures import mlps, narrow
from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.pruning.structured import Structured, stay

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("prune.channels", shown=("share",))
@dataclass(frozen=True, kw_only=True)
class Channels(Structured):
    """Remove channels of the MLPs: rows of what writes them and columns of what reads them.

    share: of the channels that goes, 0 to 1. multiple: widths that stay are rounded up to one of it.
    """

    share: float = 0.25
    multiple: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1 or self.multiple < 1:
            raise RecipeError(
                f"prune.channels:share={self.share},multiple={self.multiple} should be at least 0 and below 1, and "
                "at least 1."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with narrower MLPs; its configuration says the width where all are alike."""
        parts = mlps(model)
        kept = stay(self.channel_scores(model, parts, context), self.share, self.by_layer, self.multiple)
        model = copy.deepcopy(model)
        with torch.no_grad():
            for part, indices in zip(parts, kept, strict=True):
                narrow(model.get_submodule(part.reader), inputs=indices)
                for name in part.writers:
                    narrow(model.get_submodule(name), outputs=indices)
        widths = {len(indices) for indices in kept}
        if len(widths) == 1:
            model.config.intermediate_size = widths.pop()
        return model
