"""Recipes: techniques in order and where the result runs, and the registries that both enter.

none
quantize.rtn:bits=4,group_size=64
quantize.bf16 + quantize.rtn:bits=4 @ llamacpp

How they are written is in `notation`. Importing this module imports no technique; the first look-up imports them all.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_type_hints

from edgelab import notation, plugins, sources
from edgelab.notation import DEFAULT_DEPLOYMENT, Call, Catalogue, Method, Plain, RecipeError, Setting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FACTS = (
    "version",
    "shown",
    "kept",
    "packages",
    "in_torch",
    "timed",
    "parts",
)  # what a class says of itself in a Method


def _ignore(done: int, total: int) -> None:
    pass


@dataclass
class Record:
    """What a technique leaves behind beside the model: what it cost, and what a reader of the row has to know.

    train_corpus: what it was trained on. teacher_s, teacher_mb: of a teacher whose answers were kept; spared_s: seconds
    of such work that was found done, and that the variant cost all the same. numbers: further fields of the row, by
    name, about the model as the last technique leaves it. curve: points of a training run, {"step", "tokens",
    "seconds", "loss"}.
    """

    calibration_tokens: int | None = None
    train_tokens: int | None = None
    train_corpus: str | None = None
    teacher_s: float | None = None
    teacher_mb: float | None = None
    spared_s: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


class KeptOutputs(Protocol):
    """A teacher's outputs that are read from disk (see `losses.Teacher`).

    seconds: what the teacher took. n_bytes: on disk. known: whether another run had it do so.
    """

    seconds: float
    n_bytes: int
    known: bool

    def __call__(self, ids: Tensor) -> Callable[[slice], Any]: ...


@dataclass
class Context:
    """What a technique may use beside the model: a seed, the tokenizer, a way to report progress, and a record.

    reference: the model before all techniques; nothing may change it. stage: address of the model that the technique is
    given, for keys of what it computes from it; empty where it has none. variant: what a recipe makes of the reference,
    or of the model of that name. outputs: a teacher that has read windows before, and keeps what it made of them at an
    address: states, or so many likeliest tokens at a temperature. Both are None where nothing is kept. A technique that
    changes what tokens there are puts a tokenizer and a reference of those tokens in place of these two, for the
    techniques after it.
    """

    seed: int = 0
    progress: Callable[[int, int], None] = _ignore
    tokenizer: PreTrainedTokenizerBase | None = None
    record: Record = field(default_factory=Record)
    reference: PreTrainedModel | None = None
    stage: str = ""
    variant: Callable[[Recipe, str], PreTrainedModel] | None = None
    outputs: Callable[[PreTrainedModel, Tensor, str, int, float], KeptOutputs] | None = None


class Technique(Protocol):
    """A frozen dataclass of settings with an `apply` that returns a changed copy of the model."""

    method: ClassVar[str]  # "family.method", set by `register`
    version: ClassVar[int]  # raise it when the same settings give other weights
    shown: ClassVar[tuple[str, ...]]  # settings that the canonical text names also at their default
    kept: ClassVar[bool]  # its result is kept on disk, because making it costs: it calibrates or trains

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel: ...


def refuse_adapter(technique: Technique, model: PreTrainedModel) -> None:
    """Raise RecipeError where a technique would change the weights under an adapter, which stay as they are."""
    if getattr(model, "peft_config", None) and not getattr(technique, "takes_adapter", False):
        raise RecipeError(
            f"{technique.method} works on a model without an adapter, and this one has one; put merge before "
            f"{technique.method}, or {technique.method} before the adapter."
        )


def reads(made: Technique | Deployment) -> list[str]:
    """Names of what a technique or deployment reads beside the model: a text, a teacher, a fleet; most read nothing."""
    return list(made.reads()) if hasattr(made, "reads") else []


class Deployment(Protocol):
    """A frozen dataclass of settings that says where a recipe runs.

    Where it has `check_model(config)`, that raises for a model it cannot run with these settings, before work begins.
    """

    name: ClassVar[str]  # set by `deployment`
    version: ClassVar[int]  # raise it when the same variant is exported to something else
    shown: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]  # beside PyTorch, whose versions decide what it does
    in_torch: ClassVar[bool]  # it runs the stored variant itself, and needs no parity gate
    timed: ClassVar[bool]  # its time and memory mean something
    parts: ClassVar[
        tuple[str, ...]
    ]  # of a row, where it answers requests and nothing else can be asked of it


TECHNIQUES: dict[str, type[Technique]] = {}
DEPLOYMENTS: dict[str, type[Deployment]] = {}


def register(
    method: str, version: int = 1, shown: tuple[str, ...] = (), kept: bool | None = None
) -> Callable[[type], type]:
    """Enter a technique under "family.method"; its dataclass fields become the keys of the recipe.

    shown: settings that the canonical text names also where they have their default, for the reader's sake. kept: as
    the class inherits it where this is None. Raises RecipeError where another class has the name already, and for a
    setting that cannot be written in a recipe.
    """

    def enter(technique: type) -> type:
        _enter(TECHNIQUES, method, technique)
        technique.method, technique.version, technique.shown = method, version, shown
        technique.kept = getattr(technique, "kept", False) if kept is None else kept
        return technique

    return enter


def deployment(name: str, version: int = 1, shown: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Enter a deployment under what is written after the @; its dataclass fields become keys. See `register`."""

    def enter(kind: type) -> type:
        _enter(DEPLOYMENTS, name, kind)
        kind.name, kind.version, kind.shown = name, version, shown
        kind.parts = getattr(kind, "parts", ())
        return kind

    return enter


