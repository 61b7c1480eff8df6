"""Scales: float16's eleven significant bits at any size, so that a matrix times a power of two keeps its integers.

In a file they are float16 where its range holds them all, which it does for nearly every model. Otherwise they are
float16 times a power of two that the matrix has for itself: no bytes more, and 2**30 between its largest scale and
the smallest. Where not even that is enough they are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 16  # every float16 is below 2**16
FLOAT16 = torch.finfo(torch.float16)
SMALLEST, LARGEST = FLOAT16.smallest_normal, FLOAT16.max  # 2**-14 and 65504


def as_stored(scale: Tensor) -> Tensor:
    """The scales of a matrix, (...) float32, as rounding has to use them: eleven bits each, and positive.

    A group of zeros, whose scale is 0 here, can have any; it gets a small one that needs no wider storage.
    """
    largest = scale.amax()
    largest = torch.where(largest > 0, largest, SMALLEST)
    of_zeros = torch.full_like(largest, SMALLEST).clamp(largest * 2**-28, largest)
    return eleven_bits(torch.where(scale == 0, of_zeros, scale))


def eleven_bits(values: Tensor) -> Tensor:
    """Values rounded to the precision of float16, without its range. values: float32, any shape."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(mantissa.half().float(), exponent)


def narrowed(scale: Tensor) -> Tensor:
    """Scales in float16 where that holds each of them exactly, else as they are."""
    if scale.dtype == torch.float16:
        return scale
    half = scale.half()
    return half if torch.equal(half.to(scale.dtype), scale) else scale


def shifted(values: Tensor, exponent: int) -> Tensor:
    """values times 2**exponent, float32."""
    if exponent == 0:
        return values.float()
    return (values.double() * 2.0**exponent).float()


def top_exponent(values: Tensor) -> int:
    """The exponent at which the largest magnitude of values * 2**-exponent is just below float16's end."""
    return int(torch.frexp(values.abs().amax()).exponent) - TOP


def stored(scale: Tensor) -> tuple[Tensor, dict[str, int | None]]:
    """Scales as a file has them, and what `restored` has to know: nothing where they are plain float16.

    "scale_exponent": of the power of two that they are multiplied by; None for float32.
    """
    if scale.dtype == torch.float16:
        return scale.contiguous(), {}
    exponent = top_exponent(scale)
    half = narrowed(shifted(scale, -exponent))
    if half.dtype == torch.float16:
        return half.contiguous(), {"scale_exponent": exponent}
    return scale.contiguous(), {"scale_exponent": None}


def restored(tensor: Tensor, how: dict) -> Tensor:
    """The inverse of `stored`."""
    exponent = how.get("scale_exponent")
    return tensor if exponent is None else shifted(tensor, exponent)
