"""The edge's client and servers that others wrote: what they may leave out, add, and say when they refuse."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from edgelab.deployments.hybrid.client import answers
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import (
    CloudBroken,
    CloudBusy,
    CloudError,
    CloudGarbled,
    CloudLacking,
    CloudRefused,
)
from tests.wrong_servers import CHOICE, GOOD, Server, http


@pytest.fixture
def asked():
    """`asked(ask, answers...)`: what a client comes to that a server answers so, and the server."""
    made = []

    def answer(ask, *told, path="", **settings):
        made.append(Server(*told))
        with Cloud(made[-1].url + path, "secret", **{"deadline_s": 20} | settings) as cloud:
            return ask(cloud), made[-1]

    yield answer
    for one in made:
        one.close()


def complete(cloud, logprobs=None):
    return cloud.complete("a", 4, logprobs)


def chat(cloud, logprobs=None):
    return cloud.chat([{"role": "user", "content": "?"}], 4, logprobs)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_an_address_is_given_with_or_without_its_version(asked, path):
    found, server = asked(complete, http(GOOD), path=path)
    assert found.ids == [5, 6]
    assert server.requests[0].startswith(b"POST /v1/completions ")


def test_an_address_may_have_a_path(asked):
    _, server = asked(complete, http(GOOD), path="/api/v1")
    assert server.requests[0].startswith(b"POST /api/v1/completions ")


# Log-probabilities

TOKEN = {"token": "A", "logprob": -0.25, "bytes": [65]}
RANKED = [{"token": "A", "logprob": -0.25}, {"token": "B", "logprob": -2}]


def reply(logprobs: object, text: str = "A", **usage: int) -> bytes:
    """A chat in the newer shape."""
    message = {"role": "assistant", "content": text}
    told = {"choices": [{"message": message, "finish_reason": "stop", "logprobs": logprobs}]}
    return http(told | ({"usage": usage} if usage else {}))


@pytest.mark.parametrize("content", [None, []])
@pytest.mark.parametrize("asked_for", [None, 0, 2])
def test_an_empty_list_of_log_probabilities_is_none(asked, content, asked_for):
    """Where an end is counted, a text of one token has none of its own to name: [] would be another text."""
    told = reply({"content": content}, completion_tokens=1, prompt_tokens=3)
    found, _ = asked(lambda cloud: chat(cloud, asked_for), told)
    assert (found.text, found.ids, found.logprobs, found.top) == ("A", None, None, None)
    assert (found.read, found.written) == (3, 1)


@pytest.mark.parametrize("token", [TOKEN, TOKEN | {"top_logprobs": None}, TOKEN | {"top_logprobs": []}])
def test_alternatives_may_lack_where_none_were_asked_for(asked, token):
    found, _ = asked(lambda cloud: chat(cloud, 0), reply({"content": [token]}))
    assert (found.logprobs, found.top) == ([-0.25], [{}])
    if token.get("top_logprobs") is None:
        with pytest.raises(CloudGarbled, match="lacks what was asked for"):
            asked(lambda cloud: chat(cloud, 2), reply({"content": [token]}))
    found, _ = asked(lambda cloud: chat(cloud, 2), reply({"content": [token | {"top_logprobs": RANKED}]}))
    assert found.top == [{"A": -0.25, "B": -2.0}]


@pytest.mark.parametrize("change", [{"top_logprobs": None}, {}])
def test_alternatives_may_lack_in_the_older_shape_too(asked, change):
    logprobs = {"tokens": [" sh", "ips"], "token_logprobs": [-0.5, -1.0], **change}
    told = http({"choices": [CHOICE | {"logprobs": logprobs}]})
    found, _ = asked(lambda cloud: complete(cloud, 0), told)
    assert (found.ids, found.logprobs, found.top) == ([5, 6], [-0.5, -1.0], [{}, {}])
    with pytest.raises(CloudGarbled):
        asked(lambda cloud: complete(cloud, 2), told)


# Streams


def events(*data: object) -> str:
    return "".join(f"data: {one if isinstance(one, str) else json.dumps(one)}\n\n" for one in data)


def piece(**choice: object) -> dict:
    return {"choices": [{"index": 0, **choice}]}


FIRST, LAST = piece(text="a"), piece(text="b", finish_reason="stop")
USAGE = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}


@pytest.mark.parametrize(
    "said",
    [
        events(FIRST, LAST, USAGE, "[DONE]"),
        events({"choices": [], "prompt_filter_results": []}, FIRST, LAST, "[DONE]"),
        events(FIRST, LAST | {"usage": None}, "[DONE]"),
        "data:\n\n" + events(FIRST, LAST, "[DONE]"),
        "data\n\n" + events(FIRST, LAST, "[DONE]"),
        "event: message\nid: 1\nretry: 100\nx-trace: 7\nfoo\n" + events(FIRST, LAST, "[DONE]"),
        ": OPENROUTER PROCESSING\n\n:\n\n" + events(FIRST, LAST, "[DONE]"),
        "\ufeff" + events(FIRST, LAST, "[DONE]"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_a_stream_may_hold_besides(asked, said, end):
    found, _ = asked(lambda cloud: list(cloud.stream("a")), http(said.replace("\n", end)))
    assert [(one.text, one.finish) for one in found] == [("a", None), ("b", "stop")]


def test_a_piece_may_have_no_text(asked):
    said = events(piece(text=None), LAST, "[DONE]")
    found, _ = asked(lambda cloud: list(cloud.stream("a")), http(said))
    assert [one.text for one in found] == ["", "b"]


@pytest.mark.parametrize("body", [json.dumps(GOOD), "<html>\n", "<html><a href='x:y'>\n"])
def test_what_is_no_stream_is_none(asked, body):
    with pytest.raises(CloudGarbled):
        asked(lambda cloud: list(cloud.stream("a")), http(body + "\n"))


def test_a_mark_of_byte_order_before_json_is_skipped(asked):
    found, _ = asked(complete, http(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))
    assert found.ids == [5, 6]


# Refusals

SAID = "Context is 2048."
REASONS = [
    {"error": {"message": SAID, "code": 400, "type": "t"}},
    {"error": SAID},
    {"error": "Context is 2048"},  # which ends as a sentence all the same
    {"object": "error", "message": SAID, "type": "BadRequestError", "param": None, "code": 400},
    {"detail": SAID},
    {"message": SAID},
]


@pytest.mark.parametrize("told", REASONS)
def test_a_reason_is_told_whatever_its_shape(asked, told):
    with pytest.raises(CloudRefused) as raised:
        asked(complete, http(told, 400))
    assert str(raised.value) == f"The cloud answers 400: {SAID}"
    assert raised.value.status == 400


def test_a_reason_of_fastapi_names_the_field(asked):
    told = {"detail": [{"loc": ["body", "prompt"], "msg": "Field required", "type": "missing"}]}
    with pytest.raises(CloudRefused, match=r"^The cloud answers 422: body\.prompt: Field required\.$"):
        asked(complete, http(told, 422))


@pytest.mark.parametrize("told", [{}, {"error": None}, {"error": []}, {"error": 5}, {"detail": [5]}, []])
def test_no_reason_is_a_sentence_too(asked, told):
    with pytest.raises(CloudRefused, match=r"^The cloud answers 400\.$"):
        asked(complete, http(json.dumps(told), 400))


@pytest.mark.parametrize("told", REASONS[:4])
def test_an_error_that_comes_as_an_answer_is_told(asked, told):
    stream = http(events(FIRST, told))
    for ask, answer in ((complete, http(told)), (chat, http(told)), (lambda c: list(c.stream("a")), stream)):
        with pytest.raises(CloudBroken, match=rf"^The cloud could not go on: {SAID}$"):
            asked(ask, answer)
    assert asked(complete, http(GOOD | {"error": None}))[0].ids == [5, 6]
    assert asked(Cloud.vocabulary, http(told))[0] is None  # some answer so whatever they do not know


@pytest.mark.parametrize(
    ("status", "kind"),
    [(408, CloudBroken), (504, CloudBroken), (413, CloudRefused), (422, CloudRefused), (404, CloudLacking)],
)
def test_a_time_out_of_the_cloud_is_an_outage(asked, status, kind):
    with pytest.raises(CloudError) as raised:
        asked(complete, http({"error": {"message": "Slow."}}, status))
    assert type(raised.value) is kind
    assert raised.value.outage is (kind is not CloudRefused)


# When to ask again


def at(**later: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(**later), usegmt=True)


@pytest.mark.parametrize(
    ("told", "least", "most"),
    [
        ("2", 2, 2),
        (" 2 ", 2, 2),
        ("0.5", 0.5, 0.5),
        ("0", answers.LEAST_RETRY_S, answers.LEAST_RETRY_S),
        ("-3", answers.LEAST_RETRY_S, answers.LEAST_RETRY_S),
        ("123456789", 123456789, 123456789),
        pytest.param(at(days=2), 86_400, 2 * 86_400, id="a moment"),
        pytest.param(at(days=-2), answers.LEAST_RETRY_S, answers.LEAST_RETRY_S, id="one that is over"),
        *((text, 1, 1) for text in ("", "soon", "nan", "inf", "²", "Mon, 99 Foo 2026 99:00:00 GMT")),
    ],
)
def test_when_to_ask_again(asked, told, least, most):
    busy = http({"error": "Later."}, 429, retry_after=told)
    with pytest.raises(CloudBusy) as raised:
        asked(complete, busy, waits=False)
    assert least <= raised.value.retry_s <= most


def test_a_server_that_is_busy_for_no_time_is_not_flooded(asked, monkeypatch):
    """Each attempt waits, however soon the server says; here the waits are counted and take no time."""
    waits = []

    def asked_often(cloud):
        monkeypatch.setattr(cloud.meter.is_cut, "wait", waits.append)
        return complete(cloud)

    found, server = asked(asked_often, *[http({}, 503, retry_after="0")] * 3, http(GOOD))
    assert found.ids == [5, 6] and len(server.requests) == 4
    assert waits == [answers.LEAST_RETRY_S] * 3
