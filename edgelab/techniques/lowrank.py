"""Low rank: two thin matrices in place of a wide one, as good as their rank allows on the inputs that a layer sees.

plain       W = U S V^T                    W' = U_r S_r V_r^T         least error of the weights
whitened    W L = U S V^T, L L^T = X X^T   W' = U_r S_r V_r^T L^-1    least error of the outputs

Whitened, |(W - W') X|^2 is the sum of the squares of the singular values that are left out.

A pair of factors is smaller than the matrix up to rank  out * in / (out + in):  287 for 576 x 576, 418 for 1536 x 576.
Wang et al. 2024 (SVD-LLM), arXiv:2403.07378.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.keys import key
from edgelab.model.blocks import Block, Group, blocks, half_precision, longest
from edgelab.model.marks import fingerprint, refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import dense_linear
from edgelab.techniques.allocation import CostTable
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.quantization.gptq import input_products
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.techniques.sensitivity import SAMPLES, block_layers, fisher_costs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of numbers, tried on every layer
SMALLEST = 1e-9  # of the largest eigenvalue of X X^T: what inputs never do is not amplified


class Pair(NamedTuple):
    """W ~ left @ right: (out_features, rank) and (rank, in_features). left_out: |(W - W') X|^2 a token."""

    left: Tensor
    right: Tensor
    left_out: float


class Decomposition(NamedTuple):
    """W = left * sizes @ right @ inverse, float64: singular vectors and values of W L, and L^-1 behind them."""

    left: Tensor
    sizes: Tensor
    right: Tensor
    inverse: Tensor

    def pair(self, rank: int) -> Pair:
        """The best factors of a rank, 1 to the number of singular values."""
        share = self.sizes[:rank].sqrt()
        return Pair(
            self.left[:, :rank] * share,
            (self.right[:rank] * share[:, None]) @ self.inverse,
            float(self.sizes[rank:].square().sum()),
        )


def break_even(out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold fewer numbers than the matrix."""
    return (out_features * in_features - 1) // (out_features + in_features)


def decompose(weight: Tensor, products: Tensor | None = None) -> Decomposition:
    """What factors of every rank are read from. weight: (out_features, in_features).

    products: mean of x x^T over tokens, (in_features, in_features), on which the outputs are kept; None keeps the
    weights. Works in float64 through eigenvalues, since X X^T of few tokens has no Cholesky factor.
    """
    weight = weight.detach().double()
    if products is None:
        root = inverse = torch.eye(weight.shape[1], dtype=torch.float64)
    else:
        values, vectors = torch.linalg.eigh(products.double())
        values = values.clamp(min=SMALLEST * float(values.max()))
        root = vectors * values.sqrt()  # L = V sqrt(S): L L^T = X X^T
        inverse = (vectors / values.sqrt()).T
    return Decomposition(*torch.linalg.svd(weight @ root, full_matrices=False), inverse)


def factorize(weight: Tensor, rank: int, products: Tensor | None = None) -> Pair:
    """The best factors of a rank, 1 to the smaller side of the matrix; see `decompose`."""
    return decompose(weight, products).pair(rank)


@dataclass(frozen=True)
class RankTable(CostTable):
    """What factors cost that hold a share of the numbers of a layer.

    shares: of the numbers, ascending; 1 is the layer as it is.
    """

    unit: ClassVar[str] = "numbers"

    shares: list[float]

    @property
    def amounts(self) -> np.ndarray:
        """Numbers that are held, (layers, shares)."""
        return np.array([[_numbers(share, *shape) for share in self.shares] for shape in self.shapes])

    def allocate(self, share: float) -> np.ndarray:
        """Numbers that each layer holds, (layers,): as many in all as a uniform share, to less than a rank."""
        budget = sum(_numbers(share, *shape) for shape in self.shapes)
        return self.spend(budget, np.array(self.shapes).sum(1))

    def ranks(self, held: np.ndarray) -> dict[str, int]:
        """The rank of each layer by name, whose factors hold so many numbers; 0 for a layer left whole."""
        shapes = np.array(self.shapes)
        ranks = np.where(held == shapes.prod(1), 0, held // shapes.sum(1))
        return dict(zip(self.names, ranks.tolist(), strict=True))


def largest_rank(share: float, out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold no more than a share of the numbers of a matrix; 0 where there is none."""
    return int(share * out_features * in_features / (out_features + in_features))


def _numbers(share: float, out_features: int, in_features: int) -> int:
    if share >= 1:
        return out_features * in_features
    return max(1, largest_rank(share, out_features, in_features)) * (out_features + in_features)


@register("lowrank.svd", shown=("share",))
@dataclass(frozen=True, kw_only=True)
class LowRank(Calibrated):
    """Put a product of two thin linear layers in place of every linear layer but the head.

    share: of the numbers of each layer that its factors may hold, above 0. whitened: keep outputs on the calibration
    text, block after block, in place of the weights. A rank whose factors would hold more than the matrix is merged
    back into one. by_layer: uniform, the same share of every layer, or allocated, where layers whose factors cost more
    keep more of as many numbers in all, as gradients predict their cost.
    """

    share: float = 0.5
    whitened: bool = True
    by_layer: Literal["uniform", "allocated"] = "uniform"
    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share <= 0:
            raise RecipeError(
                f"lowrank.svd:share={self.share} should be above 0; 0.5 keeps half of the numbers."
            )
        if self.by_layer == "allocated" and self.share > 1:
            raise RecipeError(
                f"lowrank.svd:share={self.share},by_layer=allocated should be at most 1, which leaves all as it is."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with two linear layers, one after the other, where there was one."""
        refuse_zeros(model, self.method)
        model = copy.deepcopy(model)
        layers = linear_layers(model, context.record)
        tokens = self.draw(context, longest(model)) if self.whitened or self.by_layer == "allocated" else None
        if self.by_layer == "allocated":
            ranks = self._allocated(model, tokens, context)
        else:
            ranks = {name: self._rank(layer) for name, layer in layers.items()}
        merged = [name for name, rank in ranks.items() if rank > break_even(*layers[name].weight.shape)]
        if merged:
            context.record.notes.append(
                f"{len(merged)} of {len(layers)} layers are merged back, {merged[0]} first: at rank {ranks[merged[0]]} "
                "factors hold more than the matrix."
            )
        with torch.no_grad():
            if not self.whitened:
                for done, (name, rank) in enumerate(ranks.items(), 1):
                    if rank:
                        model.set_submodule(name, _product(layers[name], rank, None))
                    context.progress(done, len(ranks))
                return model
            found, hidden = blocks(model, tokens)
            for done, block in enumerate(found, 1):
                groups = block.groups(hidden[:1])
                for group in groups:
                    for name in group.layers:
                        layers.pop(f"{block.name}.{name}", None)
                hidden = _factorize_block(block, hidden, groups, ranks)
                context.progress(done, len(found))
            rest = {name: layer for name, layer in layers.items() if ranks.get(name)}
            for name, layer in rest.items():
                model.set_submodule(name, _product(layer, ranks[name], None))
            if rest:
                context.record.notes.append(
                    f"Layers that calibration does not reach keep their weights, not their outputs: {', '.join(rest)}."
                )
        return model

    def _allocated(self, model: PreTrainedModel, tokens: Tensor, context: Context) -> dict[str, int]:
        """The rank of each layer of the blocks, by name, in the numbers of a uniform share; 0 for one left whole."""
        layers = block_layers(model)
        products: dict[str, Tensor] = {}

        def truncated(name: str, weight: Tensor) -> Iterator[Tensor]:
            if self.whitened and name not in products:
                return
            parts = decompose(weight, products.get(name))
            for share in SHARES:
                if share == 1:
                    yield weight.detach()
                else:
                    pair = parts.pair(max(1, largest_rank(share, *weight.shape)))
                    yield (pair.left @ pair.right).to(weight.dtype)

        def costs() -> dict[str, list[float]]:
            if self.whitened:
                products.update(_products(model, tokens))
            return fisher_costs(model, tokens[:SAMPLES], truncated, context)

        made_of = context.stage or fingerprint(model)
        settings = (self.method, self.version, self.whitened, SHARES)
        address = key(*settings, context.seed, made_of, tokens.tolist())
        table = RankTable.kept(address, layers, tokens.numel(), costs, context, shares=list(SHARES))
        held = table.allocate(self.share)
        ranks = table.ranks(held)
        context.record.numbers["predicted_kld"] = float(table.costs_at(held).sum())
        whole = sum(not rank for rank in ranks.values())
        context.record.notes.append(f"{whole} of {len(ranks)} layers are left whole.")
        return ranks

    def _rank(self, layer: nn.Linear) -> int:
        out_features, in_features = layer.weight.shape
        rank = largest_rank(self.share, out_features, in_features)
        if not rank:
            raise RecipeError(
                f"lowrank.svd:share={self.share} leaves a layer of {out_features} x {in_features} no rank; use at "
                f"least {(out_features + in_features) / (out_features * in_features):.3f}."
            )
        return min(rank, out_features, in_features)


@torch.no_grad()
def _products(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Mean of x x^T of the inputs of every layer of the blocks, by name; layers that read the same share it."""
    found, hidden = blocks(model, tokens)
    products: dict[str, Tensor] = {}
    for block in found:

        def visit(group: Group, inputs: Tensor, block: Block = block) -> None:
            mean, _ = input_products(inputs)
            products.update({f"{block.name}.{name}": mean for name in group.layers})

        with half_precision():
            hidden = block.on_the_way(hidden, block.groups(hidden[:1]), visit)
    return products


def _factorize_block(block: Block, hidden: Tensor, groups: list[Group], ranks: dict[str, int]) -> Tensor:
    """Factorize the layers of a block in place, in the order they run; returns the hidden states behind it."""
    layers = block.linear()
    made: dict[str, nn.Module] = {}

    def visit(group: Group, inputs: Tensor) -> None:
        products, _ = input_products(inputs)
        for name in group.layers:
            rank = ranks.get(f"{block.name}.{name}")
            if not rank:
                continue
            made[name] = module = _product(layers[name], rank, products)
            factors = [module] if isinstance(module, nn.Linear) else [module[1], module[0]]
            whole = (
                torch.linalg.multi_dot([one.weight for one in factors]) if len(factors) > 1 else module.weight
            )
            layers[name].weight.copy_(whole)  # later layers see what the factors give

    with half_precision():
        outputs = block.on_the_way(hidden, groups, visit)
    for name, module in made.items():
        block.module.set_submodule(name, module)
    return outputs


def _product(layer: nn.Linear, rank: int, products: Tensor | None) -> nn.Module:
    """The factors of a layer as two layers; one layer where that is smaller."""
    out_features, in_features = layer.weight.shape
    pair = factorize(layer.weight, rank, products)
    if rank > break_even(out_features, in_features):
        return _linear(pair.left @ pair.right, layer.bias, layer)
    return nn.Sequential(_linear(pair.right, None, layer), _linear(pair.left, layer.bias, layer))


def _linear(weight: Tensor, bias: nn.Parameter | None, like: nn.Linear) -> nn.Linear:
    return dense_linear(nn.Parameter(weight.to(like.weight.dtype), like.weight.requires_grad), bias)
