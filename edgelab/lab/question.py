"""What is asked of one row. Equal questions have equal answers, so a row that answers one is not measured again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from edgelab import assets, corpora, ledger, recipes, reference
from edgelab.deployments.hybrid import priced
from edgelab.errors import EdgeLabError
from edgelab.keys import key
from edgelab.ledger import Row
from edgelab.measure import (
    Asked,
    Measurement,
    chosen,
    energy,
    measurements,
    parity,
    protocols,
    save_measurements,
    saved_measurements,
)
from edgelab.notation import DEFAULT_DEPLOYMENT, split
from edgelab.recipes import Plain, Recipe, reads
from edgelab.reference import Source
from edgelab.storage import cache, stages

NOTHING = Recipe()
IN_TURNS = ("turns", "process")
TIMED = (*IN_TURNS, "deployment")  # needs of what depends on the machine and its threads
OUTPUTS = ("logits", "session", "deployment")  # of what reads outputs, and is compared with the baseline
PRICE = "usd_per_1k_requests"


class MeasureError(EdgeLabError):
    """A measurement that failed; its row is in the ledger with the reason."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how, for all recipes of a comparison.

    only: parts joined by commas, such as "quality" or "speed,memory"; None for quality, speed and memory.
    power_w: watts of the device while it decodes, for an estimate where no counter can be read.
    Raises MeasureError for what cannot be.
    """

    model: str = reference.EMBEDDED
    corpus: str = "wiki"
    protocol: str = "edgelab-512"
    windows: int = 32
    seed: int = 0
    threads: int = 2
    prompt_tokens: int = 128
    power_w: float | None = None
    only: str | None = None
    force: bool = False
    timeout_s: float = 3600

    def __post_init__(self) -> None:
        if min(self.windows, self.threads, self.prompt_tokens) < 1:
            raise MeasureError("windows, threads and prompt_tokens are whole numbers from 1 on.")
        if self.power_w is not None and not self.power_w > 0:
            raise MeasureError(
                f"power_w={self.power_w} is not positive; give the watts of the device, such as 5."
            )


@dataclass(frozen=True)
class Question:
    """One row that is asked for: a recipe, a model, settings, and the measurements that `only` comes to.

    beside: timed in turns with the baseline.
    """

    recipe: Recipe | Plain
    source: Source
    settings: Settings
    measurements: tuple[Measurement, ...]
    beside: bool = False

    @cached_property
    def name(self) -> str:
        """The canonical text of the recipe."""
        return str(self.recipe)

    @property
    def runtime(self) -> str:
        """The deployment with its settings, as it is written after the @."""
        return next(iter(split(self.name, "@")[1:]), DEFAULT_DEPLOYMENT)

    @property
    def seed(self) -> int:
        """Nothing is drawn for the reference as it is: one row answers for every seed."""
        return self.settings.seed if self.recipe.techniques else Settings.seed

    @property
    def parts(self) -> set[str]:
        """Parts of the row that are asked for, beside the size of the variant."""
        return {one.part for one in self.measurements} - {"variant"}

    @property
    def is_baseline(self) -> bool:
        return self.name == "none"

    @property
    def gated(self) -> bool:
        """Whether the outputs have to agree with PyTorch's before speed is ranked."""
        return not self.recipe.deployment.in_torch

    @property
    def has_twin(self) -> bool:
        """Whether PyTorch runs the same weights; what an engine rounds itself, nothing else has."""
        return self.gated and self.recipe.family != "native"

    @property
    def timed(self) -> bool:
        return self.recipe.deployment.timed and any(one.needs in TIMED for one in self.measurements)

    @property
    def in_turns(self) -> bool:
        """Whether its session is timed in turns with the baseline's, or alone."""
        return self.timed and any(one.needs in IN_TURNS for one in self.measurements)

    @property
    def outputs(self) -> tuple[Measurement, ...]:
        """The measurements of outputs, and of the variant behind them; none where only the others are asked for."""
        read = any(one.needs in OUTPUTS for one in self.measurements)
        return tuple(one for one in self.measurements if read and one.needs in (*OUTPUTS, "variant"))

    def of(self, need: str) -> list[str]:
        """Names of the measurements that need this."""
        return [one.name for one in self.measurements if one.needs == need and self._is_about(one)]

    @property
    def made_by(self) -> dict[str, Any]:
        """Versions of what decides the numbers, the project's own parts and files that techniques read.

        With another version of one, the question is another.
        """
        deployment = self.recipe.deployment
        technique_versions = [technique.version for technique in self.recipe.techniques]
        found = {"techniques": "+".join(map(str, technique_versions)), "export": deployment.version}
        if self._reads_text:
            found["protocol"] = protocols.protocol(self.settings.protocol).version
        if self.has_twin:
            found["gate"] = parity.VERSION
        read = [name for made in (*self.recipe.techniques, deployment) for name in reads(made)]
        if self._has_price and priced() not in read:
            read.append(priced())
        if read:
            found["reads"] = "+".join(read)
        for one in self.measurements:
            if one.corpus:
                found[f"{one.name} reads"] = corpora.identity(one.corpus)
        return found | {one.name: one.version for one in self.measurements if self._applies(one)}

    @property
    def _reads_text(self) -> bool:
        return any(one.text for one in self.measurements)

    @property
    def _has_price(self) -> bool:
        """Whether a measurement counts with prices, also where its deployment reads none, as an engine alone."""
        return any(PRICE in one.fields for one in self.measurements if self._applies(one))

    def _applies(self, one: Measurement) -> bool:
        return self._is_about(one) and (self.recipe.deployment.timed or one.needs not in TIMED)

    def _is_about(self, one: Measurement) -> bool:
        return one.deployment in ("", self.recipe.deployment.name)

    @property
    def address(self) -> Path:
        """The folder of the variant."""
        return stages.address(self.recipe, self.source, self.seed)

    def identity(self) -> dict[str, Any]:
        """Fields that a row with the answer holds, whatever was measured beside them."""
        fields = {
            "recipe": self.name,
            "model_sha": self.source.sha,
            "seed": self.seed,
            "fast": assets.fast(),
            "versions": ledger.versions(self.recipe.deployment.packages),
        }
        if self._reads_text:
            fields |= {
                "protocol": self.settings.protocol,
                "corpus": corpora.identity(self.settings.corpus),
                "windows": self.settings.windows,
            }
        if self.timed:
            fields["threads"] = self.settings.threads
            fields["host"] = ledger.machine()["host"]
            if "speed" in self.parts:
                fields["prefill_tokens"] = self.settings.prompt_tokens
        return fields

    @cached_property
    def wanted(self) -> tuple[dict[str, Any], list[str]]:
        """What a row must hold to answer this, and which of its fields must not be null."""
        versions = {f"made_by.{name}": version for name, version in self.made_by.items()}
        present = ["decode_ratio"] if self.beside and "speed" in self.parts else []
        present += ["parity"] if self.gated and self.parts.intersection(("quality", "speed")) else []
        return self.identity() | versions | {"status": "ok"}, present

    def covers(self, other: Question) -> bool:
        """Whether the answer to this one answers the other as well."""
        mine, theirs = self.wanted, other.wanted
        return (
            self.name == other.name
            and theirs[0].items() <= mine[0].items()
            and set(theirs[1]) <= set(mine[1])
        )

    @property
    def states(self) -> Path:
        """Where the reference's final hidden states of these windows are kept."""
        rules = protocols.protocol(self.settings.protocol)
        corpus = corpora.identity(self.settings.corpus)
        made_of = (self.source.sha, corpus, rules.name, rules.version, self.settings.windows)
        return cache.place("states") / f"{key('states', *made_of)}.npy"

    def asked(self, baseline: Row | None = None) -> dict[str, Any]:
        """What measurements in another process have to know, as JSON."""
        names = ("corpus", "protocol", "windows", "prompt_tokens", "power_w")
        found = Asked(
            **{name: getattr(self.settings, name) for name in names},
            states=str(self.states) if self._reads_text else "",
            baseline=None if baseline is None else vars(baseline),
        )
        return dataclasses.asdict(found)

    def new_row(self) -> Row:
        """A row that holds the question and where it was asked, and no answer yet."""
        row = Row(
            **self.identity()
            | ledger.provenance(self.settings.threads, self.recipe.deployment.packages)
            | {"family": self.recipe.family, "model": self.source.name, "runtime": self.runtime},
        )
        row.variant, row.made_by = self.address.name, json.dumps(self.made_by)
        return row


