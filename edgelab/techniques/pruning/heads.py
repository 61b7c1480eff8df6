"""Heads: whole groups of key-value heads with their queries, or queries evenly from each group.

Grouped-query attention ties heads together: a key-value head that goes takes its queries along, and queries go from
each group alike, since every group serves as many. 9 queries on 3 key-value heads become 6 on 2, or 6 on 3.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelab.model.structures import Part, attentions, narrow
from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.pruning.structured import Structured, stay

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register("prune.heads")
@dataclass(frozen=True, kw_only=True)
class Heads(Structured):
    """Remove attention heads.

    groups: key-value heads that stay in each block with all their queries; by_layer=global reads it as the mean over
    blocks. queries: query heads that stay in each group, where groups is 0.
    """

    groups: int = 0
    queries: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.groups) == bool(self.queries) or min(self.groups, self.queries) < 0:
            raise RecipeError(
                "prune.heads takes groups, how many key-value heads stay with their queries (groups=2), or queries, "
                "how many queries stay in each group (queries=2)."
            )
        if self.queries and self.by_layer == "global":
            raise RecipeError("queries go from all groups alike; by_layer=global needs groups.")

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with fewer heads; its configuration says how many where all blocks are alike."""
        config, parts = model.config, attentions(model)
        queries, groups = config.num_attention_heads, config.num_key_value_heads
        each = queries // groups
        size = model.get_submodule(parts[0].reader).in_features // queries
        for name, asked, there in (("groups", self.groups, groups), ("queries", self.queries, each)):
            if asked > there:
                raise RecipeError(f"{name}={asked} is more than there are: {there}.")
        of_queries = [
            Part(part.reader, part.writers[:1]) for part in parts
        ]  # keys and values have fewer rows
        scores = self.channel_scores(model, of_queries, context).view(len(parts), groups, each, size).sum(-1)
        if self.by == "magnitude":
            scores = scores + _key_value_squares(model, parts, groups, size)[..., None] / each
        model = copy.deepcopy(model)
        if self.groups:
            kept = stay(scores.sum(-1), 1 - self.groups / groups, self.by_layer)
            heads = [torch.arange(queries).view(groups, each)[indices] for indices in kept]
        else:
            best = scores.argsort(dim=-1, stable=True)[..., each - self.queries :].sort(-1).values
            kept = [torch.arange(groups)] * len(parts)
            heads = [(torch.arange(groups)[:, None] * each + block) for block in best]
        with torch.no_grad():
            for part, stays, which in zip(parts, kept, heads, strict=True):
                rows, shared = _channels(which.flatten(), size), _channels(stays, size)
                narrow(model.get_submodule(part.reader), inputs=rows)
                for name, outputs in zip(part.writers, (rows, shared, shared), strict=True):
                    narrow(model.get_submodule(name), outputs=outputs)
                attention = model.get_submodule(part.reader.rpartition(".")[0])
                counts = {
                    "num_key_value_groups": which.shape[1],
                    "num_heads": which.numel(),
                    "num_key_value_heads": len(stays),
                }
                for name, count in counts.items():  # what a layout keeps beside its configuration
                    if hasattr(attention, name):
                        setattr(attention, name, count)
        if len({len(stays) for stays in kept}) == 1:
            config = model.config
            config.head_dim = size  # no longer hidden size over heads
            config.num_key_value_heads, config.num_attention_heads = len(kept[0]), heads[0].numel()
        return model


def _channels(heads: Tensor, size: int) -> Tensor:
    """Indices of all channels of heads."""
    return (heads[:, None] * size + torch.arange(size)).flatten()


def _key_value_squares(model: PreTrainedModel, parts: list[Part], groups: int, size: int) -> Tensor:
    """Sum of squares of the key and value rows of each group, (blocks, groups)."""
    totals = []
    for part in parts:
        rows = [
            model.get_submodule(name).weight.detach().float().square().sum(1) for name in part.writers[1:]
        ]
        totals.append(sum(rows).view(groups, size).sum(1))
    return torch.stack(totals)
