"""Exercises of notebook 10: an adapter that is merged, its parameters, and what training it keeps in memory."""

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def merged_weight() -> CodeExercise:
    """Weight (out_features, in_features), A (rank, in_features), B (out_features, rank) and alpha -> one weight."""
    import torch
    from torch import Tensor

    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [3.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    a = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, -1.0]])

    def solution(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        return weight + alpha / len(a) * b @ a

    return CodeExercise(
        inputs=(weight, a, b, 8.0),
        solution=solution,
        why="The merged layer computes what the two paths computed, at the price of one: the adapter has no cost left.",
        hint="weight + alpha / rank * B @ A, where the rank is the number of rows of A.",
        mistakes=[
            (
                lambda w, a, b, alpha: w + alpha * b @ a,
                "the scale is alpha divided by the rank, which is 2 here.",
            ),
            (lambda w, a, b, alpha: w + b @ a, "the product is multiplied by alpha / rank."),
            (
                lambda w, a, b, alpha: w + alpha / len(a) ** 0.5 * b @ a,
                "that is rank-stabilised LoRA; here alpha is divided by the rank itself.",
            ),
            (
                lambda w, a, b, alpha: alpha / len(a) * b @ a,
                "that is the change; the weight itself is missing.",
            ),
            (lambda w, a, b, alpha: w - alpha / len(a) * b @ a, "the adapter is added; this takes it away."),
        ],
    )


@exercise
def parameters_of_an_adapter() -> Exercise:
    """Of rank 16, next to q_proj (576 -> 576) and v_proj (576 -> 192) of 30 blocks."""
    rank, blocks = 16, 30
    right = blocks * rank * ((576 + 576) + (576 + 192))
    return Exercise(
        answer=right,
        why="In float32 these are 3.7 MB, next to a model of 538 MB.",
        hint="For each layer rank × (in_features + out_features), two layers in each of 30 blocks.",
        mistakes=[
            (right // blocks, "that is one block, and there are 30."),
            (blocks * (576 * 576 + 576 * 192), "that is what the layers themselves have."),
            (blocks * rank * (576 * 576 + 576 * 192), "A and B have rank × (in + out) numbers, a sum."),
            (blocks * rank * 2 * (576 + 576), "v_proj has 192 outputs."),
            (blocks * rank * (576 + 576), "there are two layers in each block."),
            (4 * right, "parameters are asked for, and that is bytes in float32."),
        ],
    )


@exercise
def memory_of_adapter_training() -> Exercise:
    """MB of gradients and AdamW's moments, all float32, for an adapter of 20 million parameters beside 7 billion."""
    return Exercise(
        answer=240.0,
        why="Full fine-tuning would need 84 GB for the same three.",
        hint="Each trained parameter has a gradient and two moments, of 4 bytes each. Frozen parameters have none.",
        mistakes=[
            (160.0, "that is the two moments; each trained parameter has a gradient as well."),
            (80.0, "AdamW keeps two moments for each parameter, besides the gradient."),
            (320.0, "that counts the adapter's weights, too; asked for are gradients and moments."),
            (84_000.0, "only the adapter is trained; frozen weights have neither gradients nor moments."),
            (84_240.0, "only the adapter is trained; frozen weights have neither gradients nor moments."),
            (240e6, "in MB, which are 10⁶ bytes."),
            (60.0, "each number takes 4 bytes in float32."),
        ],
    )
