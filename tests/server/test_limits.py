"""What the server refuses: strangers, bodies that are no requests, and more than its limits let through."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server.app import create_app
from edgelab.deployments.hybrid.server.conversations import Conversations, SecondPart
from edgelab.deployments.hybrid.server.framing import sentence
from edgelab.deployments.hybrid.server.limits import LimitError, Limits
from edgelab.deployments.hybrid.server.messages import (
    ChatRequest,
    CompletionRequest,
    HiddenRequest,
    Refusal,
    VerifyRequest,
)
from edgelab.deployments.partition import wire
from edgelab.deployments.partition.stage import Stage
from tests.server.requests import AUTHORIZED, CUT, LIMITS, PROMPT, TOKEN, hidden, verify
from tests.server.sessions import first_part_of

KEPT = (
    2 * 1 * 2 * 16 * 4
)  # bytes of a token: keys and values, one block, two heads of 16 numbers of four bytes

# Who may ask, and for what


def routes(app):
    paths = app.openapi()["paths"]
    found = [(method, path.replace("{name}", "abcdefgh")) for path, one in paths.items() for method in one]
    return [*found, ("get", "/openapi.json"), ("get", "/docs"), ("get", "/nowhere"), ("options", "/health")]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer "},
        {"authorization": "Bearer \u00e9"},
        [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
        {"x-api-key": TOKEN, "cookie": f"token={TOKEN}"},
    ],
)
def test_without_the_token_nothing_is_told(app, headers):
    if isinstance(headers, dict):
        headers = {name: value.encode("latin-1") for name, value in headers.items()}
    with TestClient(app) as client:
        for method, path in routes(app):
            answer = client.request(method, f"{path}?token={TOKEN}", content=b"{", headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_token"
            assert TOKEN not in answer.text
        assert len(routes(app)) > 9


def test_with_the_token_an_unknown_path_is_unknown(client):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/verify", 405),
        ("GET", "/docs", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/health/", 404),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "code"}
    assert client.get("/openapi.json").status_code == 200


BAD_COMPLETIONS = [
    ({"prompt": [5] * 65}, 400, "prompt_too_long"),
    ({"max_tokens": 49}, 400, "too_many_tokens"),
    ({"max_tokens": 10**400}, 400, "too_many_tokens"),
    ({"prompt": [5] * 60, "max_tokens": 40}, 400, "context_length_exceeded"),
    ({"prompt": [5, 300]}, 400, "unknown_token"),
    ({"prompt": [10**40]}, 400, "unknown_token"),
    ({"prompt": "a" * 5000}, 400, "prompt_too_long"),
    ({"model": "another"}, 404, "model_not_found"),
    ({"prompt": ""}, 400, "invalid_body"),
    ({"prompt": []}, 400, "invalid_body"),
    ({"prompt": [-1]}, 400, "invalid_body"),
    ({"prompt": [1.5]}, 400, "invalid_body"),
    ({"prompt": [True]}, 400, "invalid_body"),
    ({"prompt": [[5], [6]]}, 400, "invalid_body"),
    ({"prompt": [[[5]]]}, 400, "invalid_body"),
    ({"prompt": [""]}, 400, "invalid_body"),
    ({"prompt": [[]]}, 400, "invalid_body"),
    ({"prompt": None}, 400, "invalid_body"),
    ({"prompt": {}}, 400, "invalid_body"),
    ({"prompt": "\ud800"}, 400, "invalid_body"),
    ({"stop": "\udfff"}, 400, "invalid_body"),
    ({"stop": [""]}, 400, "invalid_body"),
    ({"stop": ["a"] * 5}, 400, "invalid_body"),
    ({"max_tokens": 0}, 400, "invalid_body"),
    ({"max_tokens": "16"}, 400, "invalid_body"),
    ({"temperature": -0.1}, 400, "invalid_body"),
    ({"temperature": float("nan")}, 400, "invalid_body"),
    ({"temperature": float("inf")}, 400, "invalid_body"),
    ({"temperature": 1e308}, 400, "invalid_body"),
    ({"seed": -1}, 400, "invalid_body"),
    ({"seed": 2**63}, 400, "invalid_body"),
    ({"logprobs": 21}, 400, "invalid_body"),
    ({"logprobs": True}, 400, "invalid_body"),
    ({"stream": 1}, 400, "invalid_body"),
    ({"n": 2}, 400, "invalid_body"),
]


@pytest.mark.parametrize(("change", "status", "code"), BAD_COMPLETIONS)
def test_what_cannot_be_written_is_refused_in_one_shape(client, change, status, code):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4} | change).encode()
    answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == code
    assert error["message"].endswith(".")
    assert len(error["message"]) < 400


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/verify", "/hidden"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"prompt": ' + b"9" * 5000 + b"}",
        b'"text"',
        b"{}",
        b"\x00",
    ],
)
def test_what_is_no_request_is_refused(client, path, body):
    for kind in (
        "application/json",
        "application/octet-stream",
        "text/plain",
        "multipart/form-data",
        "no type",
        "",
    ):
        answer = client.post(path, content=body, headers={"content-type": kind})
        assert answer.status_code in (400, 415), answer.text
        assert set(answer.json()["error"]) == {"message", "type", "code"}


def test_a_body_that_is_too_large_is_refused(client):
    def chunks():
        for _ in itertools.repeat(None, 100):
            yield b" " * 1000

    for body in (b" " * 60_001, chunks()):
        answer = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"


@pytest.mark.parametrize(
    "change",
    [{"waiting": -1}, {"max_tokens": 0}, {"request_s": 0.0}, {"waiting_s": -1.0}, {"idle_s": float("nan")}],
)
def test_limits_that_let_nothing_through(change):
    with pytest.raises(LimitError, match=next(iter(change))):
        Limits(**change)


@pytest.mark.parametrize(
    ("context", "free", "tokens"),
    [(96, 10**9, 96), (8192, 4 * 1000 * KEPT, 1000), (8192, 0, 1), (None, 10**9, None)],
)
def test_the_longest_prompt_fits_context_and_memory(service, monkeypatch, context, free, tokens):
    """A quarter of the free memory is for keys and values."""
    service.context, service.token_bytes = context, KEPT
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert service.longest_prompt() == tokens


# Conversations


def test_of_too_many_conversations_the_idlest_makes_room(client):
    for number in range(LIMITS.conversations):
        assert verify(client, 0, [], prompt=PROMPT, name=f"conversation{number}").status_code == 200
    assert verify(client, 1, [], name="conversation0").status_code == 200
    assert verify(client, 0, [], prompt=PROMPT, name="conversation3").status_code == 200
    assert client.get("/health").json()["conversations"] == LIMITS.conversations
    answer = verify(client, 1, [], name="conversation1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_conversation")
    assert verify(client, 2, [], name="conversation0").status_code == 200
    assert client.delete("/conversations/conversation0").status_code == 204
    assert client.delete("/conversations/conversation0").status_code == 404


def test_keys_and_values_make_no_room_until_one_ends(client, first_part):
    states = first_part_of(first_part)
    for number in range(LIMITS.conversations):
        assert hidden(client, 0, states, name=f"conversation{number}").status_code == 200
    full = hidden(client, 0, states)
    assert (full.status_code, full.json()["error"]["code"]) == (429, "busy")
    assert int(full.headers["retry-after"]) >= 1
    assert client.delete("/conversations/conversation1").status_code == 204
    assert hidden(client, 1, states, name="conversation1").status_code == 404
    assert hidden(client, 0, states).status_code == 200


def test_keys_and_values_have_a_limit_in_bytes(service, first_part):
    states = first_part_of(first_part)  # four tokens
    second = SecondPart(service, LIMITS)
    assert second.token_bytes == KEPT
    app = create_app(service, TOKEN, replace(LIMITS, sequence_bytes=10 * KEPT))
    with TestClient(app, headers=AUTHORIZED) as client:
        assert hidden(client, 0, states, name="conversation0").status_code == 200
        first = hidden(client, 0, states, name="conversation1")
        assert first.status_code == 200
        for name, step in (("conversation0", 1), ("conversation1", 1), ("conversation2", 0)):
            full = hidden(client, step, states, name=name)
            assert (full.status_code, full.json()["error"]["code"]) == (429, "busy")
            assert int(full.headers["retry-after"]) >= 1
            assert sum(cache.nbytes for cache in service.second._caches.values()) == 8 * KEPT
        assert client.get("/health").json()["conversations"] == 2  # none was opened on the way
        assert hidden(client, 0, states, name="conversation1").json() == first.json()
        assert hidden(client, 1, states[:2], name="conversation0").status_code == 200  # all ten
        assert hidden(client, 1, states[:1], name="conversation1").status_code == 429
        assert client.delete("/conversations/conversation0").status_code == 204
        assert hidden(client, 1, states, name="conversation1").status_code == 200
        alone = hidden(client, 2, states, name="conversation1")  # has no room even without any other
        assert (alone.status_code, alone.json()["error"]["code"]) == (400, "sequence_too_large")
        assert hidden(client, 2, states[:2], name="conversation1").status_code == 200


def test_what_is_kept_is_the_same_after_a_refusal(service, first_part, new_model):
    states, twin = first_part_of(first_part), Stage(new_model("llama"), CUT + 1, 4)
    second = SecondPart(service, replace(LIMITS, sequence_bytes=4 * KEPT))

    def step(number, given, name="conversation"):
        asked = HiddenRequest(conversation=name, step=number, tokens=len(given))
        return second.step(asked, wire.encoded(given, "float32"))

    assert step(0, states[:3]).next == int(twin.read(states[:3], 0).argmax())
    with pytest.raises(Refusal, match="busy"):
        step(0, states[:2], "another-one")
    assert step(1, states[3:]).next == int(twin.read(states[3:], 3).argmax())


def test_who_is_idle_for_too_long_makes_room_for_bytes(service, first_part):
    states, now = first_part_of(first_part), 0.0
    second = SecondPart(service, replace(LIMITS, sequence_bytes=6 * KEPT, idle_s=10))
    second.open._clock = lambda: now

    def step(name):
        return second.step(
            HiddenRequest(conversation=name, step=0, tokens=4), wire.encoded(states, "float32")
        )

    step("conversation0")
    now = 4.0
    with pytest.raises(Refusal, match="busy") as refused:
        step("conversation1")
    assert (refused.value.status, refused.value.retry_s) == (429, 6)
    now = 10.5
    step("conversation1")
    assert second.nbytes == 4 * KEPT == sum(cache.nbytes for cache in service.second._caches.values())


def test_a_conversation_is_forgotten_after_a_while():
    now, ended = 0.0, []
    talks = Conversations(Limits(conversations=2, idle_s=10), ended.append, clock=lambda: now)
    first = talks.at("first", 0)
    now = 6.0
    talks.at("second", 0)
    with pytest.raises(Refusal, match="busy") as refused:
        talks.at("third", 0)
    assert refused.value.retry_s == 4
    now = 9.0
    assert talks.at("first", 0) is first
    now = 16.5
    talks.at("third", 0)
    assert ended == [1]
    with pytest.raises(Refusal, match="No such conversation") as refused:
        talks.at("second", 1)
    assert refused.value.status == 404


# Whatever comes

MANY = 200_000
WRONG = [
    (CompletionRequest, {"prompt": [-1] * MANY}, "prompt.list.0"),
    (CompletionRequest, {"prompt": ["a"] * MANY}, "prompt"),
    (CompletionRequest, {"prompt": [["a"] * MANY]}, "prompt.list.0"),
    (CompletionRequest, {"prompt": "a", "stop": [""] * MANY}, "stop.list.0"),
    (CompletionRequest, {"prompt": "a", "stop": ["a"] * MANY}, "stop.list"),
    (CompletionRequest, {"prompt": "a"} | dict.fromkeys(map(str, range(MANY))), "The body"),
    (ChatRequest, {"messages": [0] * MANY}, "messages.0"),
    (ChatRequest, {"messages": [{"role": "user", "content": "a"}] * MANY}, "messages"),
    (ChatRequest, {"messages": [dict.fromkeys(map(str, range(MANY)))]}, "messages.0"),
    (VerifyRequest, {"conversation": "conversation", "step": 0, "draft": [1.5] * MANY}, "draft.0"),
    (
        VerifyRequest,
        {"conversation": "conversation", "step": 0, "draft": [], "prompt": [None] * MANY},
        "prompt.0",
    ),
]


@pytest.mark.parametrize(("model", "body", "place"), WRONG)
def test_of_many_faults_one_is_described(model, body, place):
    for read in (lambda: model.model_validate(body), lambda: model.model_validate_json(json.dumps(body))):
        with pytest.raises(ValidationError) as found:
            read()
        assert found.value.error_count() == 1
        assert sentence(found.value.errors()).startswith(f"{place}: ")


@pytest.mark.parametrize("path", ["/v1/completions", "/verify"])
def test_many_wrong_items_are_refused_in_one_sentence(service, path):
    body = {"/verify": {"conversation": "conversation", "step": 0, "draft": ["a"] * MANY}}
    asked = body.get(path, {"prompt": [1.5] * MANY})
    app = create_app(service, TOKEN, replace(LIMITS, body_bytes=4_000_000))
    with TestClient(app, headers=AUTHORIZED) as client:
        answer = client.post(path, json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_body")
    assert answer.json()["error"]["message"].endswith("0: Input should be a valid integer.")


def test_no_request_of_the_schema_breaks_the_server(service):
    """Valid and invalid requests of every operation, made from the server's own description of itself."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    app = create_app(service, TOKEN, LIMITS)
    schema = schemathesis.openapi.from_dict(app.openapi())
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    statuses = set()
    with TestClient(app, headers=AUTHORIZED, raise_server_exceptions=False) as client:
        for operation, mode in itertools.product(schema.get_all_operations(), modes):
            operation = operation.ok()

            @settings(
                max_examples=12, deadline=None, derandomize=True, database=None,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case):
                sent = case.as_transport_kwargs(base_url="http://testserver")
                sent.pop("cookies", None)
                sent["content"] = sent.pop("data", None)
                answer = client.request(**sent)
                statuses.add(answer.status_code)
                assert answer.status_code < 500, (case, answer.text)
                if answer.status_code >= 400:
                    assert set(answer.json()["error"]) == {"message", "type", "code"}

            check()
    assert {200, 400, 404} <= statuses
