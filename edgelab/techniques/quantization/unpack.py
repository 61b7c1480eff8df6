"""Unpacking: packed layers become dense float layers again, which is how a recipe asks for quantizing twice."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgelab.recipes import Context, RecipeError, register
from edgelab.techniques.quantization.packed import PackedEmbedding, PackedLinear


@register("quantize.unpack")
@dataclass(frozen=True)
class Unpack:
    """Dequantize every packed layer; the weights keep what rounding made of them, and their size is that of floats.

    quantize.rtn:bits=8 + quantize.unpack + quantize.rtn:bits=4 rounds the rounded weights again. Layers take the
    model's own dtype, float32 unless quantize.bf16 or quantize.fp16 came first. Inputs are no longer rounded either.
    """

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model without packed layers. Raises RecipeError where there are none."""
        packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)]
        if not packed:
            raise RecipeError("quantize.unpack found no packed layers; put a quantizing technique before it.")
        model = copy.deepcopy(model)
        dtype = model.dtype
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = isinstance(embedding, PackedEmbedding) and head.tensor is embedding.tensor
        for done, name in enumerate(packed, 1):
            layer = model.get_submodule(name)
            weight = nn.Parameter(layer.tensor.dequantize(dtype), requires_grad=False)
            if isinstance(layer, PackedLinear):
                model.set_submodule(name, dense_linear(weight, layer.bias))
            else:
                model.set_submodule(name, dense_embedding(model, weight))
            context.progress(done, len(packed))
        if tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return model


def dense_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer over the given weight (out_features, in_features)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def dense_embedding(model: PreTrainedModel, weight: nn.Parameter) -> nn.Embedding:
    """An embedding of the class the model was born with (Gemma's multiplies its rows), over the given weight."""
    with torch.device("meta"):
        embedding = AutoModelForCausalLM.from_config(model.config).get_input_embeddings()
    embedding.weight = weight
    multiplier = getattr(embedding, "scalar_embed_scale", None)
    if multiplier is not None:
        embedding.embed_scale = torch.tensor(multiplier)
    return embedding
