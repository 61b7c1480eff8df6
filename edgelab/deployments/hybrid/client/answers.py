"""What the cloud answered, read out of JSON and events. Nothing is believed that has not been looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from edgelab.deployments.hybrid.client.failures import (
    CloudBroken,
    CloudBusy,
    CloudDenied,
    CloudGarbled,
    CloudLacking,
    CloudRefused,
)

T = TypeVar("T")
LARGEST_ANSWER = 32_000_000  # bytes


@dataclass(frozen=True)
class Cost:
    """What a request took: bytes of HTTP each way, and seconds, waiting for a busy server included."""

    sent_bytes: int
    received_bytes: int
    seconds: float


@dataclass(frozen=True)
class Completion:
    """An answer. ids: of its tokens; logprobs: of each; top: the likeliest in the place of each, by their text.

    read, written: tokens of prompt and answer, as the server counts them. None where the server does not tell or was
    not asked. finish: "stop" or "length".
    """

    text: str
    ids: list[int] | None
    logprobs: list[float] | None
    top: list[dict[str, float]] | None
    finish: str | None
    cost: Cost
    read: int | None = None
    written: int | None = None

    @property
    def sent_bytes(self) -> int:
        """Up."""
        return self.cost.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Down."""
        return self.cost.received_bytes

    @property
    def seconds(self) -> float:
        """From asking to the whole answer."""
        return self.cost.seconds


@dataclass(frozen=True)
class Piece:
    """Part of an answer, as it came."""

    text: str
    ids: list[int] | None
    finish: str | None


@dataclass(frozen=True)
class Verification:
    """How many tokens of a draft stay, and the one behind them."""

    accepted: int
    next: int
    cost: Cost


@dataclass(frozen=True)
class Next:
    """The likeliest next token, and the first few with their log-probabilities."""

    id: int
    top: list[tuple[int, float]]
    cost: Cost


def limited(response: httpx.Response) -> Iterator[bytes]:
    """The body as it comes. Raises CloudGarbled where there is no end to it."""
    size = 0
    for piece in response.iter_raw():
        size += len(piece)
        if size > LARGEST_ANSWER:
            raise CloudGarbled(f"The cloud's answer has more than {LARGEST_ANSWER} bytes.")
        yield piece


