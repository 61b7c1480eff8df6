"""Measurements: one file a quantity, which says what it needs and which fields of a row it fills.

| needs | is called with | and returns |
| --- | --- | --- |
| variant | a Subject, before anything is loaded | values of its fields |
| logits | a Subject | a Total, which takes the logits of the scored positions slice by slice, or None |
| session | a Subject, whose session is loaded | values of its fields |
| turns | two Runners, the second None where nothing is compared, and a callback for progress | values of its fields |
| process | a Subject, after the turns in its process | values of its fields |
| deployment | a Subject, whose deployment answers requests, in a process of its own | values of its fields |

All measurements of the same need share one process and, where they need logits, one pass over the text.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgelab import plugins, sources
from edgelab.errors import EdgeLabError
from edgelab.ledger.row import FIELDS, Field, UndeclaredField, declare

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from edgelab.corpora import TokenizedText
    from edgelab.deployments.hybrid.answering import Answering
    from edgelab.measure.energy import Meter
    from edgelab.measure.perplexity import Slice, Window
    from edgelab.measure.protocols import Protocol as Rules
    from edgelab.reference import Source
    from edgelab.runtimes import Export
    from edgelab.runtimes.session import Session
    from edgelab.storage.description import Description

Need = Literal["variant", "logits", "session", "turns", "process", "deployment"]
PARTS = ("quality", "speed", "memory")  # measured unless `only` names others
INSIDE = ("metrics",)  # modules of this folder that enter nothing and cost much to import


class UnknownMeasurement(EdgeLabError):
    """`only` names something that nothing measures."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a measurement, as far as it matters to one. baseline: the baseline's row by field, or None
    where this is the baseline. states: where the reference's hidden states are kept.
    """

    corpus: str = "wiki"
    protocol: str = "edgelab-512"
    windows: int = 32
    prompt_tokens: int = 128
    power_w: float | None = None
    states: str = ""
    baseline: dict[str, Any] | None = None


class Subject(Protocol):
    """One variant in a process of its own: what measurements look at."""

    asked: Asked
    source: Source
    tokenizer: PreTrainedTokenizerBase  # of the variant
    folder: Path  # of the variant
    about: dict  # its `variant.json`
    description: Description
    export: Export | None  # what an engine loads; None in PyTorch
    cache_bytes: float  # of one key or value as the deployment keeps it
    session: Session  # loaded when first used
    service: Answering  # the whole deployment, started when first used
    text: TokenizedText  # of `asked.corpus`
    rules: Rules  # the protocol
    cut: list[Window]  # the windows of the text
    reference_cut: list[
        Window
    ]  # the same in the reference's tokens: another list where the variant has its own
    nothing_mb: float  # peak memory of the process before it loaded anything
    meter: Meter  # energy of all turns
    tokens: int  # decoded in all turns

    def report(self, done: int, total: int) -> None:
        """Say how far a measurement has come."""


class Runner(Protocol):
    """One side of timings that take turns: times in ms."""

    def prefill(self) -> float:
        """To the first token of the prompt; a new sequence starts."""

    def decode(self, tokens: int) -> list[float]:
        """Of each of the next tokens of the sequence."""


class Total(Protocol):
    """What adds up slices of logits."""

    def add(self, piece: Slice) -> None: ...

    def values(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Measurement:
    """A quantity: its name, the part of a row it belongs to (what `only` names), what it needs, the fields it fills.

    version: raise it when the same model gives other numbers. text: whether it reads the text of the question, so that
    another text, protocol or number of windows is another question. corpus: a text of its own, where its content may
    change and would make another question, too. deployment: the only one that it is about, empty for all.
    """

    name: str
    part: str
    needs: Need
    fields: tuple[str, ...]
    version: int
    text: bool
    run: Callable[..., Any] | None
    corpus: str = ""
    deployment: str = ""


MEASUREMENTS: dict[str, Measurement] = {}


def measurement(
    name: str,
    *,
    part: str,
    needs: Need,
    fields: tuple[str, ...] | dict[str, Field],
    version: int = 1,
    text: bool | None = None,
    corpus: str = "",
    deployment: str = "",
) -> Callable[[Callable], Callable]:
    """Enter a function as a measurement. Raises UndeclaredField for a field that nobody declares.

    fields: names of fields of Row; one that is no part of edgelab gives a dictionary of names and declarations. text:
    as it needs logits, where left out. corpus: a text of its own, if it reads one that may change. deployment: the only
    one that it is about.
    """
    reads = needs == "logits" if text is None else text
    if isinstance(fields, dict):
        declare(fields)
    elif unknown := [field for field in fields if field not in FIELDS]:
        raise UndeclaredField(
            f"The measurement '{name}' fills '{unknown[0]}', which ledger/row.py does not declare."
        )

    def enter(run: Callable) -> Callable:
        MEASUREMENTS[name] = Measurement(
            name, part, needs, tuple(fields), version, reads, run, corpus, deployment
        )
        return run

    return enter


def measurements() -> dict[str, Measurement]:
    """Every measurement by name, those of strangers among them."""
    for module in pkgutil.iter_modules(__path__):
        if module.name not in INSIDE:
            importlib.import_module(f"{__name__}.{module.name}")
    plugins.load()
    return dict(sorted(MEASUREMENTS.items()))  # in one order, whichever module was imported first


def saved_measurements() -> dict[str, Measurement] | None:
    """Their descriptions without the functions, as an earlier process kept them; None where a source has changed."""
    saved = sources.recall("measurements")
    if saved is None:
        return None
    return {one["name"]: Measurement(**one | {"fields": tuple(one["fields"])}, run=None) for one in saved}


def save_measurements() -> None:
    """Keep the descriptions for processes to come."""
    described = [{**vars(one)} for one in measurements().values()]
    for one in described:
        del one["run"]
    sources.keep("measurements", described)


def chosen(only: str | None, known: dict[str, Measurement] | None = None) -> list[Measurement]:
    """The measurements of the parts that `only` names, joined by commas; of PARTS where it names none.

    What needs the variant alone is always among them. known: where they are looked up, all there are by default.
    Raises UnknownMeasurement naming the parts there are.
    """
    known = measurements() if known is None else known
    parts = {one.part for one in known.values()} - {"variant"}
    asked = PARTS if only is None else tuple(part.strip() for part in only.split(","))
    if unknown := [part for part in asked if part not in parts]:
        raise UnknownMeasurement(f"only={unknown[0]} is none of {', '.join(sorted(parts))}.")
    return [one for one in known.values() if one.part in (*asked, "variant")]
