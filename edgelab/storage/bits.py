"""Integers below 2**bits packed into bytes, little end first."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def pack(integers: Tensor, bits: int) -> Tensor:
    """Store integers below 2**bits in bits/8 bytes each, across the whole tensor: eight of them in `bits` bytes.

    integers: any shape, uint8. Returns (ceil(count * bits / 8),) uint8.
    """
    flat = integers.reshape(-1)
    if bits == 8:
        return flat.contiguous()
    n_bytes = -(-len(flat) * bits // 8)
    eights = functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8).long()
    words = (eights << torch.arange(0, 8 * bits, bits)).sum(-1, keepdim=True)
    return (words >> torch.arange(0, 8 * bits, 8) & 255).to(torch.uint8).view(-1)[:n_bytes]


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: uint8 integers of the given shape."""
    if bits == 8:
        return packed.reshape(shape)
    if 8 % bits == 0:  # none across two bytes
        return unpack_last(packed, bits)[: math.prod(shape)].reshape(shape)
    groups = functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()
    words = (groups << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
    integers = (words >> torch.arange(0, 8 * bits, bits) & 2**bits - 1).to(torch.uint8)
    return integers.view(-1)[: math.prod(shape)].reshape(shape)


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