def _enter(registry: dict[str, type], name: str, kind: type) -> None:
    taken = sorted({"name", "method", *_FACTS} & {one.name for one in dataclasses.fields(kind)})
    if taken:
        raise RecipeError(
            f"'{name}' has a setting called {taken[0]}, which says something else; choose another name."
        )
    there = registry.get(name)
    # A class that is defined again, as in a notebook's cell, takes its own place.
    if there and (there.__module__, there.__qualname__) != (kind.__module__, kind.__qualname__):
        raise RecipeError(f"'{name}' is registered already, by {there.__module__}; choose another name.")
    _settings(kind)  # refuses a type that cannot be written
    registry[name] = kind


def techniques() -> dict[str, type[Technique]]:
    """Every technique by name, those of plugins among them."""
    importlib.import_module("edgelab.techniques")
    plugins.load()
    return TECHNIQUES


def deployments() -> dict[str, type[Deployment]]:
    """Every deployment by name, those of plugins among them."""
    importlib.import_module("edgelab.deployments")
    plugins.load()
    return DEPLOYMENTS


def _default_deployment() -> Deployment:
    importlib.import_module("edgelab.deployments.one_device")  # other deployments have recipes as defaults
    return DEPLOYMENTS[DEFAULT_DEPLOYMENT]()


@dataclass(frozen=True)
class Recipe:
    """Techniques in order and where the result runs. `str()` gives the canonical text."""

    techniques: tuple[Technique, ...] = ()
    deployment: Deployment = field(default_factory=_default_deployment)

    def __str__(self) -> str:
        return str(self._plain)

    @property
    def weights(self) -> str:
        """The recipe without its deployment: what names a variant."""
        return self._plain.weights

    @property
    def family(self) -> str:
        """Family of the last technique; "baseline" for none."""
        return self._plain.family

    @property
    def runtime(self) -> str:
        """Name of the deployment."""
        return self.deployment.name

    def on(self, deployment: str) -> Recipe:
        """The same techniques on another deployment, written as after the @."""
        return dataclasses.replace(self, deployment=parse(f"none @ {deployment}").deployment)

    def prefix(self, count: int) -> Recipe:
        """The first `count` techniques, on torch."""
        return Recipe(self.techniques[:count])

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """What the techniques make of a model, one after the other; the model itself stays as it is."""
        for technique in self.techniques:
            refuse_adapter(technique, model)
            model = technique.apply(model, context)
        return model

    @property
    def _plain(self) -> Plain:
        return Plain(tuple(map(_call_of, self.techniques)), _call_of(self.deployment))


def parse(text: str) -> Recipe:
    """Read a recipe. Raises RecipeError with the nearest valid names for an unknown technique, deployment or key."""
    return _build(notation.read(text, _REGISTERED))


def _build(plain: Plain) -> Recipe:
    def construct(call: Call, registry: dict[str, type]) -> Any:
        values = {
            name: _build(value) if isinstance(value, Plain) else value for name, value in call.values.items()
        }
        return registry[call.method.name](**values)

    return Recipe(
        tuple(construct(call, TECHNIQUES) for call in plain.calls), construct(plain.at, DEPLOYMENTS)
    )