def refusal(response: httpx.Response, body: bytes) -> CloudRefused:
    """What another status than 200 means."""
    status, message, code = response.status_code, "", ""
    try:
        told = json.loads(body)["error"]
        message, code = _line(told["message"]), str(told.get("code") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    said = f": {message}" if message else "."
    if status in (401, 403):
        return CloudDenied(f"The cloud does not take this token{said}", status, code)
    if status in (429, 503):
        retry = response.headers.get("retry-after", "")
        return CloudBusy(
            f"The cloud is busy{said}", status, code, float(retry[:6]) if retry.isdecimal() else 1.0
        )
    if status >= 500:
        kind = CloudBroken
    elif status < 400 or (status in (404, 405, 410) and code != "unknown_conversation"):
        kind = CloudLacking
    else:
        kind = CloudRefused
    return kind(f"The cloud answers {status}{said}", status, code)


def events(pieces: Iterator[bytes]) -> Iterator[str]:
    """The data of server-sent events, each of which is one line here. Raises CloudGarbled for what is none."""
    waiting = b""
    for piece in pieces:
        *lines, waiting = (waiting + piece).split(b"\n")
        for line in lines:
            text = line.rstrip(b"\r").decode(errors="replace")
            if text.startswith("data:"):
                yield text[5:].strip()
            elif text and not text.startswith((":", "event:", "id:", "retry:")):
                raise CloudGarbled("The cloud's answer is no stream of events.")


def parsed(text: str) -> dict[str, Any]:
    """An object of JSON. Raises CloudGarbled for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise CloudGarbled("The cloud's answer is no JSON.") from None
    if not isinstance(found, dict):
        raise CloudGarbled("The cloud's answer is not the JSON that was asked for.")
    return found


def checked(read: Callable[[], T]) -> T:
    """What is read out of an answer. Raises CloudGarbled where it is not there, or of another type."""
    try:
        return read()
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError):
        raise CloudGarbled("The cloud's answer lacks what was asked for, or holds something else.") from None


def known(ids: list[int], vocabulary: int) -> list[int]:
    """The same tokens. Raises CloudGarbled where one of them is none of so many."""
    if max(ids, default=0) >= vocabulary:
        raise CloudGarbled(f"The cloud names a token that is none of the {vocabulary} there are.")
    return ids


def piece_of(told: dict[str, Any]) -> Piece:
    """A piece of a stream. Raises CloudBroken where the server could not go on."""
    if "error" in told:
        raise CloudBroken(f"The cloud broke off: {_line(told['error']['message'])}", 500)
    choice = told["choices"][0]
    return Piece(_text(choice["text"]), _ids(choice.get("token_ids")), choice["finish_reason"])


def completion_of(told: dict[str, Any], cost: Cost) -> Completion:
    """A completion or a chat; log-probabilities in OpenAI's older shape or in its newer one, which llama.cpp uses."""
    choice = told["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    ids, logprobs, top = _ids(choice.get("token_ids")), None, None
    if (found := choice.get("logprobs")) and "content" in found:
        each = found["content"]
        logprobs = [_number(one["logprob"]) for one in each]
        top = [_by_text(one["top_logprobs"]) for one in each]
        written = told["usage"]["completion_tokens"] if told.get("usage") else len(each)
        is_whole = len(each) in (
            written,
            written - (choice["finish_reason"] == "stop"),
        )  # the end may count as one
        if ids is None and is_whole and all("id" in one for one in each):
            ids = _ids([one["id"] for one in each])
    elif found:
        logprobs = [_number(one) for one in found["token_logprobs"]]
        top = [
            {_text(name): _number(value) for name, value in (one or {}).items()}
            for one in found["top_logprobs"]
        ]
    if ids is not None and logprobs is not None and len(ids) != len(logprobs):
        raise ValueError("tokens and log-probabilities are not as many")
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError("an answer ends with stop or length")
    usage = told.get("usage") or {}
    read, written = (
        None if (count := usage.get(name)) is None else _whole(count)
        for name in ("prompt_tokens", "completion_tokens")
    )
    return Completion(_text(text), ids, logprobs, top, choice["finish_reason"], cost, read, written)


def verification_of(told: dict[str, Any], step: int, draft: int, cost: Cost) -> Verification:
    """Of step `step`, whose draft has so many tokens."""
    accepted, token = _whole(told["accepted"]), _whole(told["next"])
    if told["step"] != step or accepted > draft:
        raise ValueError("it belongs to another draft")
    return Verification(accepted, token, cost)


def next_of(told: dict[str, Any], step: int, top: int, cost: Cost) -> Next:
    """Of step `step`, with so many alternatives."""
    ranked = [(_whole(one["id"]), _number(one["logprob"])) for one in told["top"]]
    if told["step"] != step or len(ranked) != top:
        raise ValueError("it belongs to another step")
    return Next(_whole(told["next"]), ranked, cost)


def _by_text(ranked: list[dict[str, Any]]) -> dict[str, float]:
    """Log-probabilities by text; all but the first of equal texts, such as parts of characters, by their numbers."""
    found: dict[str, float] = {}
    for place, one in enumerate(ranked):
        text = _text(one["token"])
        name = text if text not in found else f"token_id:{one.get('id', -1 - place)}"
        found[name] = _number(one["logprob"])
    return found


def _line(message: Any) -> str:
    """What a server has to say, in one line that can be printed."""
    return " ".join(str(message)[:300].encode(errors="replace").decode().split())


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    value.encode()  # JSON can name half a character, which raises a ValueError
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError("no token")
    return value


def _ids(value: Any) -> list[int] | None:
    return None if value is None else [_whole(one) for one in value]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError("no number")
    return float(value)
