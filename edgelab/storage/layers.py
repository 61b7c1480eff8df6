"""The layers that hold stored matrices, and how to get dense ones back.

The layers here are the definition: they dequantize and multiply. A runtime replaces them by its kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgelab.storage.matrix import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ActivationGrid:
    """How the inputs of a layer are rounded to uint8 before the product: x ~ (q - zero_point) * scale, q in [0, 255].

    scale, zero_point: scalars, float32, found by calibration. None for both: at run time each token gets the grid from
    its smallest to its largest value.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @classmethod
    def spanning(cls, low: Tensor, high: Tensor) -> ActivationGrid:
        """The grid from low to high, widened so that it holds zero. low, high: float, of one shape."""
        low, high = low.float().clamp(max=0), high.float().clamp(min=0)
        scale = (high - low) / 255
        scale = torch.where(scale == 0, 1.0, scale)  # for nothing but zeros any will do
        return cls(scale, torch.round(-low / scale))

    def found(self, values: Tensor) -> ActivationGrid:
        """The grid itself, or those of tokens (..., in_features): scale and zero_point are then (..., 1)."""
        if self.scale is not None:
            return self
        return self.spanning(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True))

    def integers(self, values: Tensor) -> Tensor:
        """Values on the grid as whole numbers from 0 to 255, float32; the grid has to have been found."""
        return torch.round(values / self.scale + self.zero_point).clamp_(0, 255)

    def round(self, inputs: Tensor) -> Tensor:
        """Inputs (..., in_features) on their grid, in their own dtype: the definition a kernel is compared with."""
        values = inputs.float()
        grid = self.found(values)
        return ((grid.integers(values) - grid.zero_point) * grid.scale).to(inputs.dtype)


class PackedLinear(nn.Module):
    """A linear layer over a stored matrix, (..., in_features) -> (..., out_features), in the input's dtype.

    activation: the grid its inputs are rounded to first; None leaves them as they are.
    """

    def __init__(
        self,
        tensor: Matrix,
        bias: Tensor | None = None,
        activation: ActivationGrid | None = None,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.bias = bias
        self.activation = activation
        self.out_features, self.in_features = tensor.shape

    def forward(self, inputs: Tensor) -> Tensor:
        if self.activation is not None:
            inputs = self.activation.round(inputs)
        if inputs.requires_grad and torch.is_grad_enabled():
            return _Through.apply(inputs, self.tensor, self.bias)
        return functional.linear(inputs, self.tensor.dequantize(inputs.dtype), self.bias)


class _Through(torch.autograd.Function):
    """The product with a matrix that is not trained, and its gradient by the inputs.

    The dense weight is made again in the backward pass, where autograd would have kept it: that of every layer at once.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        return functional.linear(inputs, matrix.dequantize(dtype), bias)

    @staticmethod
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None]:
        return outer @ ctx.matrix.dequantize(outer.dtype), None, None


class PackedEmbedding(nn.Module):
    """An embedding over a matrix of shape (vocabulary, hidden); rows come out in `dtype`.

    multiplier: what rows are multiplied by when looked up, in Gemma models the root of the hidden size.
    """

    def __init__(self, tensor: Matrix, dtype: torch.dtype = torch.float32, multiplier: float = 1.0) -> None:
        super().__init__()
        self.tensor = tensor
        self.dtype = dtype
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.tensor.rows(ids))

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows in `dtype`, times the multiplier in `dtype`."""
        return rows.to(self.dtype) * torch.tensor(self.multiplier, dtype=self.dtype)


def dense_linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer over the given weight (out_features, in_features)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def dense_embedding(model: PreTrainedModel, weight: nn.Parameter) -> nn.Embedding:
    """An embedding of the class the model was born with (Gemma's multiplies its rows), over the given weight."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        embedding = AutoModelForCausalLM.from_config(model.config).get_input_embeddings()
    embedding.weight = weight
    multiplier = getattr(embedding, "scalar_embed_scale", None)
    if multiplier is not None:
        embedding.embed_scale = torch.tensor(multiplier)
    return embedding


def packed_layers(model: PreTrainedModel) -> dict[str, PackedLinear | PackedEmbedding]:
    """The layers of a model that hold a stored matrix, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLinear | PackedEmbedding)
    }


def unpacked(model: PreTrainedModel, progress: Callable[[int, int], None] | None = None) -> PreTrainedModel:
    """A copy of the model with dense float layers in its own dtype; a tied head stays tied."""
    model = copy.deepcopy(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = isinstance(embedding, PackedEmbedding) and head.tensor is embedding.tensor
    packed = packed_layers(model)
    for done, (name, layer) in enumerate(packed.items(), 1):
        weight = nn.Parameter(layer.tensor.dequantize(model.dtype), requires_grad=False)
        if isinstance(layer, PackedLinear):
            model.set_submodule(name, dense_linear(weight, layer.bias))
        else:
            model.set_submodule(name, dense_embedding(model, weight))
        if progress:
            progress(done, len(packed))
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


@contextmanager
def dequantized(model: PreTrainedModel) -> Iterator[None]:
    """Keep layers that dequantize whenever they are used as dense ones for as long as this lasts: the same numbers.

    For many short inputs, which would dequantize for each. Takes the memory of dense layers, once.
    """
    packed = {name: layer for name, layer in packed_layers(model).items() if isinstance(layer, PackedLinear)}
    try:
        for name, layer in packed.items():
            weight = nn.Parameter(layer.tensor.dequantize(model.dtype), requires_grad=False)
            dense = dense_linear(weight, layer.bias)
            if layer.activation is not None:
                dense.register_forward_pre_hook(partial(_round_inputs, layer.activation))
            model.set_submodule(name, dense)
        yield
    finally:
        for name, layer in packed.items():
            model.set_submodule(name, layer)


def _round_inputs(grid: ActivationGrid, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return grid.round(inputs[0])
