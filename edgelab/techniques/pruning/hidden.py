"""Hidden: a narrower residual stream. One rotation for all layers, then the directions that carry least go (SliceGPT).

A norm without a weight commutes with a rotation Q, so that a model whose norms have handed their weights g to the
layers that read them computes the same with

    embedding Q        W_in diag(g) Q  behind a norm        Q^T W_out  before the sum        head diag(g) Q

and the last columns of Q, sorted by how much of the normed states lies along them, can be left out. One rotation for
all layers keeps an ordinary model; one for each would fit each better and need a matrix in every residual connection.
The head is untied, since it has taken in the weight of the last norm: in a small model with a tied head, its copy and
such matrices would weigh nearly as much as the blocks save.
Ashkboos et al. 2024, arXiv:2401.15024.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.errors import listed
from edgelab.model.blocks import block_list, longest
from edgelab.model.marks import refuse_zeros
from edgelab.model.structures import attentions, mlps
from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.folding import norm_offset
from edgelab.techniques.observing import watched
from edgelab.techniques.pruning.structured import Share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS = ("input_layernorm", "post_attention_layernorm")


@register("prune.hidden", shown=("share",))
@dataclass(frozen=True, kw_only=True)
class Hidden(Share, Calibrated):
    """Remove directions of the residual stream, the same in every layer, and leave an ordinary narrower model."""

    multiple: int = 16
    samples: int = 16

    def __post_init__(self) -> None:
        Share.__post_init__(self)
        Calibrated.__post_init__(self)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with a narrower residual stream and a head of its own."""
        size = model.config.hidden_size
        width = min(size, -(-round(size * (1 - self.share)) // self.multiple) * self.multiple)
        refuse_zeros(model, self.method)  # a rotation fills them in
        tokens = self.draw(context, longest(model))
        model = copy.deepcopy(model)
        norms = _norms(model)
        products = _normed_products(model, list(norms), tokens, context)
        rotation = torch.linalg.eigh(sum(products.values())).eigenvectors.flip(1)[:, :width]  # (size, width)
        with torch.no_grad():
            _rotate(model, norms, rotation, {name: _left(one, rotation) for name, one in products.items()})
        return model


def _norms(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every norm of the residual stream, with the layers that read it, by name. Raises RecipeError for others."""
    name, blocks = block_list(model)
    found: dict[str, list[str]] = {}
    for place, (attention, mlp) in enumerate(zip(attentions(model), mlps(model), strict=True)):
        start = f"{name}.{place}."
        there = {one for one, module in blocks[place].named_children() if "norm" in one}
        if there != set(NORMS):
            raise RecipeError(
                f"Block {place} has the norms {', '.join(sorted(there))}; prune.hidden knows models with "
                f"{listed(NORMS)}, such as Llama, Qwen and Gemma."
            )
        found |= {start + NORMS[0]: list(attention.writers), start + NORMS[1]: list(mlp.writers)}
    head = next(one for one, module in model.named_modules() if module is model.get_output_embeddings())
    last = name.rpartition(".")[0]
    found[f"{last}.norm" if last else "norm"] = [head]
    for one in found:
        module = dict(model.named_modules()).get(one)
        if module is None or getattr(module, "bias", None) is not None or norm_offset(module) is None:
            raise RecipeError(f"{one} is no norm without a bias and a mean; prune.hidden needs RMSNorm.")
    return found


def _normed_products(
    model: PreTrainedModel, norms: list[str], tokens: Tensor, context: Context
) -> dict[str, Tensor]:
    """Mean of x x^T / |x|^2 of the states that enter each norm, (hidden, hidden) float64."""
    totals: dict[str, Tensor] = {}

    def add(name: str, states: Tensor) -> None:
        states = nn.functional.normalize(states.detach().float().flatten(0, -2), dim=-1)
        totals[name] = totals.get(name, 0) + (states.T @ states).double()

    with torch.no_grad(), watched(model, norms, add):
        for done, sample in enumerate(tokens, 1):
            model.base_model(input_ids=sample[None], use_cache=False)
            context.progress(done, len(tokens))
    return {name: total / tokens.numel() for name, total in totals.items()}


def _left(products: Tensor, rotation: Tensor) -> float:
    """How long a normed state still is along the directions that stay: root of the mean of its square."""
    return math.sqrt(float((rotation * (products @ rotation)).sum()))


def _rotate(
    model: PreTrainedModel, norms: dict[str, list[str]], rotation: Tensor, left: dict[str, float]
) -> None:
    """Rotate a model in place. rotation: (hidden, width) float64. left: what stays of the length of states, by norm."""
    size, width = rotation.shape
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for name, readers in norms.items():
        norm = model.get_submodule(name)
        offset = norm_offset(norm)
        scale = norm.weight.detach().double() + offset
        for reader in readers:
            _set(
                model.get_submodule(reader), (model.get_submodule(reader).weight.double() * scale) @ rotation
            )
        # The narrower norm divides by the root of another mean, of states that have lost a little of their length.
        constant = math.sqrt(size / width) * left[name]
        norm.weight = nn.Parameter(torch.full((width,), constant - offset, dtype=norm.weight.dtype))
    for part in (*attentions(model), *mlps(model)):
        writer = model.get_submodule(part.reader)  # what reads heads or channels writes to the stream
        _set(writer, rotation.T @ writer.weight.double())
        if writer.bias is not None:
            writer.bias = nn.Parameter((writer.bias.detach().double() @ rotation).to(writer.bias.dtype))
    # Gemma multiplies what it looks up by the root of the hidden size
    lost = math.sqrt(size / width) if hasattr(embedding, "embed_scale") else 1.0
    embedding.weight = nn.Parameter(
        (embedding.weight.detach().double() @ rotation * lost).to(embedding.weight.dtype)
    )
    embedding.embedding_dim = width
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = embedding.embed_scale / lost
        embedding.scalar_embed_scale = float(embedding.embed_scale)
    attention = model.get_submodule(attentions(model)[0].reader)
    model.config.head_dim = attention.in_features // model.config.num_attention_heads
    model.config.hidden_size, model.config.tie_word_embeddings = width, False


def _set(layer: nn.Linear, weight: Tensor) -> None:
    weight = weight.detach().to(layer.weight.dtype).contiguous()
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
