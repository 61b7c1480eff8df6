"""Exercises of notebook 03: outliers that move into the weights, and errors that make up for each other."""

from edgelab.exercises.checking import Exercise, exercise


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