def ask(texts: list[str], settings: Settings, interleave: bool) -> list[Question]:
    """A question for each recipe. Raises RecipeError and the like for what cannot be asked."""
    found = _ask(texts, settings, interleave, recipes.parse, measurements())
    for one in found:
        if hasattr(one.recipe.deployment, "check_model"):  # no technique gives a model more layers
            one.recipe.deployment.check_model(reference.load_config(one.source))
    if recipes.saved_catalogue() is None:
        recipes.save_catalogue()
        save_measurements()
    return found


def quick(texts: list[str], settings: Settings, interleave: bool) -> list[Question] | None:
    """As `ask`, from what earlier processes noted of techniques and measurements, without importing any.

    Good for looking up answers alone. None where nothing was noted, or a source file has changed since, or where this
    process has imported techniques itself: what it knows may be newer than any file. None, too, where a technique has
    to look at something outside, such as a file or another model.
    """
    if recipes.TECHNIQUES:
        return None
    catalogue, described = recipes.saved_catalogue(), saved_measurements()
    if catalogue is None or described is None:
        return None
    read = partial(recipes.canonical, known=catalogue)
    found = _ask(texts, settings, interleave, read, described)
    return None if any(_may_read(one.recipe) for one in found) else found


def _may_read(recipe: Plain) -> bool:
    """Whether a technique may have to look at something outside: a file, another model, or our own texts."""
    values = [(name, value) for call in (*recipe.calls, recipe.at) for name, value in call.values.items()]
    nested = any(_may_read(value) for _, value in values if isinstance(value, Plain))
    texts = [(name, value) for name, value in values if isinstance(value, str) and value]
    return nested or any(
        name in ("model", "fleet", "link")
        or corpora.EXTRACTION in value.split("/")
        or assets.find(value) is not None
        for name, value in texts
    )


