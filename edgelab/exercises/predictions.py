"""Predict, then measure: a guess is kept in the reader's home and drawn over the measurement.

Every question has a file of its own there, which also holds the first guess: a later one knows more.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.plots.guesses import guesses_over

log = logging.getLogger(__name__)

Guess = float | dict[str, float]


class PredictionError(EdgeLabError):
    """A guess or a measurement is no number."""


@dataclass(frozen=True)
class Prediction:
    """What the reader expects, or expected when last asked; a guess of None is none."""

    name: str
    guess: Guess | None
    unit: str = ""
    first: Guess | None = None  # where it was another one
    earlier: bool = False  # kept from an earlier run

    def __repr__(self) -> str:
        if self.guess is None:
            return "No guess yet: put numbers in place of None, or run on without."
        guesses = self.guess if isinstance(self.guess, dict) else {"": self.guess}
        texts = [
            f"{value:,.6g} {self.unit}".strip() + f" for {key}" * bool(key) for key, value in guesses.items()
        ]
        kept = "Kept earlier: you expected" if self.earlier else "Kept: you expect"
        return f"{kept} {', '.join(texts)}."

    def against(self, measured: float | Mapping[str, float | None]) -> Figure:
        """Measured values, with the guesses as markers next to them; without a guess, the values.

        measured: of the same form as the guess: one number, or numbers by name. Raises PredictionError for what is no
        number, or where no number is measured.
        """
        values = _numbers(measured, "measurement")
        if values is None:
            raise PredictionError("There is no measurement to draw: give a number, or numbers by name.")
        guess = self.guess if isinstance(self.guess, dict) == isinstance(values, dict) else None
        if not isinstance(values, dict):
            values, guess = {"": values}, None if guess is None else {"": guess}
        return guesses_over(values, guess or {}, re.sub(r"^\d+\w?\s+", "", self.name), self.unit)


def predict(name: str, guess: float | Mapping[str, float | None] | None, unit: str = "") -> Prediction:
    """Keep a guess, one number or numbers by name; None keeps nothing, and gives an earlier guess if there is one.

    name: the question, such as "02 perplexity by bits". Raises PredictionError for a guess that is no number.
    """
    if not isinstance(name, str) or not name.strip():
        raise PredictionError(f'A prediction needs a name such as "02 perplexity by bits", not {name!r}.')
    given, file = _numbers(guess, "guess"), _file(name)
    kept = _kept(file)
    if given is None:
        return Prediction(name, kept.get("guess"), unit, kept.get("first"), earlier=True)
    first = kept.get("first", given)
    if given != kept.get("guess"):
        try:
            with assets.staged(file) as draft:
                draft.write_text(
                    json.dumps({"name": name, "unit": unit, "first": first, "guess": given}, indent=1)
                )
        except assets.AssetError as error:  # a place that cannot be written is no reason to end a notebook
            log.warning("The guess is not kept: %s", error)
    return Prediction(name, given, unit, first)


def _numbers(given: Any, what: str) -> Guess | None:
    """One finite number, or the numbers of a mapping that are not None; None where there is none."""
    if hasattr(given, "to_dict"):  # a pandas Series
        given = given.to_dict()
    if isinstance(given, Mapping):
        pairs = {str(key): _number(value, what) for key, value in given.items()}
        return {key: value for key, value in pairs.items() if value is not None} or None
    return _number(given, what)


def _number(value: Any, what: str) -> float | None:
    if value is None or value is ...:
        return None
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        number = float(value)
        if not isinstance(value, bool) and math.isfinite(number):
            return number
    example = '24, or {"8 bits": 24, "4 bits": None}' if what == "guess" else "24.1"
    raise PredictionError(f"A {what} is a number such as {example}, not {value!r}.")


def _file(name: str) -> Path:
    readable = re.sub(r"\W+", "-", name.lower()).strip("-")[:60]
    return assets.home() / "predictions" / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def _kept(file: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or none that can be read."""
    with suppress(OSError, ValueError):
        kept = json.loads(file.read_text())
        if isinstance(kept, dict) and {"first", "guess"} <= kept.keys():
            return kept
    return {}
