"""Formats of hidden states on the wire, and what a state takes in each of them; `wire` writes and reads them.

float32  as they are
float16  rounded; what is beyond 65,504 is cut there
int8     states = integers * scale, one float32 scale = max |state| / 127 for every token
int4     states = integers * scale, two integers from -7 to 7 in a byte, one bfloat16 scale = max |state| / 7 for every
         GROUP channels of a token

A few channels of a hidden state are hundreds of times as large as the others (Sun et al. 2024, arXiv:2402.17762). One
scale per token would round all others to zero at 4 bits, which is why int4 has groups.
"""

from __future__ import annotations

from edgelab.errors import EdgeLabError

NUMBER_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
FORMATS = tuple(NUMBER_BYTES)
GROUP = 32  # channels that share a scale in int4, or the most below it that divide the hidden size
INT8_SCALE_BYTES = 4
INT4_SCALE_BYTES = 2  # bfloat16 holds any size of state, in half a bit per channel less than float32


class WireError(EdgeLabError):
    """Bytes that are no message of a stage or no hidden states, or a format that does not exist."""


def check_format(wire: str) -> None:
    """Raises WireError for an unknown format."""
    if wire not in FORMATS:
        raise WireError(f"wire={wire} is no format; there are {', '.join(FORMATS)}.")


def group_size(hidden_size: int) -> int:
    """Channels that share a scale in int4. Raises WireError for an odd hidden size, of which two make no byte."""
    if hidden_size % 2:
        raise WireError(
            f"A hidden size of {hidden_size} is odd and cannot be packed two to a byte; use int8."
        )
    return max(size for size in range(2, GROUP + 1, 2) if hidden_size % size == 0)


def hidden_bytes(hidden_size: int, wire: str = "float32") -> float:
    """Bytes of one hidden state on the wire, its scales among them.

    Raises WireError for an unknown format, and in int4 for an odd hidden size.
    """
    check_format(wire)
    numbers = hidden_size * NUMBER_BYTES[wire]
    if wire == "int8":
        return numbers + INT8_SCALE_BYTES
    if wire == "int4":
        return numbers + INT4_SCALE_BYTES * (hidden_size // group_size(hidden_size))
    return numbers
