"""Codebooks: levels anywhere, named by an index, times a scale for each group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelab.storage import scales
from edgelab.storage.bits import pack, unpack
from edgelab.storage.matrix import stored_as


@stored_as("codebook", side=("codebook", "scale"))
@dataclass
class CodebookTensor:
    """A matrix on a grid of its own: w ~ codebook[integers] * scale.

    integers: (out_features, in_features) uint8. codebook: (rows, 2**bits) float16, rows being 1 (one table for the
    matrix) or out_features. scale: (out_features, groups) float16, or float32 where that does not hold each of them
    exactly.
    """

    integers: Tensor
    codebook: Tensor
    scale: Tensor
    bits: int

    def __post_init__(self) -> None:
        self.scale = scales.narrowed(self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return tuple(self.integers.shape)

    @property
    def group_size(self) -> int:
        """Inputs that share one scale."""
        return self.integers.shape[1] // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in floating point, (out_features, in_features)."""
        tables = self.codebook.float().expand(len(self.integers), -1)
        levels = tables.gather(1, self.integers.long()).unflatten(-1, (self.scale.shape[1], -1))
        return (levels * self.scale.float()[..., None]).flatten(-2).to(dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Dequantize some rows only: (..., in_features) float32 for indices of shape (...)."""
        flat = indices.flatten()
        codebook = self.codebook if len(self.codebook) == 1 else self.codebook[flat]
        picked = CodebookTensor(self.integers[flat], codebook, self.scale[flat], self.bits)
        return picked.dequantize().unflatten(0, indices.shape)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors to store, by the last part of their names, and what `restored` has to know beside them."""
        scale, scaling = scales.stored(self.scale)
        tensors = {
            "packed": pack(self.integers, self.bits),
            "codebook": self.codebook.contiguous(),
            "scale": scale,
        }
        return tensors, scaling | {"bits": self.bits, "shape": list(self.integers.shape)}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> CodebookTensor:
        """The inverse of `stored`. Raises KeyError with the name of a tensor that is missing."""
        integers = unpack(tensors["packed"], how["bits"], tuple(how["shape"]))
        return cls(integers, tensors["codebook"], scales.restored(tensors["scale"], how), how["bits"])