def _call_of(made: Technique | Deployment) -> Call:
    method = describe(type(made))
    return Call(method, {one.name: getattr(made, one.name) for one in method.settings})


# Descriptions


def describe(kind: type) -> Method:
    """The description of a registered class, in plain values."""
    return _described(kind, tuple((fact, getattr(kind, fact)) for fact in _FACTS if hasattr(kind, fact)))


@functools.cache
def _described(kind: type, facts: tuple[tuple[str, Any], ...]) -> Method:
    name = getattr(kind, "method", None) or kind.name
    what = (kind.__doc__ or "").strip().partition("\n")[0]
    return Method(name=name, settings=_settings(kind), what=what, **dict(facts))


def _settings(kind: type) -> tuple[Setting, ...]:
    hints, found = get_type_hints(kind), []
    fields = [one for one in dataclasses.fields(kind) if one.init]
    meanings = _meanings(kind, [one.name for one in fields])
    for one in fields:
        wanted, optional, options = hints[one.name], False, ()
        if typing.get_origin(wanted) in (typing.Union, types.UnionType):
            rest = [part for part in typing.get_args(wanted) if part is not types.NoneType]
            optional, wanted = len(rest) == 1, rest[0] if len(rest) == 1 else wanted
        if typing.get_origin(wanted) is typing.Literal:
            options = typing.get_args(wanted)
        known = {int: "int", float: "float", bool: "bool", str: "str", Recipe: "recipe"}
        if not options and wanted not in known:
            raise RecipeError(
                f"{kind.__name__}.{one.name} has the type {wanted}; a setting is an int, float, bool, str, Literal "
                "or Recipe, or one of these or None."
            )
        meaning = meanings.get(one.name, "")
        setting = Setting(one.name, "choice" if options else known[wanted], None, options, optional, meaning)
        default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
        if default is not dataclasses.MISSING:
            setting = dataclasses.replace(setting, default=setting.print(default))
        found.append(setting)
    return tuple(found)


def _meanings(kind: type, names: list[str]) -> dict[str, str]:
    """What docstrings say of settings, as in "bits: 2 to 8. group_size: inputs that share a scale."."""
    found: dict[str, str] = {}
    start = re.compile(rf"(?:^|(?<=\s))({'|'.join(map(re.escape, names)) or '$.'}):\s")
    for one in kind.__mro__:
        for paragraph in re.split(r"\n\s*\n", one.__doc__ or ""):
            _, *pieces = start.split(" ".join(paragraph.split()))
            for name, meaning in zip(pieces[::2], pieces[1::2], strict=True):
                found.setdefault(name, re.split(r"\.\s", meaning)[0].rstrip(" .;"))
    return found


class _Described(Mapping[str, Method]):
    """The descriptions of a registry, which is filled when a name is not in it."""

    def __init__(self, registry: dict[str, type], filled: Callable[[], dict[str, type]]) -> None:
        self.registry, self.filled = registry, filled

    def __getitem__(self, name: str) -> Method:
        return describe(self.registry[name] if name in self.registry else self.filled()[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.filled())

    def __len__(self) -> int:
        return len(self.filled())


_REGISTERED = Catalogue(_Described(TECHNIQUES, techniques), _Described(DEPLOYMENTS, deployments))


def catalogue() -> Catalogue:
    """The descriptions of every technique and deployment."""
    return Catalogue(*(dict(methods) for methods in _REGISTERED))


def saved_catalogue() -> Catalogue | None:
    """The catalogue that an earlier process kept, or None where a source file has changed since."""
    saved = sources.recall("recipes")
    if saved is None:
        return None
    return Catalogue(
        *({name: _method(one) for name, one in saved[kind].items()} for kind in Catalogue._fields)
    )


def save_catalogue() -> None:
    """Keep the catalogue for processes to come."""
    sources.keep(
        "recipes",
        {
            kind: {name: dataclasses.asdict(one) for name, one in found.items()}
            for kind, found in catalogue()._asdict().items()
        },
    )


def canonical(text: str, known: Catalogue) -> Plain:
    """A recipe as `parse` reads it, without constructing its techniques: they may refuse, or settle on other values."""
    return notation.read(text, known)


def _method(saved: dict[str, Any]) -> Method:
    settings = (Setting(**one | {"options": tuple(one["options"])}) for one in saved["settings"])
    lists = {name: tuple(saved[name]) for name in ("shown", "packages", "parts")}
    return Method(**saved | lists | {"settings": tuple(settings)})
