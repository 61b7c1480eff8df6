"""Exercises of notebook 05: gradients through rounding."""

import math

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def gradient_through_rounding() -> Exercise:
    """Sum of the gradient that five weights receive through a 2-bit grid of levels -1, 0, 1, 2."""
    import torch

    from edgelab.techniques.quantization.qat import FakeQuantize

    weight = torch.tensor([[-3.0, 0.25, 1.75, 2.375, 5.0]], requires_grad=True)
    outer = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10_000.0]])
    scale, centre = torch.ones(1, 1), torch.ones(1, 1)
    FakeQuantize.apply(weight, scale, centre, 0, 3, True, torch.float32).backward(outer)
    return Exercise(
        answer=weight.grad.sum().item(),
        why="Only -3 and 5 are rounded to a level beyond the grid and clamped: their gradients stop.",
        hint="A gradient passes where round(w / s + z) is between 0 and 3, here with s = 1 and z = 1.",
        mistakes=[
            (outer.sum().item(), "weights that are clamped to an end of the grid receive nothing."),
            (110, "2.375 lies above the last level, but it is rounded to that level: nothing is clamped."),
            (11_110, "5 is rounded to 5 and clamped to 2: its gradient stops as well as that of -3."),
            (0, "that is the true gradient of rounding; straight through, it counts as 1 on the grid."),
            (1_111, "-3 is rounded to -3 and clamped to -1: its gradient stops as well as that of 5."),
            (1, "the gradients of 10, 100 and 1000 belong to weights on the grid."),
        ],
        tolerance=5e-5,
    )


@exercise
def gradient_of_a_step() -> Exercise:
    """By how much three rounded weights together grow with their step, without LSQ's factor."""
    import torch

    from edgelab.techniques.quantization.qat import FakeQuantize

    weight = torch.tensor([[0.3, 0.6, 2.4]])
    scale, centre, low, high = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 2.0), 0, 3
    FakeQuantize.apply(weight, scale, centre, low, high, True, torch.float32).sum().backward()
    factor = 1 / math.sqrt(weight.numel() * (high - low))
    right = scale.grad.item() / factor
    return Exercise(
        answer=right,
        why="-0.3 and +0.4 are what rounding adds to the first two; the third sits at the end, 1 step from zero.",
        hint="round(w / s) - w / s for a weight on the grid; for one beyond it, the level of that end.",
        mistakes=[
            (right * factor, "LSQ's factor 1/√(3 · 3) is in it; leave it out."),
            (-1.3, "2.4 is beyond the grid: its rounded value is 1 · s, which grows by 1 as s does."),
            (0.1, "2.4 counts, too: it is rounded to 1 · s, which grows by 1 as s does."),
            (2.0, "that is the sum of the levels; a weight on the grid also counts - w / s."),
            (-1.1, "the sign: 0.6 is rounded up to 1, so that rounding adds 0.4."),
        ],
    )


@exercise
def straight_through() -> CodeExercise:
    """The gradient that reaches a weight behind its rounding: weight, scale, low, high, outer -> by_weight."""
    import torch
    from torch import Tensor

    from edgelab.techniques.quantization.qat import FakeQuantize

    weight = torch.tensor([[0.26, -0.9, 0.8, 1.55], [-1.2, 0.05, 1.8, -0.49]])
    outer = torch.tensor([[1.0, -2.0, 0.5, 4.0], [3.0, 0.25, -1.0, 2.0]])

    def solution(weight: Tensor, scale: float, low: int, high: int, outer: Tensor) -> Tensor:
        leaf = weight.clone().requires_grad_()
        ones = torch.ones(len(weight), 1)
        FakeQuantize.apply(leaf, scale * ones, 0 * ones, low, high, True, torch.float32).backward(outer)
        return leaf.grad

    def clamped_only(weight: Tensor, scale: float, low: int, high: int, outer: Tensor) -> Tensor:
        return outer - solution(weight, scale, low, high, outer)

    def before_rounding(weight: Tensor, scale: float, low: int, high: int, outer: Tensor) -> Tensor:
        return outer * ((weight / scale >= low) & (weight / scale <= high))

    return CodeExercise(
        inputs=(weight, 0.5, -2, 3, outer),
        solution=solution,
        why="Rounding counts as if it were not there; clamping counts as what it is.",
        hint="integers = (weight / scale).round(); the gradient passes where low <= integers <= high, else it is 0.",
        mistakes=[
            (
                lambda weight, *_: 0 * weight,
                "that is the true gradient of rounding, with which nothing is trained.",
            ),
            (lambda *given: given[-1], "a weight beyond the ends of the grid is clamped, and gets nothing."),
            (
                before_rounding,
                "1.55 lies above the last level and is rounded to it: ask after rounding whether it is on the grid.",
            ),
            (clamped_only, "the other way round: clamped weights get nothing."),
            (
                lambda *given: given[1] * solution(*given),
                "the scale cancels: divided by it before rounding, multiplied by it after.",
            ),
        ],
    )
