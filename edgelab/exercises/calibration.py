"""Exercises of notebooks 03, 03b and 03c: errors that make up for each other, and ranges of activations."""

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def smoothed_outlier() -> Exercise:
    """Largest |x| of a channel after smoothing by 0.75, where it was 64 and its weights reach 0.25."""
    import torch

    from edgelab.techniques.quantization.smooth import smoothing_scale

    activation, weight, alpha = torch.tensor([64.0]), torch.tensor([0.25]), 0.75
    scale = smoothing_scale(activation, weight, alpha).item()
    return Exercise(
        answer=64 / scale,
        why=f"The input is divided by {scale:g}, and the weights that read it grow from 0.25 to {0.25 * scale:g}.",
        hint="The input is divided by s = max|x|^α / max|w|^(1 - α).",
        mistakes=[
            (scale, "that is the scale itself; the input is divided by it."),
            (64 * scale, "the input is divided by the scale; it is the weight that is multiplied."),
            (0.25 * scale, "that is the largest weight after smoothing; or α and 1 - α are exchanged."),
            (
                64 / smoothing_scale(activation, weight, 0.5).item(),
                "that is α = 0.5; here α is 0.75, which moves more of the outlier.",
            ),
            (64 ** (1 - alpha), "the weights' peak counts, too: s is divided by max|w|^(1 - α)."),
        ],
    )


@exercise
def error_that_is_made_up_for() -> Exercise:
    """Mean squared output error that GPTQ leaves of weights 0.4 and 0.3 whose inputs correlate by 0.8."""
    import torch

    from edgelab.techniques.quantization.gptq import gptq

    weight = torch.tensor([[0.4, 0.3]])
    hessian = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    grid = torch.ones(1, 1), torch.ones(1, 1)  # scale and zero-point: the integers -1, 0, 1 and 2
    tensor, _ = gptq(weight, hessian, 2, 2, lambda groups: grid, activation_order=False)
    chosen = tensor.dequantize()

    def left(rounded: torch.Tensor, products: torch.Tensor = hessian) -> float:
        error = rounded - weight
        return ((error @ products) * error).sum().item()

    nearest, best = weight.round(), torch.tensor([[1.0, 0.0]])
    return Exercise(
        answer=left(chosen),
        why=f"Rounding to nearest leaves {left(nearest):.3f}. (1, 0) would leave {left(best):.3f}, but GPTQ does not "
        "take back what it has rounded.",
        hint="0.4 becomes 0; move 0.3 by 0.8 of what was lost, round it, and sum H_ij e_i e_j over all i and j.",
        mistakes=[
            (left(nearest), "both go to the nearest integer there; 0.3 has to make up for what 0.4 lost."),
            (left(best), "that is less, but GPTQ does not find it: it rounds 0.4 to the nearest, 0."),
            (left(chosen, torch.eye(2)), "that is the error of the weights: H is missing."),
            (left(nearest, torch.eye(2)), "that is the error of the nearest weights, and H is missing."),
            (left(chosen, hessian * torch.tensor([[1, -1], [-1, 1]])), "a sign: the two errors cancel."),
        ],
    )


@exercise
def gptq_step() -> CodeExercise:
    """One step of GPTQ: weight, factor, j, step -> the weight with column j rounded and the columns behind it moved."""
    import torch
    from torch import Tensor

    from edgelab.techniques.quantization.gptq import inverse_factor

    weight = torch.tensor([[0.7, 0.4, 0.9, -0.2], [-0.3, 0.8, 0.1, 0.6]])
    hessian = torch.tensor(
        [[2.0, 0.8, 0.2, 0.0], [0.8, 1.0, 0.6, 0.3], [0.2, 0.6, 1.0, 0.1], [0.0, 0.3, 0.1, 0.5]]
    )
    factor, _ = inverse_factor(hessian, damping=0.01)

    def moved(weight: Tensor, factor: Tensor, j: int, step: float, share: Tensor) -> Tensor:
        rounded = (weight[:, j] / step).round() * step
        lost = (weight[:, j] - rounded) * share
        return torch.cat(
            [weight[:, :j], rounded[:, None], weight[:, j + 1 :] - lost[:, None] * factor[j, j + 1 :]], 1
        )

    def solution(weight: Tensor, factor: Tensor, j: int, step: float) -> Tensor:
        return moved(weight, factor, j, step, 1 / factor[j, j])

    def other_sign(weight: Tensor, factor: Tensor, j: int, step: float) -> Tensor:
        return moved(weight, factor, j, step, -1 / factor[j, j])

    def not_divided(weight: Tensor, factor: Tensor, j: int, step: float) -> Tensor:
        return moved(weight, factor, j, step, torch.ones(()))

    def not_moved(weight: Tensor, factor: Tensor, j: int, step: float) -> Tensor:
        return moved(weight, factor, j, step, torch.zeros(()))

    return CodeExercise(
        inputs=(weight, factor, 1, 0.5),
        solution=solution,
        why="Do this for each column, and you have written GPTQ.",
        hint="Round column j, divide its loss by factor[j, j], and take loss × factor[j, k] from each later column k.",
        mistakes=[
            (
                not_moved,
                "column j is rounded, but no later column has moved. Row j of factor, right of the diagonal, says how.",
            ),
            (not_divided, "what column j lost is divided by factor[j, j] first."),
            (other_sign, "the later columns move the wrong way: take w - rounded, and subtract."),
        ],
    )


