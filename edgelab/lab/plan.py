"""From questions to what has to be done: rows to make, prerequisites first, each once.

A row has to wait for the baseline that it is compared with, and a recipe for the stages that are kept. What the ledger
or the cache has already is in the plan, too, as known.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from edgelab import ledger
from edgelab.lab.question import NOTHING, Question, known
from edgelab.ledger import Row
from edgelab.measure import protocols
from edgelab.recipes import Plain, Recipe
from edgelab.storage import stages

SECONDS = {
    "quality": 1 / 900,
    "tasks": 70.0,
    "speed": 4.0,
    "memory": 1.0,
    "requests": 240.0,
}  # quality: of each token
MAKING_S = {False: 3.0, True: 90.0}  # a technique whose stage is kept, or not, where no row says more


@dataclass
class Step:
    """One thing to do, or one that is known. stage: how many techniques of the recipe to apply, for a stage alone.

    place: of the row among those that the reader asked for, None where it is only needed for one of them.
    estimate_s: seconds it is likely to take.
    """

    question: Question
    stage: int | None = None
    row: Row | None = None
    place: int | None = None
    estimate_s: float = 0.0

    @property
    def is_known(self) -> bool:
        return self.row is not None or (self.stage is not None and stages.is_whole(self.folder))

    @property
    def recipe(self) -> Recipe:
        return self.question.recipe if self.stage is None else self.question.recipe.prefix(self.stage)

    @property
    def folder(self) -> Path:
        """Of the variant."""
        return stages.address(self.recipe, self.question.source, self.question.seed)

    def described(self) -> dict[str, object]:
        """As a row of the table that --dry-run prints."""
        parts = ", ".join(sorted(self.question.parts)) if self.stage is None else ""
        return {
            "step": "row" if self.stage is None else "stage",
            "recipe": str(self.recipe),
            "measures": parts,
            "for": "what follows" if self.place is None else "you",
            "state": "known" if self.is_known else "to do",
            "seconds": 0 if self.is_known else round(self.estimate_s),
        }


def plan(questions: list[Question]) -> list[Step]:
    """Steps in the order in which they have to be done."""
    answers = dict(zip(map(id, questions), known(questions), strict=True))
    seconds = _Seconds()
    steps: list[Step] = []
    rows: dict[str, list[Step]] = {}  # of a recipe, among the steps
    asked_of: dict[str, list[Question]] = {}
    for question in questions:
        asked_of.setdefault(question.name, []).append(question)

    def add(question: Question, place: int | None) -> None:
        row = answers[id(question)] if id(question) in answers else known([question])[0]
        lost = (
            place is None
            and question.is_baseline
            and "quality" in question.parts
            and not question.states.exists()
        )
        row = None if lost else row  # divergence needs the reference's hidden states, too
        for step in rows.get(question.name, ()):
            if step.question.covers(question):
                step.place = place if step.place is None else step.place
                step.row = None if lost else step.row
                return
        if row is None:
            for needed in prerequisites(question):
                # A row that is asked for anyway serves as well, and is then made first.
                wider = next((one for one in asked_of.get(needed.name, ()) if one.covers(needed)), needed)
                add(wider, None)
            for recipe in (*inside(question.recipe), question.recipe):
                for before, stage in pairwise((0, *stages.kept_stages(recipe))):
                    add_stage(replace(question, recipe=recipe), before, stage)
        steps.append(Step(question, None, row, place, 0.0 if row else seconds.of(question)))
        rows.setdefault(question.name, []).append(steps[-1])

    def add_stage(question: Question, before: int, stage: int) -> None:
        whole, known = (seconds.making(question.recipe.prefix(done)) for done in (stage, before))
        step = Step(question, stage, estimate_s=max(whole - known, 0.0))
        if all(other.stage is None or other.folder != step.folder for other in steps):
            steps.append(step)

    for place, question in enumerate(questions):
        add(question, place)
    return steps


def prerequisites(question: Question) -> Iterable[Question]:
    """Questions whose rows this one's is compared with."""
    if question.outputs and not question.is_baseline:
        here = replace(question.settings, force=False)
        yield Question(NOTHING, question.source, here, question.outputs)


def inside(recipe: Recipe | Plain) -> Iterable[Recipe]:
    """Recipes among the settings of a technique or of the deployment, made of the same model: a teacher, a cloud."""
    for made in (*recipe.techniques, recipe.deployment):
        for setting in fields(made):
            value = getattr(made, setting.name)
            if isinstance(value, Recipe) and not getattr(made, "model", ""):
                yield value


class _Seconds:
    """Estimates of time from rows that were measured before, the reader's and the project's."""

    @cached_property
    def made(self) -> dict[str, list[float]]:
        """Seconds of making the weights of a recipe."""
        found: dict[str, list[float]] = {}
        for row in (*ledger.reference(), *ledger.own(last=500)):
            if row.apply_s is not None:
                found.setdefault(row.recipe.partition(" @ ")[0], []).append(row.apply_s)
        return found

    def making(self, recipe: Recipe) -> float:
        if recipe.weights in self.made:
            return statistics.median(self.made[recipe.weights])
        by_clock = [60 * getattr(technique, "minutes", 0.0) for technique in recipe.techniques]
        usual = [MAKING_S[technique.kept] for technique in recipe.techniques]
        return sum(minutes or other for minutes, other in zip(by_clock, usual, strict=True))

    def of(self, question: Question) -> float:
        tokens = question.settings.windows * protocols.protocol(question.settings.protocol).window
        each = SECONDS | {"quality": SECONDS["quality"] * tokens}
        return sum(each.get(part, 10.0) for part in question.parts)
