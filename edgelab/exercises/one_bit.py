"""Exercises of notebook 06: two and three levels."""

import math

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def five_in_a_byte() -> Exercise:
    """Bits of a ternary weight where five share a byte and 64 share a 16-bit scale."""
    per_byte, scale = 5, 16 / 64
    assert 3**per_byte <= 2**8 < 3 ** (per_byte + 1)
    return Exercise(
        answer=8 / per_byte + scale,
        why="3⁵ = 243 of the 256 values of a byte are used, and log₂ 3 = 1.585 is nearly reached.",
        hint="Bits of a byte / weights in it + bits of a scale / weights that share it.",
        mistakes=[
            (8 / per_byte, "every 64 weights store a 16-bit scale, too."),
            (2 + scale, "that is two bits for each weight, as the package stores them: four in a byte."),
            (math.log2(3) + scale, "log₂ 3 is the bound; five weights in a byte take 8/5 bits each."),
            (math.log2(3), "log₂ 3 is the bound for the integers alone, without a byte and without scales."),
            (per_byte / 8 + scale, "bits per weight, not weights per bit."),
        ],
        tolerance=0.004,
    )


@exercise
def zeros_of_a_bell_curve() -> Exercise:
    """Percent of normally distributed weights that the absmean grid rounds to zero."""
    mean_magnitude = math.sqrt(2 / math.pi)  # of a standard normal variable

    def within(distance: float) -> float:
        return 100 * math.erf(distance / math.sqrt(2))

    return Exercise(
        answer=within(mean_magnitude / 2),
        why="Nearly a third, so that the three levels are used almost equally: little of log₂ 3 bits is wasted.",
        hint="w becomes 0 where |w| is below half of mean |w|, and mean |w| of a standard normal is √(2/π).",
        mistakes=[
            (within(mean_magnitude), "the edge is at half the scale: from there on 1 is the nearer level."),
            (within(0.5), "the edge is half of mean |w|, which is 0.8, not half a standard deviation."),
            (100 / 3, "close, but computed, not guessed: the three levels are not used exactly equally."),
            (within(mean_magnitude / 2) / 2, "both sides count: -edge < w < edge."),
            (within(mean_magnitude / 2) / 100, "that is the share; the answer is in percent."),
        ],
    )


@exercise
def pack_five() -> CodeExercise:
    """Five ternary weights in a byte: levels (bytes, 5) of -1, 0 and 1 -> (bytes,), the first counting ones."""
    import torch
    from torch import Tensor

    levels = torch.tensor([[1, 0, -1, 0, 1], [-1, -1, -1, -1, -1], [1, 1, 1, 1, 1], [0, 1, -1, -1, 0]])

    def in_base(levels: Tensor, base: int, shift: int = 1) -> Tensor:
        return ((levels + shift) * base ** torch.arange(5)).sum(1)

    return CodeExercise(
        inputs=(levels,),
        solution=lambda levels: in_base(levels, 3),
        why="The largest byte is 242: 13 of the 256 values are never used.",
        hint="Make -1, 0, 1 the digits 0, 1, 2, and read them as a number in base 3: the sum of digit × 3^place.",
        mistakes=[
            (lambda levels: in_base(levels, 3, 0), "a byte is never negative: add 1 to each level first."),
            (
                lambda levels: in_base(levels.flip(1), 3),
                "the digits are in the other order; the first counts ones, the last 81.",
            ),
            (
                lambda levels: in_base(levels, 4),
                "base 4 is two bits for each; five of them take ten bits, more than a byte.",
            ),
            (lambda levels: in_base(levels, 2), "there are three levels: base 3."),
        ],
    )
