"""Low rank: two thin matrices in place of a wide one, as good as their rank allows on the inputs that a layer sees.

plain       W = U S V^T                    W' = U_r S_r V_r^T         least error of the weights
whitened    W L = U S V^T, L L^T = X X^T   W' = U_r S_r V_r^T L^-1    least error of the outputs

Whitened, |(W - W') X|^2 is the sum of the squares of the singular values that are left out.

A pair of factors is smaller than the matrix up to rank  out * in / (out + in):  287 for 576 x 576, 418 for 1536 x 576.
Wang et al. 2024 (SVD-LLM), arXiv:2403.07378.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from edgelab.model.blocks import Block, Group, blocks, half_precision, longest
from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import dense_linear
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.quantization.gptq import input_products
from edgelab.techniques.quantization.rtn import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST = 1e-9  # of the largest eigenvalue of X X^T: what inputs never do is not amplified


class Pair(NamedTuple):
    """W ~ left @ right: (out_features, rank) and (rank, in_features). left_out: |(W - W') X|^2 a token."""

    left: Tensor
    right: Tensor
    left_out: float


def break_even(out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold fewer numbers than the matrix."""
    return (out_features * in_features - 1) // (out_features + in_features)


def factorize(weight: Tensor, rank: int, products: Tensor | None = None) -> Pair:
    """The best factors of a rank, float64. weight: (out_features, in_features); rank: 1 to the smaller of the two.

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
    left, sizes, right = torch.linalg.svd(weight @ root, full_matrices=False)
    share = sizes[:rank].sqrt()
    pair = (left[:, :rank] * share, (right[:rank] * share[:, None]) @ inverse)
    return Pair(*pair, float(sizes[rank:].square().sum()))


@register("lowrank.svd", shown=("share",))
@dataclass(frozen=True, kw_only=True)
class LowRank(Calibrated):
    """Put a product of two thin linear layers in place of every linear layer but the head.

    share: of the numbers of each layer that its factors may hold, above 0. whitened: keep outputs on the calibration
    text, block after block, in place of the weights. A rank whose factors would hold more than the matrix is merged
    back into one.
    """

    share: float = 0.5
    whitened: bool = True
    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share <= 0:
            raise RecipeError(
                f"lowrank.svd:share={self.share} should be above 0; 0.5 keeps half of the numbers."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with two linear layers, one after the other, where there was one."""
        refuse_zeros(model, self.method)
        model = copy.deepcopy(model)
        layers = linear_layers(model, context.record)
        ranks = {name: self._rank(layer) for name, layer in layers.items()}
        merged = [name for name, layer in layers.items() if ranks[name] > break_even(*layer.weight.shape)]
        if merged:
            context.record.notes.append(
                f"{len(merged)} of {len(layers)} layers are merged back, {merged[0]} first: at rank {ranks[merged[0]]} "
                "factors hold more than the matrix."
            )
        with torch.no_grad():
            if not self.whitened:
                for done, (name, layer) in enumerate(layers.items(), 1):
                    model.set_submodule(name, _product(layer, ranks[name], None))
                    context.progress(done, len(layers))
                return model
            found, hidden = blocks(model, self.draw(context, longest(model)))
            for done, block in enumerate(found, 1):
                hidden = _factorize_block(block, hidden, ranks)
                context.progress(done, len(found))
        return model

    def _rank(self, layer: nn.Linear) -> int:
        out_features, in_features = layer.weight.shape
        rank = int(self.share * out_features * in_features / (out_features + in_features))
        if not rank:
            raise RecipeError(
                f"lowrank.svd:share={self.share} leaves a layer of {out_features} x {in_features} no rank; use at "
                f"least {(out_features + in_features) / (out_features * in_features):.3f}."
            )
        return min(rank, out_features, in_features)


def _factorize_block(block: Block, hidden: Tensor, ranks: dict[str, int]) -> Tensor:
    """Factorize the layers of a block in place, in the order they run; returns the hidden states behind it."""
    layers = block.linear()
    made: dict[str, nn.Module] = {}

    def visit(group: Group, inputs: Tensor) -> None:
        products, _ = input_products(inputs)
        for name in group.layers:
            made[name] = module = _product(layers[name], ranks[f"{block.name}.{name}"], products)
            factors = [module] if isinstance(module, nn.Linear) else [module[1], module[0]]
            whole = (
                torch.linalg.multi_dot([one.weight for one in factors]) if len(factors) > 1 else module.weight
            )
            layers[name].weight.copy_(whole)  # later layers see what the factors give

    with half_precision():
        outputs = block.on_the_way(hidden, block.groups(hidden[:1]), visit)
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
