"""Checked exercises of the notebooks: `check(name, answer)` says whether an answer is right, or gives a hint.

An exercise is a question, the right number, and the numbers that usual mistakes lead to, each with its hint.
One decorator registers the function that computes them, so that no answer is written down as a bare number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgelab.errors import EdgeLabError


@dataclass(frozen=True)
class Exercise:
    """`answer` is right within the relative `tolerance`; `mistakes` pair wrong answers with their hints."""

    answer: float
    why: str  # shown with the right answer
    hint: str  # for answers that no mistake explains
    mistakes: list[tuple[float, str]] = field(default_factory=list)
    tolerance: float = 0.02


EXERCISES: dict[str, Callable[[], Exercise]] = {}


class UnknownExercise(EdgeLabError):
    """No exercise has that name."""


def exercise(make: Callable[[], Exercise]) -> Callable[[], Exercise]:
    """Register a function that makes an exercise under the function's name."""
    EXERCISES[make.__name__] = make
    return make


def check(name: str, answer: Any) -> str:
    """One line: right and why, or a hint. An answer of None asks for a number.

    Raises UnknownExercise, naming the exercises, where there is none called `name`.
    """
    if name not in EXERCISES:
        raise UnknownExercise(f"No exercise is called {name!r}; there are {', '.join(sorted(EXERCISES))}.")
    asked = EXERCISES[name]()
    if answer is None:
        return f"Replace None by a number. Hint: {asked.hint}"
    try:
        number = float(answer)
    except (TypeError, ValueError):
        return f"A number is needed, not {answer!r}. Hint: {asked.hint}"
    if _near(number, asked.answer, asked.tolerance):
        return f"Right: {asked.answer:,.4g}. {asked.why}"
    for wrong, hint in asked.mistakes:
        if _near(number, wrong, asked.tolerance):
            return f"Not yet: {hint}"
    direction = "too large" if number > asked.answer else "too small"
    return f"Not yet, {number:,.4g} is {direction}. {asked.hint}"


def _near(number: float, target: float, tolerance: float) -> bool:
    return abs(number - target) <= tolerance * abs(target)
