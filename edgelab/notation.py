"""The notation of recipes: text to names with settings, and back. It works on descriptions, so it imports no technique.

recipe    none, or calls joined by +, and one more call after @
call      name, or name:key=value,key=value
value     4   0.5   true   wiki   none   "a, b"   (another recipe)

Separators inside quotes and parentheses separate nothing. In quotes, write \\" for a quote and \\\\ for a backslash.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from edgelab.errors import EdgeLabError

DEFAULT_DEPLOYMENT = "torch"
# behind others, which a recipe is about
ADDITIONS = ("recover", "merge", "prune.store", "quantize.embedding")
SIBLINGS = {"qlora": "lora"}  # families that are one
Kind = Literal["int", "float", "bool", "str", "choice", "recipe"]

_QUOTED = r'"(?:\\.|[^"\\])*"'
_MARKS = re.compile(_QUOTED + r'|\d[eE]\+\d|[+@,()"]', re.DOTALL)  # the plus of 1e+20 joins nothing
_WHOLE = re.compile(_QUOTED, re.DOTALL)
_SPECIAL = re.compile(r'[+@,()"=]')


class RecipeError(EdgeLabError):
    """A recipe that cannot be read, or settings that a technique cannot work with."""


@dataclass(frozen=True)
class Setting:
    """One setting. default: as it is printed, None where it has to be given. optional: it may be none."""

    name: str
    kind: Kind
    default: str | None
    options: tuple[Any, ...] = ()  # of a choice
    optional: bool = False
    meaning: str = ""

    def print(self, value: Any) -> str:
        """The one text of a value; `read` gives the value back."""
        if value is None:
            return "none"
        if self.kind == "recipe":
            return f"({value})"
        if self.kind == "float" and self.default is not None:
            # A whole number is written as the default is: 4, or 4.0 where that is 0.5.
            whole = self.default.isdigit() and float(value).is_integer()
            value = int(value) if whole else float(value)
        text = _plain(value)
        if not isinstance(value, str):
            return text
        special = text != text.strip() or not text or _SPECIAL.search(text)
        return _quote(text) if special or (self.optional and text == "none") else text

    def read(self, text: str, owner: str, recipe: Callable[[str], Any]) -> Any:
        """The value of a text. recipe: reads what is in parentheses. Raises RecipeError with what would be right."""
        name = f"{owner}:{self.name}"
        if self.optional and text == "none":
            return None
        if self.kind == "recipe":
            if not (text.startswith("(") and text.endswith(")")):
                raise RecipeError(f"{name} is a recipe in parentheses, such as (none), not '{text}'.")
            return recipe(text[1:-1])
        said, text = text, _unquote(text, name)
        if self.kind == "str":
            return text
        if self.kind == "choice":
            for option in self.options:
                if _plain(option) == text:
                    return option
            raise RecipeError(f"{name} is one of {', '.join(map(_plain, self.options))}, not '{said}'.")
        if self.kind == "bool":
            if text.lower() in ("true", "false"):
                return text.lower() == "true"
            raise RecipeError(f"{name} is true or false, not '{said}'.")
        try:
            value = int(text) if self.kind == "int" else float(text)
            if self.kind == "int" or math.isfinite(value):
                return value
            raise ValueError
        except ValueError:
            wanted = "a whole number" if self.kind == "int" else "a number"
            raise RecipeError(f"{name} is {wanted}, not '{said}'.") from None


@dataclass(frozen=True)
class Method:
    """A registered technique or deployment in plain values, which JSON can hold. The fields are those of its class."""

    name: str
    version: int
    shown: tuple[str, ...]
    settings: tuple[Setting, ...]
    what: str = ""  # first line of its docstring
    kept: bool = False  # a technique
    packages: tuple[str, ...] = ()  # a deployment, and so the next three
    in_torch: bool = False
    timed: bool = True
    parts: tuple[str, ...] = ()


class Catalogue(NamedTuple):
    """Methods by name."""

    techniques: Mapping[str, Method]
    deployments: Mapping[str, Method]


@dataclass(frozen=True)
class Call:
    """A technique or a deployment with values for all or some of its settings. Its text names what is not default."""

    method: Method
    values: Mapping[str, Any]

    def __str__(self) -> str:
        # What is always named stands first, whatever class it is declared in.
        settings = sorted(self.method.settings, key=lambda one: one.name not in self.method.shown)
        pairs = []
        for one in settings:
            text = one.print(self.values[one.name]) if one.name in self.values else one.default
            if one.name in self.method.shown or text != one.default:
                pairs.append(f"{one.name}={text}")
        return self.method.name + (":" + ",".join(pairs) if pairs else "")


@dataclass(frozen=True)
class Plain:
    """A recipe of descriptions instead of techniques, with the attributes of Recipe that a row is asked for by."""

    calls: tuple[Call, ...]
    at: Call

    def __str__(self) -> str:
        at = str(self.at)
        return self.weights if at == DEFAULT_DEPLOYMENT else f"{self.weights} @ {at}"

    @property
    def weights(self) -> str:
        """The techniques alone: what names a variant."""
        return " + ".join(map(str, self.calls)) or "none"

    @property
    def family(self) -> str:
        """Family of the last technique that a recipe is about; "baseline" for none."""
        names = [call.method.name for call in self.calls]
        while len(names) > 1 and names[-1] in ADDITIONS:
            names.pop()
        family = names[-1].partition(".")[0] if names else "baseline"
        return SIBLINGS.get(family, family)

    @property
    def runtime(self) -> str:
        """Name of the deployment."""
        return self.at.method.name

    @property
    def techniques(self) -> tuple[Method, ...]:
        return tuple(call.method for call in self.calls)

    @property
    def deployment(self) -> Method:
        return self.at.method


def read(text: str, known: Catalogue) -> Plain:
    """Read a recipe. Raises RecipeError with the nearest valid names for an unknown technique, deployment or key."""
    body, *after = split(text, "@")
    if len(after) > 1:
        raise RecipeError(
            f"The recipe '{text}' has more than one '@'; one deployment follows the techniques."
        )
    if after == [""]:
        raise RecipeError(f"The recipe '{text}' names no deployment after '@'.")
    parts = split(body, "+")
    if not all(parts):
        raise RecipeError(
            f"The recipe '{text}' has an empty part; write 'none' or 'family.method:key=value'."
        )
    written = [] if parts == ["none"] else [new for part in parts for new in _renamed(*_pairs(part))]
    calls = tuple(_call(name, pairs, "technique", known.techniques, known) for name, pairs in written)
    at = _pairs(after[0] if after else DEFAULT_DEPLOYMENT)
    return Plain(calls, _call(*at, "deployment", known.deployments, known))


def split(text: str, separator: str) -> list[str]:
    """The parts between separators outside parentheses and quotes, without spaces around them.

    separator: one of + @ and the comma. Raises RecipeError for a parenthesis or a quote without its other half.
    """
    parts, start, depth = [], 0, 0
    for mark in _MARKS.finditer(text):
        found = mark.group()
        depth += (found == "(") - (found == ")")
        if found == '"':
            raise RecipeError(f"A quote in '{text}' is never closed.")
        if depth < 0:
            raise RecipeError(f"A ')' in '{text}' closes nothing.")
        if found == separator and not depth:
            parts.append(text[start : mark.start()].strip())
            start = mark.end()
    if depth:
        raise RecipeError(f"A '(' in '{text}' is never closed.")
    return [*parts, text[start:].strip()]


def _pairs(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The name of a call, and its keys with their values; a value is empty where the key has none."""
    name, _, settings = (part.strip() for part in text.partition(":"))
    pairs = [pair.partition("=") for pair in split(settings, ",") if pair]
    return name, [(key.strip(), equals + value.strip()) for key, equals, value in pairs]


