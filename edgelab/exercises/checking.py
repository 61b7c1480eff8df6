"""Checked exercises of the notebooks: `check(name, answer)` says whether an answer is right, or gives a hint.

An exercise is a question, the right number, and the numbers that usual mistakes lead to, each with its hint; or a
function that the reader writes, compared with ours on a small tensor (`coding`). One decorator registers the function
that makes it, so that no answer is written down as a bare number.
"""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from edgelab.errors import EdgeLabError
from edgelab.exercises.coding import CodeExercise, compared


@dataclass(frozen=True)
class Exercise:
    """A number is asked for; `mistakes` pair wrong answers with their hints.

    A float is matched within the relative `tolerance`, an int by itself alone: where the answer is a whole number, give
    an int. An answer that is near to several numbers counts as the nearest of them.
    """

    answer: float
    why: str  # shown with the right answer
    hint: str  # for answers that no mistake explains
    mistakes: list[tuple[float, str]] = field(default_factory=list)
    tolerance: float = 0.02


@dataclass(frozen=True)
class Verdict:
    """What `check` found, shown as its sentence; of a function also its result next to the expected one."""

    right: bool
    text: str
    drawing: str = ""  # HTML

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.text)}</p>{self.drawing}"


EXERCISES: dict[str, Callable[[], Any]] = {}


class UnknownExercise(EdgeLabError):
    """No exercise has that name."""


def exercise(make: Callable[[], Any]) -> Callable[[], Any]:
    """Register a function that makes an Exercise or a CodeExercise, under the function's name."""
    EXERCISES[make.__name__] = make
    return make


def check(name: str, answer: Any) -> Verdict:
    """Right and why, or a hint that fits the mistake. Before a first try there is no hint.

    answer: a number, or a function where the exercise asks for one.
    Raises UnknownExercise, naming the exercises, where there is none called `name`.
    """
    if name not in EXERCISES:
        raise UnknownExercise(f"No exercise is called {name!r}; there are {', '.join(sorted(EXERCISES))}.")
    if answer is None or answer is ...:
        return Verdict(False, "Replace None by your answer.")
    asked = EXERCISES[name]()
    if isinstance(asked, CodeExercise):
        return Verdict(*compared(asked, answer))
    number = _number(answer)
    if number is None:
        given = repr(answer) if isinstance(answer, str | bool | float) else f"a {type(answer).__name__}"
        return Verdict(False, f"A number is needed, not {given}.")
    return _judged(asked, number)


def _number(answer: Any) -> float | None:
    """The finite number that an answer is; "20" is one, True is none."""
    try:
        number = float(answer)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # torch says RuntimeError of several numbers
        return None
    return None if isinstance(answer, bool) or not math.isfinite(number) else number


def _judged(asked: Exercise, number: float) -> Verdict:
    known = [(asked.answer, None), *asked.mistakes]
    near = [(target, hint) for target, hint in known if _matches(number, target, asked.tolerance)]
    if near:
        _, hint = min(near, key=lambda pair: abs(number - pair[0]))
        if hint is None:
            return Verdict(True, f"Right: {_written(asked.answer)}. {asked.why}")
        return Verdict(False, f"Not yet: {hint}")
    if isinstance(asked.answer, Integral) and not number.is_integer():
        return Verdict(False, f"Not yet: {_written(number)} is no whole number, and the answer is one.")
    direction = "too large" if number > asked.answer else "too small"
    return Verdict(False, f"Not yet, {_written(number)} is {direction}. {asked.hint}")


def _matches(number: float, target: float, tolerance: float) -> bool:
    if isinstance(target, Integral):
        return math.isclose(number, target, rel_tol=1e-12)  # 3599.9999999999995 is how a float says 3600
    return abs(number - target) <= tolerance * abs(target)


def _written(number: float) -> str:
    """Four digits, and of whole numbers all."""
    return f"{number:,.0f}" if float(number).is_integer() and abs(number) < 1e15 else f"{number:,.4g}"
