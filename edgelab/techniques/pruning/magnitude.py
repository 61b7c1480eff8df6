"""Magnitude pruning: the smallest weights go, whatever reads them. The oldest method, and the control of all others."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from edgelab.model.marks import marked
from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.pruning.masks import Sparse, check_pattern, keep_mask
from edgelab.techniques.quantization.rtn import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("prune.magnitude", shown=("sparsity",))
@dataclass(frozen=True, kw_only=True)
class Magnitude(Sparse):
    """Set the smallest weights of every linear layer but the head to zero.

    per: what weights are ranked among: a row, a layer, or all layers together (global). Layers differ in the size of
    their weights, so that a global ranking empties some of them first.
    Han et al. 2015, arXiv:1506.02626.
    """

    per: Literal["row", "layer", "global"] = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "unstructured" and self.per != "layer":
            raise RecipeError(
                f"pattern={self.pattern} ranks within its own groups; leave out per={self.per}."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with zeros in its linear layers."""
        for name, layer in linear_layers(model, context.record).items():
            check_pattern(self.pattern, layer.in_features, name)
        model = copy.deepcopy(model)
        layers = linear_layers(model)
        if self.per == "global":
            self._all_together(layers)
            return marked(model, pruned=True)
        with torch.no_grad():
            for done, layer in enumerate(layers.values(), 1):
                layer.weight *= keep_mask(layer.weight.abs(), self.sparsity, self.pattern, self.per)
                context.progress(done, len(layers))
        return marked(model, pruned=True)

    @torch.no_grad()
    def _all_together(self, layers: dict[str, nn.Linear]) -> None:
        weights = [layer.weight for layer in layers.values()]
        scores = torch.cat([weight.abs().flatten() for weight in weights])
        mask = keep_mask(scores[None], self.sparsity)[0]
        for weight, part in zip(weights, mask.split([weight.numel() for weight in weights]), strict=True):
            weight *= part.view_as(weight)