def _ask(
    texts: list[str],
    settings: Settings,
    interleave: bool,
    read: Callable[[str], Recipe | Plain],
    described: dict[str, Measurement],
) -> list[Question]:
    recipes = [read(text) for text in texts]  # before anything is fetched: a typo is found at once
    protocols.protocol(settings.protocol)
    source, found = reference.resolve(settings.model), []
    for recipe in recipes:
        question = Question(recipe, source, settings, _measured(recipe, settings.only, described))
        beside = interleave and recipe.deployment.timed and not question.is_baseline
        found.append(replace(question, beside=beside))
    return found


def _measured(
    recipe: Recipe | Plain, only: str | None, described: dict[str, Measurement]
) -> tuple[Measurement, ...]:
    """The measurements that `only` comes to for a recipe: a deployment that answers requests has parts of its own."""
    parts, asked = recipe.deployment.parts, chosen(only, described)
    if not parts:
        return tuple(asked)
    if only is None:
        return tuple(chosen(",".join(parts), described))
    return tuple(one for one in asked if one.part in (*parts, "variant"))


def known(questions: list[Question]) -> list[Row | None]:
    """The newest whole answer that the ledger has to each question; None where it has none, or `force` is set."""
    rows = ledger.newest([one.wanted for one in questions])
    return [row if row and _holds(row, one) else None for row, one in zip(rows, questions, strict=True)]


def _holds(row: Row, question: Question) -> bool:
    power_w = question.settings.power_w
    if question.settings.force:
        return False
    wants_energy = power_w and question.timed and "speed" in question.parts
    return not wants_energy or energy.is_of(row.energy_basis, power_w)
