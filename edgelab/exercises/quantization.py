"""Exercises of notebook 02: grids, and what they take."""

from edgelab.devices import models, stored_bits
from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def group_within_budget() -> Exercise:
    """The smallest of the group sizes 32, 64, 96, 192 with which asymmetric 4-bit weights take at most 4.25 bits."""
    bits, budget, sizes = 4, 4.25, (32, 64, 96, 192)
    stored = {size: stored_bits(bits, size) for size in sizes}
    without_zero_points = min(size for size in sizes if stored_bits(bits, size, zero_point=False) <= budget)
    return Exercise(
        answer=min(size for size in sizes if stored[size] <= budget),
        why=f"Groups of 64 take {stored[64]} bits, groups of 96 take {stored[96]:.3f}.",
        hint="bits + (16 bits of the scale + the bits of a zero-point) / group size.",
        mistakes=[
            (without_zero_points, "that counts the scales only; every group also stores a 4-bit zero-point."),
            (192, "that is within the budget, but a smaller group is too."),
            (32, f"groups of 32 take {stored[32]} bits."),
        ],
    )


@exercise
def quantize_groups() -> CodeExercise:
    """Round the groups of a matrix onto symmetric grids: weight, bits, group_size -> the rounded weight."""
    import torch
    from torch import Tensor

    from edgelab.techniques.quantization.rtn import quantize_affine

    weight = torch.tensor(
        [[1.5, -0.6, 0.3, -1.2, 0.75, -0.3, 0.1, 0.45], [-3.0, 1.4, 0.4, 2.2, 0.3, -0.375, 0.2, -0.05]]
    )

    def solution(weight: Tensor, bits: int, group_size: int) -> Tensor:
        return quantize_affine(weight, bits, group_size, symmetric=True).dequantize()

    def by_row(weight: Tensor, bits: int, group_size: int) -> Tensor:
        return solution(weight, bits, weight.shape[1])

    def on_a_grid(weight: Tensor, bits: int, group_size: int, steps: int, absolute: bool = True) -> Tensor:
        groups = weight.view(-1, group_size)
        scale = (groups.abs() if absolute else groups).amax(dim=1, keepdim=True) / steps
        highest = 2 ** (bits - 1) - 1
        return ((groups / scale).round().clamp(-highest - 1, highest) * scale).view_as(weight)

    def one_step_more(weight: Tensor, bits: int, group_size: int) -> Tensor:
        return on_a_grid(weight, bits, group_size, 2 ** (bits - 1))

    def all_steps(weight: Tensor, bits: int, group_size: int) -> Tensor:
        return on_a_grid(weight, bits, group_size, 2**bits - 1)

    def without_sign(weight: Tensor, bits: int, group_size: int) -> Tensor:
        return on_a_grid(weight, bits, group_size, 2 ** (bits - 1) - 1, absolute=False)

    def not_scaled_back(weight: Tensor, bits: int, group_size: int) -> Tensor:
        return quantize_affine(weight, bits, group_size, symmetric=True).integers.float() - 2 ** (bits - 1)

    return CodeExercise(
        inputs=(weight, 3, 4),
        solution=solution,
        why="The largest weight of each group keeps its value, and the others move to the nearest step.",
        hint="View the weight as (groups, group_size), take max |w| of each group, divide, round, multiply.",
        mistakes=[
            (by_row, "each row has one scale here. Make the groups first: `weight.view(-1, group_size)`."),
            (
                one_step_more,
                "the largest weight has to land on the last step: divide by 2^(bits-1) - 1, not 2^(bits-1).",
            ),
            (
                all_steps,
                "2^bits - 1 steps are the whole grid; from zero to either end there are 2^(bits-1) - 1.",
            ),
            (without_sign, "a negative weight can be the largest: take the maximum of |w|."),
            (not_scaled_back, "these are the integers. Multiply them by their scale again."),
        ],
    )


@exercise
def levels_of_symmetric_two_bits() -> Exercise:
    """To how many of the four levels of a symmetric 2-bit grid a weight is ever rounded."""
    import torch

    from edgelab.techniques.quantization.rtn import quantize_affine

    weight = torch.linspace(-1, 1, 64)[None]
    return Exercise(
        answer=quantize_affine(weight, bits=2, group_size=0, symmetric=True).integers.unique().numel(),
        why="The largest weight is one step from zero, so that the level at minus two steps is never used.",
        hint="The scale is max |w| / (2¹ - 1): how many steps of it is the weight farthest from zero?",
        mistakes=[
            (
                4,
                "the grid has four levels, but look at the lowest one in the widget: does any weight go there?",
            ),
            (2, "zero is a level too."),
        ],
    )


@exercise
def codebook_of_a_row() -> Exercise:
    """Bits per weight of 4-bit k-means in groups of 64 where each row of 576 inputs has a codebook of its own."""
    bits, inputs, group_size, stored = 4, 576, 64, 16
    scales, table = stored / group_size, 2**bits * stored / inputs
    return Exercise(
        answer=bits + scales + table,
        why=f"The codebook alone takes {table:.2f} bits of every weight; one for the whole matrix takes 0.001.",
        hint="4 bits, and of each row 16 levels and 9 scales in 16 bits, spread over 576 weights.",
        mistakes=[
            (bits + table, "every group of 64 stores a 16-bit scale too."),
            (
                bits + scales,
                "that is one codebook for the matrix; here each row stores 16 levels of 16 bits.",
            ),
            (scales + table, "that is what comes to the 4 bits of the integer."),
        ],
    )


@exercise
def embedding_in_8_bits() -> Exercise:
    """Stored MB of the embedded model with 4-bit linear layers in groups of 64 and an 8-bit embedding by row."""
    shape = models()["SmolLM2-135M"]
    linear = shape.linear_parameters * 4 / 8
    scales = shape.linear_parameters / 64 * (2 + 0.5)  # 16-bit scale, 4-bit zero-point
    embedding = shape.embedding_parameters + shape.vocab_size * (2 + 1)
    norms = shape.other_parameters * 4
    right = (linear + scales + embedding + norms) / 1e6
    return Exercise(
        answer=right,
        why="Rounding the embedding saves 85 MB, more than all linear layers take at 4 bits.",
        hint="106.2M linear weights at half a byte, 2.5 bytes for each 64 of them, 28.3M embedding weights at one.",
        mistakes=[
            (
                (linear + embedding) / 1e6,
                "every group of 64 stores a 16-bit scale and a 4-bit zero-point too.",
            ),
            (
                right + shape.embedding_parameters * 3 / 1e6,
                "that leaves the embedding in 32 bits; it has 8 now.",
            ),
            (
                right + shape.embedding_parameters / 1e6,
                "head and embedding are one matrix here: count it once.",
            ),
            (shape.parameters / 2e6, "the embedding has 8 bits, not 4, and groups have scales."),
        ],
    )
