"""Exercises of notebook 11: bytes of a block, the limits of a device, and the charge of a battery."""

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def bits_of_a_q4_1_weight() -> Exercise:
    """Bits per weight of Q4_1: 32 integers of 4 bits, a scale and a minimum of 16 bits each."""
    right = 4 + 2 * 16 / 32
    return Exercise(
        answer=right,
        why="A group of 64 has half as many scales: 4.31 bits with a 4-bit zero-point. The file of an engine can be "
        "larger than ours, though the integers are the same.",
        hint="Bits of a block of 32 weights = 32 × 4 + 16 + 16; how many is that for each weight?",
        mistakes=[
            (4 + 16 / 32, "that is Q4_0, which has a scale and no minimum."),
            (4, "scale and minimum are stored, too."),
            (32 * right, "that is the block; a weight is asked for."),
        ],
    )


@exercise
def tokens_of_a_phone() -> Exercise:
    """Tokens per second of 1.6 GB of weights on memory of 25.6 GB/s, of which decoding reaches half."""
    weights_gb, peak_gb_s, share = 1.6, 25.6, 0.5
    right = share * peak_gb_s / weights_gb
    return Exercise(
        answer=right,
        why="About Gemma-2B in 4 bits on a Snapdragon 778G, if the engine reaches half of the peak.",
        hint="Every token reads all weights once.",
        mistakes=[
            (peak_gb_s / weights_gb, "that is the limit; half of the peak is reached."),
            (1e3 / right, "those are ms per token."),
            (weights_gb / (share * peak_gb_s), "those are seconds per token."),
        ],
    )


@exercise
def joules_of_a_token() -> Exercise:
    """Joules per token of a device that takes 5 W and writes 8 tokens per second."""
    watts, tok_s = 5.0, 8.0
    right = watts / tok_s
    return Exercise(
        answer=right,
        why="A battery of 18 Wh holds 64,800 J: a hundred thousand tokens, if nothing else used it.",
        hint="A watt is a joule per second; how many seconds does a token take?",
        mistakes=[
            (watts * tok_s, "a faster device takes less for each token, not more: divide."),
            (tok_s / watts, "those are tokens per joule."),
        ],
    )


@exercise
def roofline_bound() -> CodeExercise:
    """Least ms of a step: billions of weights, bits, tokens at once, GB/s, GFLOP/s -> ms for each count of tokens."""
    import numpy as np

    def bound(memory_s: float, compute_s: np.ndarray) -> np.ndarray:
        return 1e3 * np.maximum(memory_s, compute_s)

    def solution(
        weights: float, bits: float, tokens: np.ndarray, read_gb_s: float, gflop_s: float
    ) -> np.ndarray:
        return bound(weights * bits / 8 / read_gb_s, 2 * weights * tokens / gflop_s)

    def added(
        weights: float, bits: float, tokens: np.ndarray, read_gb_s: float, gflop_s: float
    ) -> np.ndarray:
        return 1e3 * (weights * bits / 8 / read_gb_s + 2 * weights * tokens / gflop_s)

    def least(
        weights: float, bits: float, tokens: np.ndarray, read_gb_s: float, gflop_s: float
    ) -> np.ndarray:
        return 1e3 * np.minimum(weights * bits / 8 / read_gb_s, 2 * weights * tokens / gflop_s)

    def one_operation(
        weights: float, bits: float, tokens: np.ndarray, read_gb_s: float, gflop_s: float
    ) -> np.ndarray:
        return solution(weights, bits, tokens, read_gb_s, 2 * gflop_s)

    return CodeExercise(
        inputs=(2.5, 4.5, np.array([1, 8, 64, 512]), 25.0, 1000.0),
        solution=solution,
        why="Up to some tokens at once the time does not change: the weights have to be read anyway.",
        hint="Seconds to read weights × bits / 8, seconds for 2 operations per weight and token: the larger counts.",
        mistakes=[
            (added, "reading and computing overlap: the longer of the two counts, not their sum."),
            (least, "a step has to wait for both, so that the longer one counts: the maximum."),
            (one_operation, "a multiplication and an addition are two operations for each weight and token."),
            (
                lambda weights, bits, *rest: solution(weights, 8 * bits, *rest),
                "bits are an eighth of a byte.",
            ),
            (lambda *given: solution(*given) / 1e3, "those are seconds; ms are asked for."),
        ],
    )
