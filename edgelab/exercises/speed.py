"""Exercises of notebooks 04 and 04b: bandwidth, arithmetic, and what the cache takes."""

from edgelab.devices import SCALE_BITS, stored_bits
from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def decoding_at_60_percent() -> Exercise:
    """Tokens per second of 4.1 GB of weights on memory of 68 GB/s, of which decoding reaches 60 %."""
    weights_gb, read_gb_s, reached = 4.1, 68.0, 0.6
    right = reached * read_gb_s / weights_gb
    return Exercise(
        answer=right,
        why="About what 7B in 4 bits does on such a device; no faster processor would change it.",
        hint="Every token reads all weights once: tokens per second = bandwidth reached / bytes of the weights.",
        mistakes=[
            (read_gb_s / weights_gb, "that is the limit itself; decoding reaches 60 % of it."),
            (1 / right, "those are the seconds per token; tokens per second are asked for."),
            (1e3 / right, "those are ms per token; tokens per second are asked for."),
            (reached * read_gb_s * weights_gb, "more bytes make it slower: divide by them."),
        ],
    )


@exercise
def tokens_at_the_ridge() -> Exercise:
    """Tokens at once from which 4-bit weights are bound by arithmetic: memory of 25 GB/s, 1,000 GFLOP/s."""
    read_gb_s, gflop_s, bits = 25.0, 1000.0, 4
    right = gflop_s / read_gb_s * (bits / 8) / 2
    return Exercise(
        answer=right,
        why="A prompt of 128 tokens is far beyond it: fewer bits no longer help, and unpacking costs extra.",
        hint="A weight of half a byte takes part in 2 operations per token: 4 × tokens operations per byte.",
        mistakes=[
            (gflop_s / read_gb_s, "that is the ridge in operations per byte; how many tokens make as many?"),
            (2 * right, "a multiplication and an addition are two operations."),
            (right * 32 / bits, "that holds for 32-bit weights; 4 bits are half a byte."),
        ],
    )


@exercise
def tokens_of_a_two_bit_cache() -> Exercise:
    """How many times as many tokens fit in 2 bits as in 16, in groups of 32 with a scale and a minimum of 16 bits."""
    bits, full, group_size = 2, 16, 32
    right = full / stored_bits(bits, group_size, zero_point=False, scale_bits=2 * SCALE_BITS)
    return Exercise(
        answer=right,
        why="Scale and minimum take one bit of a number: a 2-bit cache has 3 bits, and a 4-bit one has 5.",
        hint="Bits of a number in the cache = 2 + what it bears of its group's scale and minimum.",
        mistakes=[
            (full / bits, "that leaves out the scales and minima, a bit for each number."),
            (
                full / stored_bits(bits, group_size, zero_point=False),
                "a group stores a scale and a minimum, 16 bits each.",
            ),
            (1 / right, "that is the share of the bytes; how many times as many tokens is asked for."),
            (2 * right, "the other cache has 16 bits, not 32."),
        ],
    )


@exercise
def unpack_nibbles() -> CodeExercise:
    """Two 4-bit integers from each byte, the first in its lower half: packed (rows, bytes) -> (rows, 2 × bytes)."""
    import torch
    from torch import Tensor

    from edgelab.storage.bits import unpack

    packed = torch.tensor([[0x21, 0x43, 0x65], [0xF0, 0x9A, 0x07]], dtype=torch.uint8)

    def solution(packed: Tensor) -> Tensor:
        return unpack(packed.flatten(), 4, (len(packed), 2 * packed.shape[1]))

    def pairs(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], -1).flatten(1)

    return CodeExercise(
        inputs=(packed,),
        solution=solution,
        why="A kernel does just this in its registers, for sixteen or more bytes at once.",
        hint="packed & 15 is the lower half of a byte, packed >> 4 the upper; torch.stack(..., dim=-1) pairs them.",
        mistakes=[
            (
                lambda packed: pairs(packed >> 4, packed & 15),
                "the lower half of a byte holds the first of its two integers.",
            ),
            (
                lambda packed: pairs(packed & 15, packed & 240),
                "the upper half has to be shifted down: packed >> 4.",
            ),
            (
                lambda packed: torch.cat([packed & 15, packed >> 4], 1),
                "all lower halves come first here, as in llama.cpp's blocks; ours lie in turns.",
            ),
            (lambda packed: packed & 15, "that is one integer of each byte; there are two."),
        ],
    )


@exercise
def keys_by_channel() -> CodeExercise:
    """Round keys with a range for each channel: keys (tokens, channels) and bits -> the rounded keys."""
    import torch
    from torch import Tensor

    from edgelab.storage.kv_cache import dequantize_keys, quantize_keys

    keys = torch.tensor([[0.0, -90.0, 1.0], [1.25, -60.0, 1.5], [2.0, -77.0, 2.125], [3.0, -66.0, 2.5]])

    def solution(keys: Tensor, bits: int) -> Tensor:
        return dequantize_keys(quantize_keys(keys[None, None], bits, len(keys)), keys.dtype)[0, 0]

    def on_a_grid(keys: Tensor, steps: int, low: Tensor, high: Tensor) -> Tensor:
        scale = (high - low) / steps
        return ((keys - low) / scale).round() * scale + low

    def by_token(keys: Tensor, bits: int) -> Tensor:
        return on_a_grid(keys, 2**bits - 1, keys.amin(1, keepdim=True), keys.amax(1, keepdim=True))

    def one_range(keys: Tensor, bits: int) -> Tensor:
        return on_a_grid(keys, 2**bits - 1, keys.amin(), keys.amax())

    def a_step_more(keys: Tensor, bits: int) -> Tensor:
        return on_a_grid(keys, 2**bits, keys.amin(0), keys.amax(0))

    return CodeExercise(
        inputs=(keys, 2),
        solution=solution,
        why="The channel around -70 has a range of its own, so that it costs the others nothing.",
        hint="low and high of each column, scale = (high - low) / (2^bits - 1); round (keys - low) / scale; go back.",
        mistakes=[
            (by_token, "that is a range for each token, a row. A channel is a column: dim=0."),
            (one_range, "that is one range for everything; each channel has its own here."),
            (a_step_more, "2^bits levels have 2^bits - 1 steps between them."),
            (lambda keys, bits: solution(keys, bits) - keys.amin(0), "add the minimum of the channel again."),
        ],
    )
