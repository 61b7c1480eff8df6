"""Integers below 2**bits packed into bytes, little end first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(integers: Tensor, bits: int) -> Tensor:
    """Store integers below 2**bits in bits/8 bytes each, across the whole tensor.

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


def pack_last(integers: Tensor, bits: int) -> Tensor:
    """Pack integers below 2**bits along the last axis, 8 / bits to a byte.

    integers: (..., n) uint8, n a multiple of 8 / bits. Returns (..., n * bits / 8) uint8. bits: 8, 4 or 2.
    """
    if bits == 8:
        return integers.contiguous()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=integers.device)
    # The bits of the summands do not overlap, so that the sum is their union.
    return (integers.unflatten(-1, (-1, 8 // bits)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_last(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_last`: (..., n) uint8."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 2**bits - 1).flatten(-2)
