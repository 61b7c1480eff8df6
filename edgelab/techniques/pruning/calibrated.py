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
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.pruning.masks import Sparse, check_pattern
from edgelab.techniques.pruning.measured import SPARSITIES, SparsityTable, sparsity_table
from edgelab.techniques.pruning.owl import layer_sparsities, outlier_share
from edgelab.techniques.quantization.gptq import input_products
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.techniques.sensitivity import SAMPLES

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

    by_layer: how sparsity is chosen: uniform, owl, where blocks with more outliers keep more, or measured, where each
    layer is pruned alone and the best allocation takes as many weights in all. owl_lambda: with owl, blocks are at
    most twice this apart. owl_outlier: an outlier is this many times the mean. sensitivity: how measured finds what a
    layer costs; "fisher" predicts it from gradients, "kl" runs the model again for every layer and sparsity, which
    takes dozens of times as long.
    """

    by_layer: Literal["uniform", "owl", "measured"] = "uniform"
    owl_lambda: float = 0.08
    owl_outlier: float = 5.0
    sensitivity: Literal["fisher", "kl"] = "fisher"

    def __post_init__(self) -> None:
        Sparse.__post_init__(self)
        Calibrated.__post_init__(self)
        if self.by_layer != "uniform" and self.pattern != "unstructured":
            raise RecipeError(
                f"pattern={self.pattern} removes half of every layer; by_layer={self.by_layer} needs "
                "pattern=unstructured."
            )
        defaults = type(self).owl_lambda, type(self).owl_outlier
        if self.by_layer != "owl" and (self.owl_lambda, self.owl_outlier) != defaults:
            raise RecipeError(
                f"owl_lambda={self.owl_lambda},owl_outlier={self.owl_outlier} belong to by_layer=owl."
            )
        if self.by_layer != "measured" and self.sensitivity != "fisher":
            raise RecipeError(f"sensitivity={self.sensitivity} belongs to by_layer=measured.")
        if self.by_layer == "measured" and self.sparsity > SPARSITIES[-1]:
            raise RecipeError(
                f"sparsity={self.sparsity} is above {SPARSITIES[-1]}, the most that by_layer=measured tries on a layer."
            )
        if (
            self.by_layer == "owl"
            and not 0 <= self.sparsity - 2 * self.owl_lambda <= self.sparsity + 2 * self.owl_lambda < 1
        ):
            raise RecipeError(
                f"twice owl_lambda={self.owl_lambda} around sparsity={self.sparsity} leaves 0 to 1; use a smaller one."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with zeros in its linear layers."""
        for name, layer in linear_layers(model, context.record).items():
            check_pattern(self.pattern, layer.in_features, name)
        tokens = self.draw(context, longest(model))
        model = copy.deepcopy(model)
        found, hidden = blocks(model, tokens)
        with torch.no_grad():
            if self.by_layer == "measured":
                sparsities = self._measured(model, tokens[:SAMPLES], context)
            else:
                sparsities = self._by_block(found, hidden)
            reached: set[str] = set()
            for done, block in enumerate(found, 1):
                groups = block.groups(hidden[:1])
                reached |= {f"{block.name}.{name}" for group in groups for name in group.layers}
                hidden = self._prune_block(block, hidden, groups, sparsities, context)
                context.progress(done, len(found))
            self._prune_rest(model, reached, context)
        return marked(model, pruned=True)

    def table(self, model: PreTrainedModel, context: Context) -> SparsityTable:
        """What by_layer=measured decides by: what every layer costs at each sparsity. Read from disk a second time."""
        linear_layers(model)  # refuses what is quantized already
        return sparsity_table(model, self.draw(context, longest(model))[:SAMPLES], self.sensitivity, context)

    def look_at(self, inputs: Tensor) -> tuple[Tensor, int]:
        """What `prune_layer` has to know of the inputs (..., in_features), and how many tokens were no numbers."""
        return input_products(inputs)

    @abstractmethod
    def prune_layer(self, layer: nn.Linear, seen: Tensor, sparsity: float) -> PackedLinear | None:
        """Set weights of a layer to zero, in place; returns what takes its place where it is rounded as well.

        seen: what `look_at` gave, as a rule the mean of x x^T.
        """

    def _measured(self, model: PreTrainedModel, tokens: Tensor, context: Context) -> dict[str, float]:
        """The sparsity of each layer that an allocation gives it."""
        table = sparsity_table(model, tokens, self.sensitivity, context)
        chosen = table.frame(table.allocate(self.sparsity))
        context.record.numbers["predicted_kld"] = float(chosen["cost"].sum())
        least, most = chosen["sparsity"].min(), chosen["sparsity"].max()
        context.record.notes.append(f"Layers of {least:.0%} to {most:.0%} sparsity.")
        return dict(zip(chosen["name"], chosen["sparsity"], strict=True))

    def _by_block(self, found: list[Block], hidden: Tensor) -> dict[str, float]:
        """The sparsity of each layer, the same within a block."""
        sparsities = [self.sparsity] * len(found) if self.by_layer == "uniform" else self._owl(found, hidden)
        return {
            f"{block.name}.{name}": sparsity
            for block, sparsity in zip(found, sparsities, strict=True)
            for name in block.linear()
        }

    def _owl(self, found: list[Block], hidden: Tensor) -> list[float]:
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

    def _prune_block(
        self,
        block: Block,
        hidden: Tensor,
        groups: list[Group],
        sparsities: dict[str, float],
        context: Context,
    ) -> Tensor:
        """Prune the layers of one block in place; returns the hidden states behind it."""
        layers, packed = block.linear(), {}

        def visit(group: Group, inputs: Tensor) -> None:
            seen, lost = self.look_at(inputs)
            if lost:
                context.record.notes.append(f"{block.name}: {lost} tokens with non-finite inputs left out.")
            for name in group.layers:
                sparsity = sparsities.get(f"{block.name}.{name}", self.sparsity)
                if (made := self.prune_layer(layers[name], seen, sparsity)) is not None:
                    packed[name] = made

        with half_precision():
            outputs = block.on_the_way(hidden, groups, visit)
        for name, layer in packed.items():
            block.module.set_submodule(name, layer)
        return outputs

    def _prune_rest(self, model: PreTrainedModel, reached: set[str], context: Context) -> None:
        """Prune, in place, the layers that no calibration text runs, as if all their inputs were alike, and note it."""
        rest = {
            name: layer for name, layer in linear_layers(model, packed=True).items() if name not in reached
        }
        for name, layer in rest.items():
            seen, _ = self.look_at(torch.eye(layer.in_features))
            if (made := self.prune_layer(layer, seen, self.sparsity)) is not None:
                model.set_submodule(name, made)
        if rest:
            context.record.notes.append(
                f"Layers that calibration does not reach lose their smallest weights: {', '.join(rest)}."
            )
