"""LoRA: train a few low-rank matrices beside the weights of a model, and none of the weights.

y = W x + scale B A x        scale = alpha / rank, or alpha / sqrt(rank) with rank_stabilized

start    B A at the beginning
zero     nothing: A random, B zero                                    Hu et al. 2021, arXiv:2106.09685
pissa    the largest singular directions of W, which leave it         Meng et al. 2024, arXiv:2404.02948
residual what rounding has lost: the largest singular directions of the float weight minus the packed one; behind
         quantize.loftq this is LoftQ                                 Li et al. 2023, arXiv:2310.08659

On packed weights this is QLoRA (Dettmers et al. 2023, arXiv:2305.14314): they are dequantized again for the gradient.
Trainable numbers of a layer: rank (in_features + out_features), and out_features more with DoRA (Liu et al. 2024,
arXiv:2402.09353), which trains the lengths of the columns apart from their directions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.marks import marks_of
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.adapters import NAME, adapted_layers, attach, merged
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.lessons import lesson
from edgelab.techniques.quantization.loftq import largest_directions
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.training import Trained

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

GROUPS = {"all": "", "attention": "attn"}


@register("lora", shown=("rank",))
@dataclass(frozen=True, kw_only=True)
class LoRA(Trained):
    """Train an adapter on linear layers, float or packed; the model stays as it is.

    rank: of the matrices. alpha: over rank, what their product is multiplied by; 0 for twice the rank. targets: all
    linear layers but the head, attention, or the last parts of their names joined by a slash, as in q_proj/v_proj.
    dropout: of the adapter's inputs, 0 to below 1. dora: train lengths apart from directions. rank_stabilized: divide
    alpha by the root of the rank. start: zero, pissa, or residual, which makes up for what rounding has lost.
    loss: ce, the next token, or kl, the divergence from the reference.
    """

    rank: int = 8
    alpha: float = 0.0
    targets: str = "all"
    dropout: float = 0.0
    dora: bool = False
    rank_stabilized: bool = False
    start: Literal["zero", "pissa", "residual"] = "zero"
    loss: Literal["ce", "kl"] = "ce"
    learning_rate: float = field(default=3e-3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise RecipeError(f"{self.method}:rank={self.rank} should be at least 1; 8 is usual.")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"{self.method}:dropout={self.dropout} should be 0 to below 1.")
        if self.alpha < 0:
            raise RecipeError(f"{self.method}:alpha={self.alpha} should be above 0, or 0 for twice the rank.")
        if self.dora and self.start == "pissa":
            raise RecipeError(
                f"{self.method}:dora=true trains the lengths of the weights, which start=pissa moves; choose one."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model whose layers carry an adapter."""
        given, model = model, self.started(model, context)
        first = {
            name: (layer.lora_A[NAME].weight.detach().clone(), layer.lora_B[NAME].weight.detach().clone())
            for name, layer in adapted_layers(model).items()
        }
        half = bfloat16_is_fast()
        loss = lesson(self.method, self.loss, given, context, otherwise=given)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model.train(self.dropout > 0)
        self.fit(model, loss, parameters, context, half)
        model = model.eval().requires_grad_(False)
        return self._beside(given, model, first) if self.start == "pissa" else model

    def started(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model whose layers carry an adapter that is not trained yet."""
        if adapted_layers(model):
            raise RecipeError(f"The model has an adapter; merge it before {self.method} puts on another.")
        model = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            attach(model, self.config(list(self.layers(model, context))))
        if self.start != "zero":
            self._begin(model, context)
        return model

    def layers(self, model: PreTrainedModel, context: Context) -> dict[str, torch.nn.Module]:
        """The layers that get an adapter, by name. Raises RecipeError with those there are where none fits."""
        found = linear_layers(model, context.record, packed=True)
        asked = [GROUPS.get(part, part) for part in self.targets.split("/")]
        chosen = {
            name: layer
            for name, layer in found.items()
            if any(
                not part or part == name.rpartition(".")[2] or (part == "attn" and part in name)
                for part in asked
            )
        }
        kinds = sorted({name.rpartition(".")[2] for name in found})
        unknown = [part for part in self.targets.split("/") if part not in (*GROUPS, *kinds)]
        if unknown or not chosen:
            raise RecipeError(
                f"{self.method}:targets={self.targets} finds no linear layer"
                f"{' called ' if unknown else ''}{', '.join(unknown)}; there are {', '.join(kinds)}, and all of them."
            )
        rounded = next((name for name, one in chosen.items() if getattr(one, "activation", None)), None)
        if rounded is not None:
            raise RecipeError(
                f"{self.method} trains by gradients, which do not pass the rounded inputs of {rounded}; quantize the "
                "weights only, or put the adapter before and merge it."
            )
        if self.dora and any(isinstance(layer, PackedLinear) for layer in chosen.values()):
            raise RecipeError(
                f"{self.method}:dora=true needs the lengths of float weights; leave it out on packed ones."
            )
        return chosen

    def config(self, names: list[str], times: int = 1) -> LoraConfig:
        """The settings as peft takes them. times: as many ranks, at the same scale."""
        from peft import LoraConfig

        alpha = self.alpha or 2 * self.rank
        return LoraConfig(
            r=times * self.rank,
            lora_alpha=alpha * (times**0.5 if self.rank_stabilized else times),
            target_modules=names,
            lora_dropout=self.dropout,
            use_dora=self.dora,
            use_rslora=self.rank_stabilized,
            task_type="CAUSAL_LM",
        )

    @torch.no_grad()
    def _begin(self, model: PreTrainedModel, context: Context) -> None:
        """Give every adapter its first product, in place; PiSSA takes it out of the weights."""
        if self.start == "residual":
            self._check_only_rounded(model, context)
        for name, layer in adapted_layers(model).items():
            base, packed = layer.get_base_layer(), isinstance(layer.get_base_layer(), PackedLinear)
            if self.start == "pissa" and packed:
                raise RecipeError(
                    f"{self.method}:start=pissa moves float weights, and {name} is packed; use start=residual."
                )
            if self.start == "residual" and not packed:
                raise RecipeError(
                    f"{self.method}:start=residual makes up for rounding, and {name} is in float; quantize it first."
                )
            if packed:
                moved = context.reference.get_submodule(name).weight.float() - base.tensor.dequantize()
            else:
                moved = base.weight
            if self.rank > min(moved.shape):
                raise RecipeError(
                    f"{self.method}:rank={self.rank} is above the {min(moved.shape)} singular values of {name}, from "
                    f"which start={self.start} begins; use a smaller one."
                )
            b, a = largest_directions(moved, self.rank)
            root = layer.scaling[NAME] ** 0.5
            layer.lora_A[NAME].weight.copy_(a / root)
            layer.lora_B[NAME].weight.copy_(b / root)
            if not packed:
                base.weight = torch.nn.Parameter(
                    (base.weight - b @ a).to(base.weight.dtype), requires_grad=False
                )

    def _check_only_rounded(self, model: PreTrainedModel, context: Context) -> None:
        """Raise RecipeError where the packed weights are not those of the reference, rounded."""
        if context.reference is None:
            raise RecipeError(
                f"{self.method}:start=residual needs the reference, whose weights were rounded."
            )
        theirs = dict(context.reference.named_parameters())
        own = {
            name.replace(".base_layer", ""): one
            for name, one in model.named_parameters()
            if "lora_" not in name
        }
        count = len(linear_layers(context.reference)), len(adapted_layers(model))
        changed = [
            name for name, one in own.items() if name not in theirs or not torch.equal(one, theirs[name])
        ]
        narrowed = [
            name
            for name, layer in adapted_layers(model).items()
            if (layer.out_features, layer.in_features) != tuple(theirs[f"{name}.weight"].shape)
        ]
        what = next(iter([*changed, *narrowed]), "")
        if marks_of(model).pruned or context.record.train_tokens:
            what = "the weights"
        if not what and self.targets == "all" and count[0] != count[1]:
            what = "how many layers there are"
        if what:
            raise RecipeError(
                f"{self.method}:start=residual makes up for rounding alone, and something else has changed {what} "
                "before; use start=zero."
            )

    @torch.no_grad()
    def _beside(
        self, given: PreTrainedModel, trained: PreTrainedModel, first: dict[str, tuple[Tensor, Tensor]]
    ) -> PreTrainedModel:
        """The same outputs on the given weights: twice the rank, of which the second half takes back the start."""
        model = copy.deepcopy(given)
        attach(model, self.config(list(first), times=2))
        layers = adapted_layers(model)
        for name, layer in adapted_layers(trained).items():
            a, b = first[name]
            layers[name].lora_A[NAME].weight.copy_(torch.cat([layer.lora_A[NAME].weight, a]))
            layers[name].lora_B[NAME].weight.copy_(torch.cat([layer.lora_B[NAME].weight, -b], 1))
        return model.eval().requires_grad_(False)


@register("qlora", shown=("rank",))
@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """Train an adapter on packed linear layers, which keep no dense weight between the passes."""

    def layers(self, model: PreTrainedModel, context: Context) -> dict[str, torch.nn.Module]:
        found = super().layers(model, context)
        dense = next((name for name, layer in found.items() if not isinstance(layer, PackedLinear)), None)
        if dense is not None:
            raise RecipeError(
                f"qlora trains beside packed weights, and {dense} is in float; quantize first, or use lora."
            )
        return found


@register("merge")
@dataclass(frozen=True)
class Merge:
    """Add an adapter to the weights that it stands beside; packed ones become float."""

    takes_adapter: ClassVar[bool] = True

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model without an adapter."""
        if not adapted_layers(model):
            raise RecipeError("merge adds an adapter to the weights, and there is none; put lora before it.")
        if marks_of(model).pruned:
            raise RecipeError(
                "merge would fill in the zeros that pruning has left; leave the adapter beside the weights."
            )
        return merged(model)
