"""What the clients of OpenAI's servers send: fields that change nothing, parts of text, and bodies that are no JSON."""

import gzip
import json

import pytest
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server import framing
from edgelab.deployments.hybrid.server.app import create_app
from edgelab.deployments.hybrid.server.messages import ChatRequest, CompletionRequest
from tests.server.requests import AUTHORIZED, LIMITS, PROMPT, TOKEN, complete

CHAT = {"messages": [{"role": "user", "content": "Ships?"}], "temperature": 0, "max_tokens": 4}
COMPLETION = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}
POSTED = [*PATHS, "/verify", "/hidden"]
NEUTRAL = {
    "n": 1,
    "top_p": 1.0,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "user": "somebody",
    "stop": None,
    "seed": None,
    "model": None,
    "stream": None,
    "logprobs": None,
    "stream_options": None,
}


def refused(answer, status=400, code="invalid_body"):
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), answer.text
    assert error["message"].endswith(".") and len(error["message"]) < 400
    return error["message"]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"best_of": 1, "echo": False, "suffix": None}),
        ("/v1/chat/completions", {"response_format": {"type": "text"}, "store": False, "top_logprobs": None}),
    ],
)
def test_what_changes_nothing_is_taken(client, path, more):
    asked = PATHS[path]
    plain = client.post(path, json=asked).json()["choices"]
    for change in (NEUTRAL | more, *({name: None} for name in NEUTRAL | more)):
        answer = client.post(path, json=asked | change)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain
    for name in ("temperature", "max_tokens"):
        assert client.post(path, json=asked | {name: None}).status_code == 200


@pytest.mark.parametrize(
    ("path", "name", "value", "known"),
    [
        ("/v1/completions", "n", 2, "1"),
        ("/v1/completions", "n", True, "1"),
        ("/v1/completions", "n", "1", "1"),
        ("/v1/completions", "best_of", 3, "1"),
        ("/v1/completions", "top_p", 0.9, "1"),
        ("/v1/completions", "echo", True, "false"),
        ("/v1/completions", "echo", 0, "false"),
        ("/v1/completions", "suffix", "", "null"),
        ("/v1/completions", "presence_penalty", -1, "0"),
        ("/v1/completions", "frequency_penalty", False, "0"),
        ("/v1/completions", "logit_bias", {"5": 1}, "{}"),
        ("/v1/chat/completions", "response_format", {"type": "json_object"}, '{"type": "text"}'),
        ("/v1/chat/completions", "store", True, "false"),
    ],
)
def test_another_value_is_refused_by_name(client, path, name, value, known):
    said = refused(client.post(path, json=PATHS[path] | {name: value}))
    assert said == f"{name} is not known here other than {known}."


@pytest.mark.parametrize(
    ("name", "shown"),
    [("tools", "'tools'"), ("a" * 50, f"'{'a' * 40}'…"), ("é\n\ud800x", "'???x'"), ("{known}", "'")],
)
def test_an_unknown_field_is_named(client, name, shown):
    for path, model in (("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatRequest)):
        for value in (1, None):
            content = json.dumps(PATHS[path] | {name: value, "another": 1})
            said = refused(client.post(path, content=content, headers={"content-type": framing.JSON}))
            assert said.startswith(f"The body: {shown}") and "another" not in said
            if "{" not in name:
                assert said.endswith(f" is not known here; known are {', '.join(model.model_fields)}.")


# Prompts and messages


def test_a_list_of_one_prompt_is_that_prompt(client):
    for prompt in ("Ships", PROMPT):
        assert complete(client, prompt=[prompt])["choices"] == complete(client, prompt=prompt)["choices"]
    assert complete(client, prompt=[5])["usage"]["prompt_tokens"] == 1
    for prompts in (["a", "b"], [[5], [6]]):
        said = refused(client.post("/v1/completions", json=COMPLETION | {"prompt": prompts}))
        assert said.startswith("prompt: one prompt a request")


def said_to(client, *messages):
    answer = client.post("/v1/chat/completions", json=CHAT | {"messages": list(messages)})
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens"], answer.json()["choices"]


@pytest.mark.parametrize(
    ("sent", "plain"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
            {"role": "user", "content": "One\ntwo"},
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "One"}]},
            {"role": "user", "content": "One"},
        ),
        (
            {"role": "assistant", "content": "No.", "refusal": None, "tool_calls": [], "function_call": None},
            {"role": "assistant", "content": "No."},
        ),
        (
            {"role": "user", "content": "a", "name": "Bob", "tool_calls": None},
            {"role": "user", "content": "a"},
        ),
    ],
)
def test_messages_as_clients_write_them(client, sent, plain):
    assert said_to(client, sent) == said_to(client, plain)