@exercise
def unseen_directions() -> Exercise:
    """Directions of 1,536 inputs about which 512 tokens say nothing."""
    inputs, tokens = 1536, 512
    return Exercise(
        answer=inputs - tokens,
        why="Whatever GPTQ puts into those directions costs nothing on this text, and is paid for on the next.",
        hint="X^T X of n tokens has rank n at most.",
        mistakes=[
            (tokens, "so many directions the tokens can show; the others are asked for."),
            (inputs, "that would be without any text."),
            (0, "512 tokens cannot span 1,536 dimensions."),
            (inputs**2 - tokens * inputs, "count directions, not entries of the matrix."),
        ],
    )


@exercise
def damped_hessian() -> CodeExercise:
    """What GPTQ knows of the text: inputs (tokens, in_features) and damping -> the damped mean of x x^T."""
    import torch
    from torch import Tensor

    from edgelab.techniques.quantization.gptq import input_products

    inputs = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.5], [-1.0, 0.0, 2.5], [1.0, 1.0, -1.0]])

    def damped(hessian: Tensor, by: Tensor) -> Tensor:
        return hessian + by * torch.eye(len(hessian))

    def solution(inputs: Tensor, damping: float) -> Tensor:
        hessian, _ = input_products(inputs)
        return damped(hessian, damping * hessian.diagonal().mean())

    return CodeExercise(
        inputs=(inputs, 0.1),
        solution=solution,
        why="The diagonal says how large each input is, everything else which inputs come together.",
        hint="H = X^T X / tokens; then add damping × the mean of its diagonal to each entry of the diagonal.",
        mistakes=[
            (
                lambda x, damping: len(x) * solution(x, damping),
                "that is the sum over tokens; the mean is asked for.",
            ),
            (lambda x, damping: x.T @ x / len(x), "the damping is missing."),
            (
                lambda x, damping: damped(x.T @ x / len(x), torch.tensor(damping)),
                "damping is a share of the mean of the diagonal.",
            ),
            (
                lambda x, damping: x.T @ x / len(x) + damping * x.square().mean(),
                "only the diagonal gets the damping: multiply it by the identity matrix.",
            ),
            (
                lambda x, damping: x @ x.T / len(x),
                "that compares tokens with tokens; inputs with inputs is X^T X.",
            ),
        ],
    )


@exercise
def static_range() -> CodeExercise:
    """Round activations onto one fixed range of 8 bits: x, low, high -> the rounded x."""
    import torch
    from torch import Tensor

    from edgelab.storage.layers import ActivationGrid

    x = torch.tensor([[0.31, -0.52, 1.98, 0.0], [-1.3, 0.047, 2.6, -0.009]])

    def on_a_grid(
        x: Tensor, scale: float, zero_point: int, lowest: float = 0, highest: float = 255
    ) -> Tensor:
        return ((x / scale + zero_point).round().clamp(lowest, highest) - zero_point) * scale

    def solution(x: Tensor, low: float, high: float) -> Tensor:
        return ActivationGrid.spanning(torch.tensor(low), torch.tensor(high)).round(x)

    def around(x: Tensor, low: float, high: float, levels: int = 255) -> tuple[float, int]:
        scale = (high - low) / levels
        return scale, round(-low / scale)

    def not_clamped(x: Tensor, low: float, high: float) -> Tensor:
        return on_a_grid(x, *around(x, low, high), -torch.inf, torch.inf)

    def without_zero_point(x: Tensor, low: float, high: float) -> Tensor:
        return on_a_grid(x, around(x, low, high)[0], 0)

    def of_256(x: Tensor, low: float, high: float) -> Tensor:
        return on_a_grid(x, *around(x, low, high, 256))

    def integers(x: Tensor, low: float, high: float) -> Tensor:
        scale, zero_point = around(x, low, high)
        return (x / scale + zero_point).round().clamp(0, 255)

    return CodeExercise(
        inputs=(x, -1.0, 2.0),
        solution=solution,
        why="What is beyond the range is cut off, and the step is the same for every number within it.",
        hint="scale = (high - low) / 255, zero_point = round(-low / scale); round and clamp to 0 to 255, then go back.",
        mistakes=[
            (not_clamped, "-1.3 and 2.6 are beyond the range: clamp the integers to 0 to 255."),
            (without_zero_point, "without a zero-point nothing below zero is left: integers begin at 0."),
            (of_256, "256 levels have 255 steps between them."),
            (integers, "these are the integers; subtract the zero-point and multiply by the scale."),
        ],
    )
