"""Exercises of notebook 09: a divergence of softened logits, what states weigh, and a bucket for the rest."""

import math

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def softened_kl() -> CodeExercise:
    """KL(teacher || student) of logits (tokens, vocabulary) at a temperature -> one number for each token."""
    import torch
    from torch import Tensor

    from edgelab.model.divergences import kl, reverse_kl

    teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 0.5, -2.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    student = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 1.5, -1.0, 2.0], [4.0, 0.0, 0.0, 0.0]])

    def solution(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        return kl((teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1))[0]

    def the_other_way(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        return reverse_kl((teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1))[0]

    def hard_student(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        return kl((teacher / temperature).log_softmax(-1), student.log_softmax(-1))[0]

    def along_tokens(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        log_p, log_q = ((one / temperature).log_softmax(0) for one in (teacher, student))
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def not_normalized(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        log_p, log_q = teacher / temperature, student / temperature
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    return CodeExercise(
        inputs=(teacher, student, 2.0),
        solution=solution,
        why="The second student is the teacher with 1 added to every logit: a softmax does not see that.",
        hint="log_p = (teacher_logits / temperature).log_softmax(-1), and the same for the student.",
        mistakes=[
            (the_other_way, "the other direction: the teacher's probabilities weigh the differences."),
            (lambda t, s, _: solution(t, s, 1.0), "divide both by the temperature first."),
            (hard_student, "the temperature softens both, the student as well."),
            (lambda t, s, x: solution(t, s, 1 / x), "divide by the temperature; a product would sharpen."),
            (along_tokens, "the softmax runs over the vocabulary, the last dimension."),
            (not_normalized, "logits are no log probabilities yet: log_softmax makes them sum to 1."),
        ],
    )


@exercise
def bytes_of_teacher_states() -> Exercise:
    """Bytes of final hidden states of 576 numbers in 16 bits, for 1,000 windows of 256 tokens."""
    tokens, hidden, vocabulary = 1000 * 256, 576, 49_152
    right = 2 * hidden * tokens
    return Exercise(
        answer=right,
        why="All logits of these tokens would be 85 times as many.",
        hint="1,000 windows × 256 tokens × 576 numbers × 2 bytes.",
        mistakes=[
            (2 * right, "16 bits are 2 bytes."),
            (hidden * tokens, "16 bits are 2 bytes each."),
            (8 * right, "bytes are asked for, and that is bits."),
            (2 * hidden * 1000, "each window has 256 tokens."),
            (2 * vocabulary * tokens, "that is all logits; the states have 576 numbers a token."),
        ],
    )


@exercise
def kl_with_a_bucket() -> Exercise:
    """KL of teacher (0.7, 0.2, 0.1) to student (0.5, 0.25, 0.25), of the likeliest token and a bucket for the rest."""
    kept, rest = 0.7 * math.log(0.7 / 0.5), 0.3 * math.log(0.3 / 0.5)
    full = kept + 0.2 * math.log(0.2 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    return Exercise(
        answer=kept + rest,
        why="It is above zero and below the divergence over all three tokens: a bucket forgets, and never invents.",
        hint="Two events: the likeliest token (0.7 against 0.5), and all others together (0.3 against 0.5).",
        mistakes=[
            (kept, "that leaves out the rest, and is no divergence."),
            (full, "that is over all three tokens; only one is kept, and the other two are one event."),
            ((kept + rest) / math.log(2), "that is in bits; nats are asked for."),
            (
                0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3),
                "the other direction: the teacher comes first.",
            ),
        ],
    )
