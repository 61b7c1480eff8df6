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

    integers: (out_features, in_features) uint8 in [0, 2**bits - 1]. scale: (out_features, groups) float16, or (1, 1)
    for the whole matrix. zero_point: of scale's shape, uint8, or float16 where it lies between integers; None for the
    middle of the grid: 2**(bits - 1), and for the two levels of one bit 0.5.
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
        tensors = {"packed": pack(self.integers, self.bits), "scale": self.scale.contiguous()}
        how = {
            "grid": "uniform",
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
        scale, zero_point = tensors["scale"], None
        if how["zero_point"] is not None:
            zero_point = tensors["zero_point"]
            if how["zero_point"] == "integer":
                zero_point = unpack(zero_point, how["bits"], tuple(scale.shape))
        integers = unpack(tensors["packed"], how["bits"], tuple(how["shape"]))
        return cls(integers, scale, zero_point, how["bits"])


@dataclass
class CodebookTensor:
    """A matrix on a grid of its own: w ~ codebook[integers] * scale.

    integers: (out_features, in_features) uint8. codebook: (rows, 2**bits) float16, rows being 1 (one table for the
    matrix) or out_features. scale: (out_features, groups) float16.
    """

    integers: Tensor
    codebook: Tensor
    scale: Tensor
    bits: int

    @property
    def group_size(self) -> int:
        """Inputs that share one scale."""
        return self.integers.shape[1] // self.scale.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix in floating point, (out_features, in_features)."""
        tables = self.codebook.float().expand(len(self.integers), -1)
        levels = tables.gather(1, self.integers.long()).unflatten(-1, (self.scale.shape[1], -1))
        return (levels * self.scale.float()[..., None]).flatten(-2).to(dtype)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors to store, by the last part of their names, and what `restored` has to know beside them."""
        tensors = {
            "packed": pack(self.integers, self.bits),
            "codebook": self.codebook.contiguous(),
            "scale": self.scale.contiguous(),
        }
        return tensors, {"grid": "codebook", "bits": self.bits, "shape": list(self.integers.shape)}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> CodebookTensor:
        """The inverse of `stored`. Raises KeyError with the name of a tensor that is missing."""
        integers = unpack(tensors["packed"], how["bits"], tuple(how["shape"]))
        return cls(integers, tensors["codebook"], tensors["scale"], how["bits"])


GRIDS: dict[str, type[QuantizedTensor] | type[CodebookTensor]] = {
    "uniform": QuantizedTensor,
    "codebook": CodebookTensor,
}


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
        scale = ((high - low) / 255).clamp(min=1e-8)
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
    """A linear layer over a quantized matrix, (..., in_features) -> (..., out_features), in the input's dtype.

    activation: the grid its inputs are rounded to first; None leaves them as they are.
    """

    def __init__(
        self,
        tensor: QuantizedTensor | CodebookTensor,
        bias: Tensor | None = None,
        activation: ActivationGrid | None = None,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.bias = bias
        self.activation = activation
        self.out_features, self.in_features = tensor.integers.shape

    def forward(self, inputs: Tensor) -> Tensor:
        if self.activation is not None:
            inputs = self.activation.round(inputs)
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
