"""Layers: fewer blocks, each as wide as before. What every engine runs, and what makes decoding faster for certain.

influence   1 - cos(states before, states after) of a block, mean over tokens (Men et al. 2024, arXiv:2403.03853)
angular     the run of neighbouring blocks whose two ends differ least in angle (Gromov et al. 2024, arXiv:2403.17887)
nll         by how much the loss rises without this block alone
greedy      the same, measured again after each removal
even        evenly over the depth: a control without text, and what students of a distillation often start from
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgelab.model.blocks import Block, block_list, blocks, half_precision, longest
from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.observing import nll_behind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What configurations say of each layer
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "sliding_windows", "indexer_types")


@register("prune.layers", shown=("keep",))
@dataclass(frozen=True, kw_only=True)
class Layers(Calibrated):
    """Remove whole blocks.

    keep: blocks that stay. by: how they are chosen: influence, angular, nll, greedy, even, or random, where the seed of
    the recipe decides. drop: blocks to remove by number from 0, as in 15/16/17, in place of a choice.
    """

    keep: int = 0
    by: Literal["influence", "angular", "nll", "greedy", "even", "random"] = "greedy"
    drop: str = ""
    samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.drop) == bool(self.keep) or self.keep < 0:
            raise RecipeError(
                "prune.layers takes keep, how many blocks stay (keep=20), or drop, which ones go (drop=15/16)."
            )
        if self.drop and self.by != "greedy":
            raise RecipeError(
                f"by={self.by} chooses blocks, and drop={self.drop} names them; give one of the two."
            )
        if not all(place.isdecimal() for place in self.drop.split("/") if self.drop):
            raise RecipeError(f"prune.layers:drop={self.drop} is no list of blocks such as 15/16/17.")

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with fewer blocks, in the order they had."""
        count = len(block_list(model)[1])
        if self.drop:
            gone = {int(place) for place in self.drop.split("/")}
            if max(gone) >= count or len(gone) == count:
                raise RecipeError(
                    f"drop={self.drop} should name some of the blocks 0 to {count - 1}, not all."
                )
        elif self.keep > count:
            raise RecipeError(f"keep={self.keep} is more than the {count} blocks of the model.")
        else:
            gone = self._choose(model, count, context)
        return without(model, gone)

    def _choose(self, model: PreTrainedModel, count: int, context: Context) -> set[int]:
        remove = count - self.keep
        if self.by == "even":
            stay = {round(place) for place in torch.linspace(0, count - 1, self.keep).tolist()}
            return set(range(count)) - stay
        if self.by == "random":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(context.seed))
            return set(order[:remove].tolist())
        tokens = self.draw(context, longest(model))
        found, hidden = blocks(model, tokens)
        if self.by in ("nll", "greedy"):
            return _by_loss(model, found, hidden, tokens, remove, self.by == "greedy", context)
        states = [hidden]
        with torch.no_grad(), half_precision():
            for done, block in enumerate(found, 1):
                states.append(block(states[-1]))
                context.progress(done, count)
        if self.by == "influence":
            scores = [1 - _cosine(before, after) for before, after in pairwise(states)]
            return set(torch.tensor(scores).argsort(stable=True)[:remove].tolist())
        starts = range(count - remove + 1)
        angles = [math.acos(min(1.0, _cosine(states[start], states[start + remove]))) for start in starts]
        first = angles.index(min(angles))
        return set(range(first, first + remove))


def _cosine(before: Tensor, after: Tensor) -> float:
    """Mean cosine between states of the same token."""
    return float(functional.cosine_similarity(before.float(), after.float(), dim=-1).mean())


def _by_loss(
    model: PreTrainedModel,
    found: list[Block],
    hidden: Tensor,
    tokens: Tensor,
    remove: int,
    again: bool,
    context: Context,
) -> set[int]:
    """The blocks without which the loss rises least: each alone, or one after the other and measured again.

    Blocks before the one that is left out give the same states with or without it, so they are run once.
    """
    gone: set[int] = set()
    rounds = remove if again else 1
    with torch.no_grad(), half_precision():
        for done in range(1, rounds + 1):
            left = [place for place in range(len(found)) if place not in gone]
            losses, before = {}, hidden
            for place in left:
                states = before
                for other in left[left.index(place) + 1 :]:
                    states = found[other](states)
                losses[place] = nll_behind(model, found, states, tokens)
                before = found[place](before)
                context.progress(done * len(left) - len(left) + len(losses), rounds * len(left))
            best = sorted(left, key=losses.get)
            gone |= set(best[: 1 if again else remove])
    return gone


def without(model: PreTrainedModel, gone: set[int]) -> PreTrainedModel:
    """A copy of the model without some blocks."""
    model = copy.deepcopy(model)
    take_out(model, gone)
    return model


def take_out(model: PreTrainedModel, gone: set[int]) -> None:
    """Take blocks out of a model, in place; its configuration and caches count those that are left."""
    name, modules = block_list(model)
    stay = [place for place in range(len(modules)) if place not in gone]
    model.set_submodule(name, nn.ModuleList([modules[place] for place in stay]))
    for place, block in enumerate(model.get_submodule(name)):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    lists = {
        key: value
        for key in PER_LAYER
        if isinstance(value := getattr(model.config, key, None), list) and len(value) == len(modules)
    }
    model.config.num_hidden_layers = len(stay)
    for key, value in lists.items():
        setattr(model.config, key, [value[place] for place in stay])