def test_a_developer_is_the_system(client, byte_tokenizer, monkeypatch):
    template = "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    read = {
        role: said_to(client, {"role": role, "content": "Be brief."})
        for role in ("developer", "system", "user")
    }
    assert read["developer"] == read["system"] != read["user"]


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "tool", "content": "a"}, "messages.0.role:"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages.0.content:"),
        ({"role": "user", "content": "a", "refusal": "No."}, "messages.0.refusal is not known here"),
        ({"role": "user", "content": "a", "tool_calls": [{}]}, "messages.0.tool_calls is not known here"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "messages.0.content.list.0: 'image_url' is not known here; known are type, text.",
        ),
        ({"role": "user", "content": [{"type": "audio", "text": ""}]}, "messages.0.content.list.0.type:"),
        (
            {"role": "user", "content": [{"type": "text", "text": "\ud800"}]},
            "messages.0.content.list.0.text:",
        ),
    ],
)
def test_messages_that_are_none(client, message, place):
    content = json.dumps(CHAT | {"messages": [message]})
    answer = client.post("/v1/chat/completions", content=content, headers={"content-type": framing.JSON})
    assert refused(answer).startswith(place)


def test_parts_of_text_count_as_one_text(client):
    parts = [{"type": "text", "text": "z" * 1000}] * 50
    answer = client.post(
        "/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": parts}]}
    )
    assert "50049 characters" in refused(answer, code="prompt_too_long")


# The end of a stream, and the model


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_ends_with_its_usage_where_that_is_asked(client, path):
    asked = PATHS[path] | {"stream": True}
    usage = client.post(path, json=PATHS[path]).json()["usage"]
    for options, is_told in (({"include_usage": True}, True), ({"include_usage": False}, False), ({}, False)):
        lines = client.post(path, json=asked | {"stream_options": options}).text.strip().split("\n\n")
        *pieces, last = [line.removeprefix("data: ") for line in lines]
        pieces = list(map(json.loads, pieces))
        assert last == "[DONE]"
        assert [piece["usage"] for piece in pieces if piece["choices"]] == [None] * (len(pieces) - is_told)
        assert len({(piece["id"], piece["object"], piece["model"]) for piece in pieces}) == 1
        if is_told:
            assert pieces[-1]["choices"] == [] and pieces[-1]["usage"] == usage
    assert "stream=true" in refused(client.post(path, json=PATHS[path] | {"stream_options": {}}))


def test_the_model_is_told_as_others_tell_theirs(client, service):
    told = client.get("/v1/models").json()
    (entry,) = told["data"]
    assert told["object"] == "list"
    assert (entry["id"], entry["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == entry
    assert complete(client, model=entry["id"])["model"] == entry["id"]
    for other in ("another", "tiny/other", "a%20b"):
        assert "'tiny'" in refused(client.get(f"/v1/models/{other}"), 404, "model_not_found")


def test_a_name_with_slashes_and_spaces_is_found(service):
    service.name = "models/tiny: quantize.rtn:bits=4 + merge @ torch"
    with TestClient(create_app(service, TOKEN, LIMITS), headers=AUTHORIZED) as client:
        assert client.get(f"/v1/models/{service.name}").json()["id"] == service.name
        assert client.get("/v1/models/models%2Ftiny%3A%20none").status_code == 404


# Bodies


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize(
    ("headers", "what"),
    [
        ({}, "without a type"),
        (
            {"content-type": "application/x-www-form-urlencoded"},
            "of type 'application/x-www-form-urlencoded'",
        ),
        ({"content-type": "text/plain"}, "of type 'text/plain'"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "encoded as 'gzip'"),
    ],
)
def test_type_and_encoding_come_first(client, path, headers, what):
    for body in (b"{}", b"no JSON", gzip.compress(b"{}")):
        said = refused(client.post(path, content=body, headers=headers), 415, "unsupported_media_type")
        assert said.startswith(
            f"The body is {what}; send JSON with the header Content-Type: application/json"
        )


@pytest.mark.parametrize("path", POSTED)
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "character 1: Expecting value"),
        (b'{"prompt":"Hi",}', "character 16: "),
        (b'{"prompt":"a\nb"}', "character 13: Invalid control character)"),
        (b"{'prompt': 'Hi'}", "character 2: "),
        ('{"prompt":"é"}'.encode("latin-1"), "byte 12: not UTF-8"),
        ('{"prompt":"Hi"}'.encode("utf-16"), "byte 1: not UTF-8"),
        (b'{"max_tokens":' + b"9" * 5000 + b"}", "a number has too many digits"),
        (b"[" * 50_000, "it is nested too deeply"),
    ],
)
def test_what_is_no_json_has_one_code(client, path, body, what):
    answer = client.post(path, content=body, headers={"content-type": framing.JSON})
    assert refused(answer, code="invalid_json").startswith(f"The body is no JSON ({what}")


def test_json_with_a_mark_of_its_order_and_a_charset_is_taken(client):
    body = b"\xef\xbb\xbf" + json.dumps(COMPLETION).encode()
    for kind in ("application/json", "Application/JSON; charset=utf-8"):
        answer = client.post("/v1/completions", content=body, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text
