"""Exercises of notebook 12: what a round of drafting writes, a gap that is recovered, and a prompt sent as states."""

import numpy as np

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def written_in_a_round() -> CodeExercise:
    """Tokens of a round: draft (n,) from the edge, likeliest (n + 1,) from the cloud -> the tokens that are written."""
    draft = np.array([5, 9, 2, 7])
    likeliest = np.array([5, 9, 4, 7, 8])

    def solution(draft: np.ndarray, likeliest: np.ndarray) -> np.ndarray:
        agree = int(np.cumprod(draft == likeliest[:-1]).sum())
        return likeliest[: agree + 1]

    def counts_all(draft: np.ndarray, likeliest: np.ndarray) -> np.ndarray:
        return likeliest[: int((draft == likeliest[:-1]).sum()) + 1]

    def without_its_own(draft: np.ndarray, likeliest: np.ndarray) -> np.ndarray:
        return likeliest[: int(np.cumprod(draft == likeliest[:-1]).sum())]

    return CodeExercise(
        inputs=(draft, likeliest),
        solution=solution,
        why="Two tokens of the draft stay, and the cloud's own 4 takes the place of the third. The 7 behind it was "
        "drafted after a token that is gone, so it goes as well, although it happens to agree.",
        hint="Count the tokens that agree before the first one that does not: np.cumprod turns to 0 there and stays 0.",
        mistakes=[
            (counts_all, "what agrees behind the first disagreement was drafted after another text."),
            (without_its_own, "the cloud adds one token of its own in every round."),
            (lambda d, t: d[: int(np.cumprod(d == t[:-1]).sum()) + 1],
             "behind the tokens that stay comes the cloud's token, not the rejected one of the draft."),
            (lambda d, t: t, "what the cloud says behind a rejected token follows a text that is not written."),
        ],
    )  # fmt: skip


@exercise
def gap_recovered() -> Exercise:
    """Percent of the gap between an edge of 20 % right and a cloud of 35 % that 29 % right have recovered."""
    right = 100 * (0.29 - 0.20) / (0.35 - 0.20)
    return Exercise(
        answer=right,
        why="Sending a quarter at random would have recovered a quarter of the gap: the score found the right ones.",
        hint="How far from the edge's accuracy, as a share of the way to the cloud's?",
        mistakes=[
            (100 * 0.29 / 0.35, "the edge alone has 20 % already: both are counted from there."),
            (9.0, "that is the gain in points; divide it by the whole gap."),
            (right / 100, "in percent."),
            (100 - right, "that is what is left of the gap."),
        ],
    )


@exercise
def prompt_as_states() -> Exercise:
    """Milliseconds for 200 tokens as states of 576 float16 numbers over 12 Mbps, with a round trip of 70 ms."""
    travelling = 200 * 576 * 2 * 8 / 12e6 * 1e3
    return Exercise(
        answer=travelling + 70,
        why="As text the prompt has some 800 bytes and takes half a millisecond besides the round trip. States take "
        "nearly three hundred times as many bytes, and keep nothing secret.",
        hint="200 tokens × 576 numbers × 2 bytes × 8 bits, over 12,000,000 bits per second, and the round trip.",
        mistakes=[
            (travelling, "the round trip comes on top."),
            (travelling / 8 + 70, "megabits: a byte has 8 of them."),
            (2 * travelling + 70, "float16 has 2 bytes."),
            (travelling / 200 + 70, "that is one token; the whole prompt has to travel once."),
            (travelling / 1e3 + 0.07, "that is in seconds."),
        ],
    )
