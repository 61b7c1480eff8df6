"""Exercises of notebook 11: bytes of a block, the limits of a device, and what lines of llama-bench say of it."""

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


@exercise
def effective_bandwidth() -> CodeExercise:
    """GB/s that decoding reaches: MiB of a model's tensors, tokens per second -> GB/s, for each line of llama-bench."""
    import numpy as np

    def solution(mebibytes: np.ndarray, tok_s: np.ndarray) -> np.ndarray:
        return mebibytes * 2**20 * tok_s / 1e9

    return CodeExercise(
        inputs=(np.array([727.75, 2355.2]), np.array([23.10, 18.78])),
        solution=solution,
        why="The phone moves two and a half times as many bytes each second where the weights have 16 bits: with 4 "
        "bits something other than its memory holds the engine back.",
        hint="Every token reads all tensors once. MiB are 2²⁰ bytes, GB are 10⁹.",
        mistakes=[
            (lambda size, rate: size * rate / 1e3, "llama-bench writes MiB of 2²⁰ bytes, not MB of 10⁶."),
            (
                lambda size, rate: solution(size, rate) * 1e9 / 2**30,
                "you divided by 2³⁰; a GB here is 10⁹ bytes.",
            ),
            (
                lambda size, rate: size * 2**20 / rate / 1e9,
                "bytes of a token times tokens per second: multiply.",
            ),
            (lambda size, rate: 8 * solution(size, rate), "those are gigabits; bytes are asked for."),
        ],
    )
