"""Uniform grids: evenly spaced levels, one scale and zero-point for each group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgelab.storage import scales
from edgelab.storage.bits import pack, unpack
from edgelab.storage.matrix import stored_as


@stored_as("uniform", side=("scale", "zero_point"))
@dataclass
class QuantizedTensor:
    """A matrix on a uniform grid: w ~ (integers - zero_point) * scale.

    integers: (out_features, in_features) uint8 in [0, 2**bits - 1]. scale: (out_features, groups), or (1, 1) for the
    whole matrix; float16, or float32 where that does not hold each of them exactly. zero_point: of scale's shape,
    uint8, or float16 where it lies between integers; None for the middle of the grid: 2**(bits - 1), and for the two
    levels of one bit 0.5.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
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

    def centre(self) -> Tensor:
        """The integer that stands for zero, float32, of scale's shape."""
        if self.zero_point is None:
            middle = 2 ** (self.bits - 1) if self.bits > 1 else 0.5
            return torch.full_like(self.scale, middle, dtype=torch.float32)
        return self.zero_point.float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in floating point, (out_features, in_features)."""
        groups = self.integers.unflatten(-1, (self.scale.shape[-1], -1)).float()  # (..., groups, group_size)
        return ((groups - self.centre()[..., None]) * self.scale.float()[..., None]).flatten(-2).to(dtype)

    def rows(self, indices: Tensor) -> Tensor:
        """Dequantize some rows only: (..., in_features) float32 for indices of shape (...)."""
        zero_point = None if self.zero_point is None else self.zero_point[indices]
        return QuantizedTensor(
            self.integers[indices], self.scale[indices], zero_point, self.bits
        ).dequantize()

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors to store, by the last part of their names, and what `restored` has to know beside them."""
        scale, scaling = scales.stored(self.scale)
        tensors = {"packed": pack(self.integers, self.bits), "scale": scale}
        how = scaling | {
            "bits": self.bits,
            "group_size": self.group_size,
            "shape": list(self.integers.shape),
            "zero_point": None,
        }
        if self.zero_point is not None:
            whole = self.zero_point.dtype == torch.uint8
            tensors["zero_point"] = (
                pack(self.zero_point, self.bits) if whole else self.zero_point.contiguous()
            )
            how["zero_point"] = "integer" if whole else "float"
        return tensors, how

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> QuantizedTensor:
        """The inverse of `stored`. Raises KeyError with the name of a tensor that is missing."""
        scale, zero_point = scales.restored(tensors["scale"], how), None
        if how["zero_point"] is not None:
            zero_point = tensors["zero_point"]
            if how["zero_point"] == "integer":
                zero_point = unpack(zero_point, how["bits"], tuple(scale.shape))
        integers = unpack(tensors["packed"], how["bits"], tuple(how["shape"]))
        return cls(integers, scale, zero_point, how["bits"])
