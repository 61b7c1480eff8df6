"""Channels: narrower MLPs, really smaller matrices, in the same number of layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgelab.model.structures import mlps, narrow
from edgelab.recipes import Context, register
from edgelab.techniques.pruning.structured import Share, Structured, stay

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("prune.channels", shown=("share",))
@dataclass(frozen=True, kw_only=True)
class Channels(Share, Structured):
    """Remove channels of the MLPs: rows of what writes them and columns of what reads them."""

    def __post_init__(self) -> None:
        Share.__post_init__(self)
        Structured.__post_init__(self)

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
