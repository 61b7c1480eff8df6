"""Fields and models that take what they say and nothing else, and tell the first fault alone."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

ONLY = "only"  # type of the finding that a field has another value than the one that is known here


def _whole(text: str) -> str:
    """JSON can name half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate) is no text") from None
    return text


Item = TypeVar("Item")
# The first wrong item is enough: a description of all of them would be far larger than the body.
Several = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, AfterValidator(_whole)]
TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[Several[TokenId], Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=64)]


def kind(value: Any) -> str:
    """Which of two types a value is looked at as."""
    return "text" if isinstance(value, str) else "list"


def only(value: Any) -> Any:
    """The type of a field that other servers know and this one has for the one value that changes nothing."""

    def check(given: Any) -> Any:
        if isinstance(given, bool) == isinstance(value, bool) and given == value:
            return value
        shown = {"value": json.dumps(value)}
        raise PydanticCustomError(ONLY, "is not known here other than {value}", shown)

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"const": value})]


Null, Zero, One, No, Empty, Nothing = (only(value) for value in (None, 0, 1, False, [], {}))
PlainText = only({"type": "text"})


def alone(given: Any) -> Any:
    """The one prompt of a list of prompts."""
    if not (isinstance(given, list) and given and isinstance(given[0], str | list)):
        return given
    if len(given) > 1:
        raise PydanticCustomError("several", "one prompt a request; send several one after the other")
    return given[0]


# One of the two is looked at, and not both
TextOrTokens = Annotated[
    Annotated[Text, Field(min_length=1), Tag("text")] | Annotated[Tokens, Tag("list")], Discriminator(kind)
]
Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[Several[Stop], Field(max_length=4), Tag("list")],
    Discriminator(kind),
]


class Strict(BaseModel):
    """A message without unknown fields, without conversions between types, without NaN.

    null_is_default: whether a field that is null is as one that is left out, as OpenAI's clients send them.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    null_is_default: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _stop_at_unknown(cls, given: Any) -> Any:
        """The first unknown field is enough: pydantic itself describes every one of them."""
        if not isinstance(given, dict):
            return given
        for name in given:
            if name not in cls.model_fields:
                told = {"name": _printable(str(name)), "known": ", ".join(cls.model_fields)}
                raise PydanticCustomError("unknown", "{name} is not known here; known are {known}", told)
        if cls.null_is_default:
            return {name: value for name, value in given.items() if value is not None}
        return given


def _printable(name: str) -> str:
    """The first 40 characters of a name, in what every terminal shows."""
    shown = "".join(one if one.isascii() and one.isprintable() else "?" for one in name[:40])
    return f"'{shown}'" + "…" * (len(name) > 40)