def _call(
    name: str, pairs: list[tuple[str, str]], what: str, methods: Mapping[str, Method], known: Catalogue
) -> Call:
    if name == "none" and what == "technique":
        raise RecipeError("'none' stands alone: it is the reference without any technique.")
    method = methods.get(name)
    if method is None:
        raise RecipeError(_unknown(name, what, methods))
    settings = {one.name: one for one in method.settings}
    values: dict[str, Any] = {}
    for key, text in pairs:
        if key not in settings:
            near = nearest(key, settings) if settings else "it has no settings"
            raise RecipeError(f"Unknown key '{key}' for {name}; {near}.")
        if not text or key in values:
            raise RecipeError(f"'{key}{text}' in {name} should be {key}=value, once.")
        values[key] = settings[key].read(text[1:].strip(), name, lambda inner: read(inner, known))
    if missing := [key for key, one in settings.items() if one.default is None and key not in values]:
        raise RecipeError(f"{name} needs {', '.join(missing)}.")
    return Call(method, values)


def _unknown(name: str, what: str, methods: Mapping[str, Method]) -> str:
    if members := [one for one in methods if one.startswith(f"{name}.")]:
        return f"'{name}' is a family of techniques; write one of {', '.join(sorted(members))}."
    none = ["none"] if what == "technique" else []
    return f"Unknown {what} '{name}'; {nearest(name, [*none, *methods])}."


def nearest(name: str, valid: Iterable[str]) -> str:
    """ "did you mean …" with the valid names that are like a wrong one, or all of them."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.4) or valid
    return "did you mean " + " or ".join(close) if len(close) <= 3 else "valid are " + ", ".join(close)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).replace("e+", "e") if isinstance(value, float) else str(value)


def _quote(text: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _unquote(text: str, name: str) -> str:
    if _WHOLE.fullmatch(text):
        return re.sub(r'\\(["\\])', r"\1", text[1:-1])
    if '"' in text:
        raise RecipeError(f"{name} should have its quotes around the whole value, not {text}.")
    return text


# What recipes wrote in earlier versions: (method, key) -> the same in today's words


def _embedding_bits(pairs: list[tuple[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    rest = [pair for pair in pairs if pair[0] != "embedding_bits"]
    bits, symmetric = dict(pairs)["embedding_bits"], dict(pairs).get("symmetric", "=false")
    rounded = ("quantize.embedding", [("bits", bits), ("symmetric", symmetric)])
    return [("quantize.rtn", rest), *([] if bits == "=0" else [rounded])]


RENAMED = {("quantize.rtn", "embedding_bits"): _embedding_bits}


def _renamed(name: str, pairs: list[tuple[str, str]]) -> list[tuple[str, list[tuple[str, str]]]]:
    for key, _ in pairs:
        if (name, key) in RENAMED:
            return RENAMED[name, key](pairs)
    return [(name, pairs)]
