"""Quantized tensors, how they are packed into bytes, and the layers that hold them.

The layers here are the definition: they dequantize and multiply. A runtime replaces them by its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class QuantizedTensor:
    """A matrix on a uniform grid: w ~ (integers - zero_point) * scale.

    integers: (out_features, in_features) uint8 in [0, 2**bits - 1]. scale: (out_features, groups) float16.
    zero_point: (out_features, groups) uint8, or None for the middle of the grid, 2**(bits - 1).
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        """Inputs that share one scale."""
        return self.integers.shape[1] // self.scale.shape[1]

    def centre(self) -> Tensor:
        """The integer that stands for zero, (out_features, groups) float32."""
        if self.zero_point is None:
            return torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.float32)
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


def pack(integers: Tensor, bits: int) -> Tensor:
    """Store integers below 2**bits in bits/8 bytes each, little end first, across the whole tensor.

    integers: any shape, uint8. Returns (ceil(count * bits / 8),) uint8.
    """
    if bits == 8:
        return integers.reshape(-1).contiguous()
    flat = integers.reshape(-1, 1).numpy()
    planes = np.unpackbits(flat, axis=1, count=bits, bitorder="little")  # (count, bits)
    return torch.from_numpy(np.packbits(planes, bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: uint8 integers of the given shape."""
    if bits == 8:
        return packed.reshape(shape)
    count = int(np.prod(shape))
    planes = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(planes, axis=1, bitorder="little")).reshape(shape)


class PackedLinear(nn.Module):
    """A linear layer over a QuantizedTensor, (..., in_features) -> (..., out_features), in the input's dtype."""

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.tensor = tensor
        self.bias = bias
        self.out_features, self.in_features = tensor.integers.shape

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.tensor.dequantize(inputs.dtype), self.bias)


class PackedEmbedding(nn.Module):
    """An embedding over a QuantizedTensor of shape (vocabulary, hidden); rows come out in `dtype`.

    multiplier: what rows are multiplied by when looked up, in Gemma models the root of the hidden size.
    """

    def __init__(
        self, tensor: QuantizedTensor, dtype: torch.dtype = torch.float32, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.dtype = dtype
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        return self.scaled(self.tensor.rows(ids))

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows in `dtype`, times the multiplier in `dtype`."""
        return rows.to(self.dtype) * torch.tensor(self.multiplier, dtype=self.dtype)
