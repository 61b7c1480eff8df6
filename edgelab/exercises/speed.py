"""Exercises of notebook 04: bandwidth, arithmetic, and what the cache takes."""

from edgelab.devices import SCALE_BITS, stored_bits
from edgelab.exercises.checking import Exercise, exercise


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
