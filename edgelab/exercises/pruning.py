"""Exercises of notebook 07: which weights go, what their neighbours make up for, and when a bitmap pays."""

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def wanda_mask() -> CodeExercise:
    """Wanda: weight, inputs (tokens, in_features) and sparsity -> 1 where a weight of a row stays, 0 where it goes."""
    import torch
    from torch import Tensor

    from edgelab.techniques.pruning.masks import keep_mask
    from edgelab.techniques.pruning.wanda import wanda_scores

    weight = torch.tensor([[3.0, 1.0, -0.5, 2.0], [-0.2, 0.1, 4.0, -1.2]])
    inputs = torch.tensor([[1.0, -5.0, 0.0, 2.0], [-1.0, 5.0, 0.5, -2.0], [1.0, 4.0, -0.5, 2.0]])

    def solution(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
        return keep_mask(wanda_scores(weight, inputs.norm(dim=0)), sparsity)

    def largest_go(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
        return keep_mask(-wanda_scores(weight, inputs.norm(dim=0)), sparsity)

    def of_the_matrix(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
        return keep_mask(wanda_scores(weight, inputs.norm(dim=0)), sparsity, per="layer")

    return CodeExercise(
        inputs=(weight, inputs, 0.5),
        solution=solution,
        why="The first row loses its 3, the largest it has: nothing much comes in there.",
        hint="scores = |weight| times the norm of each column of inputs; a row loses its smallest scores.",
        mistakes=[
            (lambda w, x, s: keep_mask(w.abs(), s), "that is magnitude: the inputs have no say in it."),
            (
                lambda w, x, s: keep_mask(w * x.norm(dim=0), s),
                "a weight of -1.2 counts as much as one of 1.2: take |weight|.",
            ),
            (
                lambda w, x, s: keep_mask(wanda_scores(w, x.mean(0)), s),
                "the mean lets positive and negative inputs cancel; take their norm.",
            ),
            (largest_go, "the other way round: the largest scores stay."),
            (of_the_matrix, "each row loses as many: rank along dim=1."),
        ],
    )


@exercise
def remove_one_weight() -> CodeExercise:
    """Optimal brain surgeon: weight (n,), hessian (n, n) and j -> the weights after j is gone, and the error."""
    import torch
    from torch import Tensor

    weight = torch.tensor([1.0, 1.0, -0.5])
    hessian = torch.tensor([[2.0, 1.0, 0.4], [1.0, 2.0, 0.0], [0.4, 0.0, 1.0]])

    def solution(weight: Tensor, hessian: Tensor, j: int) -> tuple[Tensor, Tensor]:
        row = torch.linalg.inv(hessian)[j]
        moved = weight - weight[j] / row[j] * row
        return moved, 0.5 * (moved - weight) @ hessian @ (moved - weight)

    def not_divided(weight: Tensor, hessian: Tensor, j: int) -> tuple[Tensor, Tensor]:
        moved = weight - weight[j] * torch.linalg.inv(hessian)[j]
        return moved, solution(weight, hessian, j)[1]

    def by_the_hessian(weight: Tensor, hessian: Tensor, j: int) -> tuple[Tensor, Tensor]:
        moved = weight - weight[j] / hessian[j, j] * torch.linalg.inv(hessian)[j]
        return moved, weight[j] ** 2 / hessian[j, j] / 2

    def only_zero(weight: Tensor, hessian: Tensor, j: int) -> tuple[Tensor, Tensor]:
        moved = weight.clone()
        moved[j] = 0
        return moved, solution(weight, hessian, j)[1]

    def other_sign(weight: Tensor, hessian: Tensor, j: int) -> tuple[Tensor, Tensor]:
        moved, error = solution(weight, hessian, j)
        return 2 * weight - moved, error

    def not_halved(weight: Tensor, hessian: Tensor, j: int) -> tuple[Tensor, Tensor]:
        moved, error = solution(weight, hessian, j)
        return moved, 2 * error

    return CodeExercise(
        inputs=(weight, hessian, 0),
        solution=solution,
        why="Remove the weight with the least error, update, and begin again: that is the optimal brain surgeon.",
        hint="With P the inverse of hessian: w - w[j] / P[j, j] * P[j], and the error is w[j]² / (2 P[j, j]).",
        mistakes=[
            (not_divided, "weight j is not 0 yet: divide by entry [j, j] of the inverse."),
            (by_the_hessian, "divide by entry [j, j] of the inverse, not of the Hessian itself."),
            (only_zero, "weight j is gone, but no other weight has moved."),
            (other_sign, "the sign: weight j has to become 0."),
            (not_halved, "the error is half of the square form, as in ½ e H e."),
        ],
        returns=("the weights", "the error"),
    )


@exercise
def zeros_until_a_bitmap_pays() -> Exercise:
    """Percent of zeros above which float16 under a bitmap is smaller than 4 bits, with two 16-bit numbers for 64."""
    value, dense, bitmap = 16, 4 + (16 + 16) / 64, 1  # bits: scale and zero-point take 16 each
    return Exercise(
        answer=100 * (1 - (dense - bitmap) / value),
        why="Half-empty float16 weights take twice the bytes of full 4-bit ones.",
        hint="With a share z of zeros a weight takes 1 + 16 (1 - z) bits; it has to be below 4.5.",
        mistakes=[
            (
                100 * bitmap / value,
                "so many zeros it takes against dense float16; the opponent has 4.5 bits.",
            ),
            (100 * (1 - dense / value), "the bitmap itself takes a bit for every weight, also for zeros."),
            (
                100 * (1 - (4 - bitmap) / value),
                "scales and zero-points of the groups take half a bit a weight.",
            ),
            (100 * (1 - (dense - bitmap) / 32), "the values are float16 here, not float32."),
            (100 * (dense - bitmap) / value, "that share stays; the zeros are asked for."),
        ],
        tolerance=0.003,
    )
