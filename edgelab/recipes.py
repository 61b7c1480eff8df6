"""Recipes: one notation for techniques in order and a runtime, and the registry that techniques enter.

none
quantize.rtn:bits=4,group_size=64
quantize.bf16 + quantize.rtn:bits=4 @ torch
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, get_type_hints

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edgelab.errors import EdgeLabError

DEFAULT_RUNTIME = "torch"


class RecipeError(EdgeLabError):
    """A recipe that cannot be read, or settings that a technique cannot work with."""


def _ignore(done: int, total: int) -> None:
    pass


@dataclass
class Record:
    """What a technique leaves behind beside the model: what it cost, and what a reader of the row has to know.

    curve: points of a training run, {"step", "tokens", "seconds", "loss"}.
    """

    calibration_tokens: int | None = None
    train_tokens: int | None = None
    notes: list[str] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Context:
    """What a technique may use beside the model: a seed, the tokenizer, a way to report progress, and a record."""

    seed: int = 0
    progress: Callable[[int, int], None] = _ignore
    tokenizer: PreTrainedTokenizerBase | None = None
    record: Record = field(default_factory=Record)
    reference: PreTrainedModel | None = None  # the model before all techniques; nothing may change it


class Technique(Protocol):
    """A frozen dataclass of settings with an `apply` that returns a changed copy of the model."""

    method: ClassVar[str]  # "family.method", set by `register`
    version: ClassVar[int]  # raise it when the same settings give other weights
    shown: ClassVar[tuple[str, ...]]  # settings that the canonical text names also at their default

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel: ...


TECHNIQUES: dict[str, type[Technique]] = {}


def register(method: str, version: int = 1, shown: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Enter a technique under "family.method"; its dataclass fields become the keys of the recipe.

    shown: settings that the canonical text names also where they have their default, for the reader's sake.
    """

    def enter(technique: type) -> type:
        technique.method, technique.version, technique.shown = method, version, shown
        TECHNIQUES[method] = technique
        return technique

    return enter


@dataclass(frozen=True)
class Recipe:
    """Techniques in order and the runtime that executes the result. `str()` gives the canonical text."""

    techniques: tuple[Technique, ...] = ()
    runtime: str = DEFAULT_RUNTIME

    def __str__(self) -> str:
        text = self.weights
        return text if self.runtime == DEFAULT_RUNTIME else f"{text} @ {self.runtime}"

    @property
    def weights(self) -> str:
        """The recipe without its runtime: what names a variant."""
        return " + ".join(map(_print_technique, self.techniques)) or "none"

    @property
    def family(self) -> str:
        """Family of the last technique; "baseline" for none."""
        return self.techniques[-1].method.partition(".")[0] if self.techniques else "baseline"


def parse(text: str, runtimes: Iterable[str] = ()) -> Recipe:
    """Read a recipe. Raises RecipeError with the nearest valid names for an unknown family, method, key or runtime.

    runtimes: valid names after the @ sign; any name where empty.
    """
    body, _, runtime = (part.strip() for part in text.partition("@"))
    if "@" in text and not runtime:
        raise RecipeError(f"The recipe '{text}' names no runtime after '@'.")
    if runtime and runtimes and runtime not in runtimes:
        raise RecipeError(f"Unknown runtime '{runtime}'; {_nearest(runtime, runtimes)}.")
    parts = [part.strip() for part in re.split(r"(?<!\de)\+", body)]  # the plus of 1e+20 joins nothing
    if not all(parts):
        raise RecipeError(
            f"The recipe '{text}' has an empty part; write 'none' or 'family.method:key=value'."
        )
    techniques = () if parts == ["none"] else tuple(map(_parse_technique, parts))
    return Recipe(techniques, runtime or DEFAULT_RUNTIME)


def _parse_technique(text: str) -> Technique:
    method, _, settings = (part.strip() for part in text.partition(":"))
    if method == "none":
        raise RecipeError("'none' stands alone: it is the reference without any technique.")
    if method not in TECHNIQUES:
        raise RecipeError(f"Unknown technique '{method}'; {_nearest(method, ['none', *TECHNIQUES])}.")
    kind = TECHNIQUES[method]
    types = get_type_hints(kind)
    keys = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for pair in filter(None, re.split(r"\s*,\s*", settings)):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key not in keys:
            known = _nearest(key, keys) if keys else "it has no settings"
            raise RecipeError(f"Unknown key '{key}' for {method}; {known}.")
        if not equals or key in values:
            raise RecipeError(f"'{pair}' in {method} should be {key}=value, once.")
        values[key] = _read_value(value, types[key], f"{method}:{key}")
    try:
        return kind(**values)
    except TypeError:
        missing = [
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.name not in values
        ]
        raise RecipeError(f"{method} needs {', '.join(missing)}.") from None


def _read_value(text: str, kind: type, name: str) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        options = typing.get_args(kind)
        if text in options:
            return text
        raise RecipeError(f"{name} is one of {', '.join(options)}, not '{text}'.")
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise RecipeError(f"{name} is true or false, not '{text}'.")
    try:
        return kind(text)
    except ValueError:
        wanted = {int: "a whole number", float: "a number"}[kind]
        raise RecipeError(f"{name} is {wanted}, not '{text}'.") from None


def _print_technique(technique: Technique) -> str:
    # What is always named stands first, whatever class it is declared in.
    fields = sorted(dataclasses.fields(technique), key=lambda f: f.name not in technique.shown)
    settings = [
        f"{f.name}={_print_value(getattr(technique, f.name))}"
        for f in fields
        if f.name in technique.shown or getattr(technique, f.name) != f.default
    ]
    return technique.method + (":" + ",".join(settings) if settings else "")


def _print_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nearest(name: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.4) or valid
    return "did you mean " + " or ".join(close) if len(close) <= 3 else "valid are " + ", ".join(close)
