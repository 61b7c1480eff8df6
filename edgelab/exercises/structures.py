"""Exercises of notebook 08: what a block changes, what is left when blocks go, and from where factors are smaller."""

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def block_influence() -> CodeExercise:
    """Block influence: states before and after a block, (tokens, hidden) -> 1 - their mean cosine."""
    import torch
    from torch import Tensor
    from torch.nn import functional

    before = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.5, -0.5, 1.0], [0.0, 2.0, 1.0]])
    after = torch.tensor([[6.0, 8.0, 0.0], [1.0, 1.0, 0.0], [-0.5, 1.5, 1.0], [1.0, 2.0, -0.5]])

    def solution(before: Tensor, after: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(before, after, dim=-1).mean()

    def of_all_at_once(before: Tensor, after: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)

    def of_the_means(before: Tensor, after: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(before.mean(0), after.mean(0), dim=0)

    return CodeExercise(
        inputs=(before, after),
        solution=solution,
        why="The first token only grew longer, and counts as unchanged: the next norm undoes that.",
        hint="cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1)), one for each token.",
        mistakes=[
            (lambda b, a: 1 - solution(b, a), "that is the cosine: a block with influence changes the direction."),
            (lambda b, a: 1 - functional.cosine_similarity(b, a, dim=-1), "take the mean over the tokens."),
            (lambda b, a: 1 - functional.cosine_similarity(b, a, dim=0).mean(),
             "the cosine is one of each token: along the last dimension, not along the tokens."),
            (lambda b, a: 1 - (b * a).sum(-1).mean(), "divide by both norms, or long states count for more."),
            (of_all_at_once, "one cosine of all tokens together lets the longest states decide; take one for each."),
            (of_the_means, "take the cosine of each token first, then the mean."),
        ],
    )  # fmt: skip


@exercise
def parameters_of_25_blocks() -> Exercise:
    """Parameters of the embedded model, whose head is its embedding, with 25 blocks in place of 30."""
    hidden, mlp, keys, vocabulary, blocks = 576, 1536, 3 * 64, 49_152, 25
    attention = 2 * hidden * hidden + 2 * keys * hidden
    block = attention + 3 * hidden * mlp + 2 * hidden
    embedding = vocabulary * hidden
    right = blocks * block + embedding + hidden
    return Exercise(
        answer=right,
        why="A sixth of the blocks is less than a seventh of the parameters: the embedding stays whole.",
        hint="25 blocks of q and o (576 × 576), k and v (192 × 576), three of 576 × 1536 and two norms; "
        "then the embedding and the last norm.",
        mistakes=[
            (right + embedding, "head and embedding are one matrix here: count it once."),
            (right - embedding, "the embedding is missing, 49,152 × 576."),
            (right - hidden, "the norm behind the last block is missing."),
            (right - 2 * hidden * blocks, "each block has two norms of 576 weights."),
            (
                right - 2 * hidden * blocks - hidden,
                "the norms are missing: two in each block, and a last one.",
            ),
            (right + blocks * 2 * (hidden - keys) * hidden, "keys and values have 3 heads of 64, not 9."),
            (right - blocks * hidden * mlp, "the MLP has three matrices: gate, up and down."),
            (round((30 * block + embedding + hidden) * 25 / 30), "only the blocks become fewer."),
            (5 * block, "that is what has gone; what is left is asked for."),
        ],
    )


@exercise
def largest_smaller_rank() -> Exercise:
    """The largest rank at which two factors hold fewer numbers than a key projection of 192 × 576."""
    from edgelab.techniques.lowrank import break_even

    return Exercise(
        answer=break_even(192, 576),
        why="At rank 144 both hold as many, and from there to 192 the factors hold more.",
        hint="Factors of rank r hold r · (192 + 576) numbers, and the matrix 192 · 576.",
        mistakes=[
            (192 * 576 // (192 + 576), "at that rank both hold equally many numbers; fewer are asked for."),
            (191, "below full rank factors may still be larger: r rows of 576 and r columns of 192."),
            (192 * 576 // 576, "one factor has r · 576 numbers, and the other r · 192."),
            (576 * 576 // (2 * 576) - 1, "that is the rank for 576 × 576; the matrix here is 192 × 576."),
        ],
    )
