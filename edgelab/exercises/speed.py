"""Exercises of notebook 04: bandwidth and arithmetic."""

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
