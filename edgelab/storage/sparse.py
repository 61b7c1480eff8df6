"""What sparse formats share: a dense matrix with zeros in memory, and on disk only what is not zero.

The dense matrix is floating point, or packed integers whose zero is a whole number: there what equals the zero-point
is left out, and the values are integers of as many bits as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelab.errors import EdgeLabError
from edgelab.storage.bits import pack, unpack
from edgelab.storage.uniform import QuantizedTensor

GRID = ("scale", "zero_point")


class SparseError(EdgeLabError):
    """A matrix that cannot be stored without its zeros."""


@dataclass
class SparseMatrix:
    """A matrix that is stored without its zeros. dense: (out_features, in_features), float or on a uniform grid.

    Subclasses say how the places of the other values are stored.
    """

    dense: Tensor | QuantizedTensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple(self.dense.shape)

    @property
    def mask(self) -> Tensor:
        """True where a value is not zero, (out_features, in_features). Raises SparseError where no integer is zero."""
        if isinstance(self.dense, Tensor):
            return self.dense != 0
        return self.dense.integers != zero_integers(self.dense)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in floating point with its zeros, (out_features, in_features)."""
        return self.dense.to(dtype) if isinstance(self.dense, Tensor) else self.dense.dequantize(dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows only: (..., in_features) float32 for indices of shape (...)."""
        return self.dense[indices].float() if isinstance(self.dense, Tensor) else self.dense.rows(indices)


def zero_integers(tensor: QuantizedTensor) -> Tensor:
    """The integer that means zero, for each weight: (out_features, in_features) uint8."""
    centre = tensor.centre()
    if (centre != centre.floor()).any():
        raise SparseError(
            "Zero-points between integers leave no level for zero, so that nothing can be left out; use a grid with "
            "whole ones, as quantize.rtn has."
        )
    groups = centre.to(torch.uint8).expand(len(tensor.integers), -1)
    return groups.repeat_interleave(tensor.shape[1] // groups.shape[1], 1)


def stored_values(
    dense: Tensor | QuantizedTensor, where: Tensor
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Values at `where`, (out_features, in_features) bool, row by row, and what is needed to read them."""
    if isinstance(dense, Tensor):
        return {"values": dense[where].contiguous()}, {"grid": None}
    tensors, how = dense.stored()
    grid = {name: tensors[name] for name in GRID if name in tensors}
    return {"values": pack(dense.integers[where], dense.bits), **grid}, {"grid": how}


def read_values(tensors: dict[str, Tensor], how: dict, where: Tensor) -> Tensor | QuantizedTensor:
    """The inverse of `stored_values`. Raises KeyError with the name of a tensor that is missing."""
    values, grid = tensors["values"], how["grid"]
    if grid is None:
        return torch.zeros(where.shape, dtype=values.dtype).masked_scatter_(where, values)
    nothing = torch.zeros(where.shape, dtype=torch.uint8)
    empty = {
        "packed": pack(nothing, grid["bits"]),
        **{name: tensors[name] for name in GRID if name in tensors},
    }
    dense = QuantizedTensor.restored(empty, grid)
    integers = unpack(values, grid["bits"], (int(where.sum()),))
    dense.integers = zero_integers(dense).masked_scatter_(where, integers)
    return dense
