"""What the cloud answered, read out of JSON and events. Nothing is believed that has not been looked at."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
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
LEAST_RETRY_S = 0.25  # between two attempts at a busy server, whatever it says
FIELD = re.compile(r"[\w-]*(:|\r?$)")  # a line of an event, or a comment, whose name is empty


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
    status = response.status_code
    try:
        message, code = _reason(json.loads(body.decode("utf-8-sig", "replace")))
    except (ValueError, RecursionError):
        message, code = "", ""
    if status in (401, 403):
        return CloudDenied(_sentence("The cloud does not take this token", message), status, code)
    if status in (429, 503):
        retry_s = _retry_s(response.headers.get("retry-after", ""))
        return CloudBusy(_sentence("The cloud is busy", message), status, code, retry_s)
    if status >= 500 or status == 408:  # its own time-out, as 504 is that of one behind it
        kind = CloudBroken
    elif status < 400 or (status in (404, 405, 410) and code != "unknown_conversation"):
        kind = CloudLacking
    else:
        kind = CloudRefused
    return kind(_sentence(f"The cloud answers {status}", message), status, code)


def _reason(told: Any) -> tuple[str, str]:
    """What went wrong, in a line, and the server's own word for it; empty where it says neither.

    {"error": {"message", "code"}} is OpenAI's, {"error": "text"} Ollama's, {"object": "error", "message"} an older
    vLLM's, and {"detail": ...} FastAPI's, which may be a list of {"loc", "msg"}.
    """
    if isinstance(told, dict):
        told = told.get("error") or told.get("detail") or told
    if isinstance(told, list) and told:
        told = told[0]
    if isinstance(told, str):
        return _line(told), ""
    if not isinstance(told, dict):
        return "", ""
    message, place = told.get("message") or told.get("msg") or "", told.get("loc")
    where = f"{'.'.join(map(str, place))}: " if isinstance(place, list) else ""
    return _line(f"{where}{message}"), str(told.get("code") or "")


def _sentence(what: str, message: str) -> str:
    """What went wrong, and what the server says about it, which need not be a sentence."""
    said = f"{what}: {message}" if message else what
    return said if said.endswith((".", "!", "?")) else f"{said}."


def _retry_s(told: str) -> float:
    """Seconds of a Retry-After header, which says how many or until when; 1 where it says neither."""
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 1.0
    return max(seconds, LEAST_RETRY_S) if math.isfinite(seconds) else 1.0


def events(pieces: Iterator[bytes]) -> Iterator[str]:
    """The data of server-sent events, each of which is one line here. Raises CloudGarbled for what is none."""
    waiting, decoder = "", codecs.getincrementaldecoder("utf-8-sig")("replace")
    for piece in pieces:
        *lines, waiting = (waiting + decoder.decode(piece)).split("\n")
        for line in lines:
            if not FIELD.match(line):
                raise CloudGarbled("The cloud's answer is no stream of events.")
            if line.startswith("data:") and (data := line[5:].strip()):
                yield data


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


def piece_of(told: dict[str, Any]) -> Piece | None:
    """A piece of a stream; None for one without text, which counts tokens. Raises CloudBroken for an error."""
    _check_error(told)
    if told["choices"] == []:
        return None
    choice = told["choices"][0]
    text = "" if choice["text"] is None else _text(choice["text"])
    return Piece(text, _ids(choice.get("token_ids")), choice.get("finish_reason"))


def completion_of(told: dict[str, Any], cost: Cost, alternatives: int | None = None) -> Completion:
    """A completion or a chat; log-probabilities in OpenAI's older shape or in its newer one, which llama.cpp uses.

    alternatives: how many were asked for in the place of each token. Where some were, they have to be there. Raises
    CloudBroken for an error.
    """
    _check_error(told)
    choice = told["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    ids, logprobs, top = _ids(choice.get("token_ids")), None, None
    found = choice.get("logprobs") or {}
    if each := found.get("content"):
        logprobs = [_number(one["logprob"]) for one in each]
        ranked = [one.get("top_logprobs") for one in each]
        top = [_by_text(some if alternatives else some or []) for some in ranked]
        written = told["usage"]["completion_tokens"] if told.get("usage") else len(each)
        is_whole = len(each) in (
            written,
            written - (choice["finish_reason"] == "stop"),
        )  # the end may count as one
        if ids is None and is_whole and all("id" in one for one in each):
            ids = _ids([one["id"] for one in each])
    elif each := found.get("token_logprobs"):
        logprobs, ranked = [_number(one) for one in each], found.get("top_logprobs")
        if ranked is None and not alternatives:
            ranked = [None] * len(each)
        top = [{_text(name): _number(value) for name, value in (one or {}).items()} for one in ranked]
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


def _check_error(told: dict[str, Any]) -> None:
    """Raises CloudBroken where a server that has begun with 200 says what went wrong."""
    if told.get("error") or told.get("object") == "error":
        message, code = _reason(told)
        raise CloudBroken(_sentence("The cloud could not go on", message), 500, code)


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
