"""Exercises of notebook 13: the recurrence of a planner, bytes on a link, and a pipeline of two requests."""

import numpy as np

from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise


@exercise
def next_layer() -> CodeExercise:
    """One step of the recurrence: best (devices,) so far, moving (devices, devices), own (devices,) -> best, next."""
    best = np.array([10.0, 14.0, 30.0])
    moving = np.array([[0.0, 2.5, 128.0], [2.5, 0.0, 2.5], [128.0, 2.5, 0.0]])
    own = np.array([10.0, 10.0, 1.0])

    def solution(best: np.ndarray, moving: np.ndarray, own: np.ndarray) -> np.ndarray:
        return (best[:, None] + moving).min(0) + own

    def from_rows(best: np.ndarray, moving: np.ndarray, own: np.ndarray) -> np.ndarray:
        return (best + moving).min(0) + own

    def never_moves(best: np.ndarray, moving: np.ndarray, own: np.ndarray) -> np.ndarray:
        return best + own

    def free_moves(best: np.ndarray, moving: np.ndarray, own: np.ndarray) -> np.ndarray:
        return best.min() + own

    def added_before(best: np.ndarray, moving: np.ndarray, own: np.ndarray) -> np.ndarray:
        return (best[:, None] + moving + own[:, None]).min(0)

    return CodeExercise(
        inputs=(best, moving, own),
        solution=solution,
        why="The third device is reached from the second one: 14 + 2.5 + 1, not from the first, 10 + 128 + 1.",
        hint="For every device j: the smallest best[k] + moving[k, j] over all k, and own[j] on top.",
        mistakes=[
            (from_rows, "best belongs to the device that hands on, the rows of moving: best[:, None]."),
            (never_moves, "a layer may run on another device than the one before it."),
            (free_moves, "changing the device costs moving[k, j]."),
            (added_before, "own is what the next layer takes where it runs, at j, not at k."),
            (lambda b, m, o: (b[:, None] + m).max(0) + o, "the cheapest way counts, not the dearest."),
        ],
    )


@exercise
def prompt_over_the_link() -> Exercise:
    """Milliseconds for the states of 100 prompt tokens, 576 float32 each, over 10 Mbps, without the round trip."""
    right = 100 * 576 * 4 * 8 / 10e6 * 1e3
    return Exercise(
        answer=right,
        why="A prompt is the expensive message of a partition: one token later takes a hundredth of it.",
        hint="100 tokens × 576 numbers × 4 bytes × 8 bits, over 10,000,000 bits per second.",
        mistakes=[
            (right / 8, "megabits: a byte has 8 of them."),
            (right / 100, "that is one token."),
            (right / 1e3, "that is in seconds."),
            (right / 4, "float32 has 4 bytes."),
        ],
    )


@exercise
def two_in_flight() -> Exercise:
    """Tokens per second of two requests on stages of 20 and 30 ms and a link of 10 ms, without bubbles."""
    right = 2 / (max(2 * 30, 20 + 10 + 30) / 1e3)
    return Exercise(
        answer=right,
        why="Both limits meet here: the slowest stage works all the time, and a third request would only wait.",
        hint="2 requests every max(2 × the slowest, the sum of all) milliseconds.",
        mistakes=[
            (1e3 / 60, "that is one request at a time."),
            (
                2e3 / 90,
                "with bubbles it would be; without, the next token starts as soon as its own request is done.",
            ),
            (1e3 / 20, "the slowest place decides, not the fastest."),
            (2e3 / 50, "the link takes its time, too."),
        ],
    )
