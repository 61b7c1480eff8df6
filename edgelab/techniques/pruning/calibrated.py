"""What Wanda and SparseGPT have in common: block after block, on the inputs that pruned blocks give."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from edgelab.model.blocks import Block, Group, blocks, half_precision, longest
from edgelab.model.marks import marked
from edgelab.recipes import Context, RecipeError
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.pruning.masks import Sparse, check_pattern
from edgelab.techniques.pruning.owl import layer_sparsities, outlier_share
from edgelab.techniques.quantization.gptq import input_products
from edgelab.techniques.quantization.rtn import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_squares(inputs: Tensor) -> tuple[Tensor, int]:
    """Mean of x**2 over tokens, (in_features,), and how many tokens were left out as not finite."""
    tokens = inputs.flatten(0, -2).float()
    finite = tokens.isfinite().all(-1)
    return tokens[finite].square().mean(0), len(tokens) - int(finite.sum())


@dataclass(frozen=True, kw_only=True)
class CalibratedPruning(Sparse, Calibrated, ABC):
    """Settings of pruning that looks at inputs.

    by_layer: how the sparsity of each block is chosen: uniform, or owl, where blocks with more outliers keep more.
    owl_lambda: how far from the mean a block may be, with owl. owl_outlier: an outlier is this many times the mean.
    """

    by_layer: Literal["uniform", "owl"] = "uniform"
    owl_lambda: float = 0.08
    owl_outlier: float = 5.0

    def __post_init__(self) -> None:
        Sparse.__post_init__(self)
        Calibrated.__post_init__(self)
        if self.by_layer == "owl" and self.pattern != "unstructured":
            raise RecipeError(
                f"pattern={self.pattern} removes half of every layer; by_layer=owl needs pattern=unstructured."
            )
        if (
            self.by_layer == "owl"
            and not 0 <= self.sparsity - self.owl_lambda <= self.sparsity + self.owl_lambda < 1
        ):
            raise RecipeError(
                f"owl_lambda={self.owl_lambda} around sparsity={self.sparsity} leaves 0 to 1; use a smaller one."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with zeros in its linear layers."""
        for name, layer in linear_layers(model, context.record).items():
            check_pattern(self.pattern, layer.in_features, name)
        tokens = self.draw(context, longest(model))
        model = copy.deepcopy(model)
        found, hidden = blocks(model, tokens)
        with torch.no_grad():
            sparsities = self._sparsities(found, hidden)
            for done, (block, sparsity) in enumerate(zip(found, sparsities, strict=True), 1):
                hidden = self._prune_block(block, hidden, sparsity, context)
                context.progress(done, len(found))
        return marked(model, pruned=True)

    def look_at(self, inputs: Tensor) -> tuple[Tensor, int]:
        """What `prune_layer` has to know of the inputs (..., in_features), and how many tokens were no numbers."""
        return input_products(inputs)

    @abstractmethod
    def prune_layer(self, layer: nn.Linear, seen: Tensor, sparsity: float) -> None:
        """Set weights of a layer to zero, in place. seen: what `look_at` gave, as a rule the mean of x x^T."""

    def _sparsities(self, found: list[Block], hidden: Tensor) -> list[float]:
        if self.by_layer == "uniform":
            return [self.sparsity] * len(found)
        shares = []
        for block in found:
            layers, scores = block.linear(), []

            def score(group: Group, inputs: Tensor, layers=layers, scores=scores) -> None:
                norms = input_squares(inputs)[0].sqrt()
                scores.extend((layers[name].weight.abs() * norms).flatten() for name in group.layers)

            with half_precision():
                hidden = block.on_the_way(hidden, block.groups(hidden[:1]), score)
            shares.append(outlier_share(torch.cat(scores), self.owl_outlier))
        weights = [sum(layer.weight.numel() for layer in block.linear().values()) for block in found]
        return layer_sparsities(shares, self.sparsity, self.owl_lambda, weights)

    def _prune_block(self, block: Block, hidden: Tensor, sparsity: float, context: Context) -> Tensor:
        """Prune the layers of one block in place; returns the hidden states behind it."""
        layers = block.linear()

        def visit(group: Group, inputs: Tensor) -> None:
            seen, lost = self.look_at(inputs)
            if lost:
                context.record.notes.append(f"{block.name}: {lost} tokens with non-finite inputs left out.")
            for name in group.layers:
                self.prune_layer(layers[name], seen, sparsity)

        with half_precision():
            return block.on_the_way(hidden, block.groups(hidden[:1]), visit)
