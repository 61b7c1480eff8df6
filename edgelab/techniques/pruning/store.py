"""Storing zeros as nothing: the same weights in fewer bytes, where a format for it is smaller than the zeros."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from edgelab.recipes import Context, register
from edgelab.storage.bitmap import Bitmap
from edgelab.storage.csr import CompressedRows
from edgelab.storage.layers import PackedLinear
from edgelab.storage.sparse import SparseMatrix
from edgelab.storage.two_four import TwoOfFour
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.pruning.masks import SparsityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS: dict[str, type[SparseMatrix]] = {"bitmap": Bitmap, "csr": CompressedRows, "two_four": TwoOfFour}


@register("prune.store", shown=("format",))
@dataclass(frozen=True, kw_only=True)
class Store:
    """Store every linear layer but the head without its zeros; floats or integers on a grid, the numbers stay.

    format: bitmap, csr (compressed sparse rows, which run on torch's sparse kernel) or two_four (after pattern=2:4).
    """

    format: Literal["bitmap", "csr", "two_four"] = "bitmap"

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear layers over sparse matrices."""
        model = copy.deepcopy(model)
        head, kind = model.get_output_embeddings(), FORMATS[self.format]
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | PackedLinear) and layer is not head
        }
        zeros = 0
        for done, (name, layer) in enumerate(layers.items(), 1):
            matrix = kind(_dense(name, layer))
            zeros += int((~matrix.mask).sum())
            activation = getattr(layer, "activation", None)
            model.set_submodule(name, PackedLinear(matrix, layer.bias, activation))
            context.progress(done, len(layers))
        if not zeros:
            raise SparsityError("No linear layer has a zero to leave out; prune the model first.")
        return model


def _dense(name: str, layer: nn.Linear | PackedLinear) -> Tensor | QuantizedTensor:
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()
    if not isinstance(layer.tensor, QuantizedTensor):
        raise SparsityError(
            f"{name} is stored as {layer.tensor.format}; prune.store takes floats and uniform grids."
        )
    return layer.tensor
