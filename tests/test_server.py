"""The server in this process: what it writes, what it refuses, and who waits for whom."""

import asyncio
import itertools
import json
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from scipy import stats
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server.app import create_app
from edgelab.deployments.hybrid.server.conversations import Conversations
from edgelab.deployments.hybrid.server.framing import probabilities_bytes
from edgelab.deployments.hybrid.server.limits import LimitError, Limits
from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.deployments.hybrid.server.service import Service
from edgelab.deployments.hybrid.server.writing import TextSoFar, Writer, tempered
from edgelab.deployments.partition import wire
from edgelab.deployments.partition.stage import Stage
from edgelab.runtimes.eager import Eager
from edgelab.runtimes.session import Session

TOKEN = "a-token-that-only-the-tests-know"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
PROMPT = [5, 100, 42, 7]
CUT = 1
LIMITS = Limits(prompt_tokens=64, max_tokens=48, draft_tokens=8, body_bytes=60_000, conversations=3)


@pytest.fixture
def service(new_model, byte_tokenizer):
    second = Stage(new_model("llama"), CUT + 1, 4)
    return Service(Eager(new_model("llama")), byte_tokenizer, "tiny", 96, second, CUT)


@pytest.fixture
def app(service):
    return create_app(service, TOKEN, LIMITS)


@pytest.fixture
def client(app):
    with TestClient(app, headers=AUTHORIZED) as client:
        yield client


@pytest.fixture(scope="module")
def twin(new_model):
    """The same model in a session of the test's own."""
    return Eager(new_model("llama"))


def greedy(session, prompt, tokens):
    written = [session.prefill(prompt)]
    while len(written) < tokens:
        written.append(session.decode(written[-1]))
    return written


def complete(client, **asked):
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0} | asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(client, path, asked):
    with client.stream("POST", path, json=asked | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    *events, last = [line.removeprefix("data: ") for line in lines]
    assert last == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events]


# Writing


def test_tokens_and_logprobs_are_those_of_the_session(client, twin, byte_tokenizer):
    choice = complete(client, max_tokens=12, logprobs=3)["choices"][0]
    ids = choice["token_ids"]
    assert ids == greedy(twin, PROMPT, 12)
    assert choice["text"] == byte_tokenizer.decode(ids)
    logprobs = twin.logits(PROMPT + ids)[len(PROMPT) - 1 : -1].log_softmax(-1)
    expected = logprobs[range(len(ids)), ids].tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    for told, row in zip(choice["logprobs"]["top_logprobs"], logprobs, strict=True):
        best = row.topk(3)
        assert list(told.values()) == pytest.approx(best.values.tolist(), abs=1e-4)
        assert next(iter(told)) == byte_tokenizer.decode([int(best.indices[0])])
    assert choice["logprobs"]["tokens"] == [byte_tokenizer.decode([token]) for token in ids]


def test_a_text_is_its_tokens_and_usage_is_counted(client, byte_tokenizer):
    text = "The lighthouse keeper"
    told, again = complete(client, prompt=text), complete(client, prompt=byte_tokenizer(text)["input_ids"])
    assert told["choices"] == again["choices"]
    read = len(byte_tokenizer(text)["input_ids"])
    assert told["usage"] == {"prompt_tokens": read, "completion_tokens": 16, "total_tokens": read + 16}
    assert told["choices"][0]["finish_reason"] == "length"
    assert told["model"] == "tiny"


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("stop", [None, "e", ["th", "zzzz"], "\ufffd"])
def test_streamed_is_the_same(client, temperature, stop):
    asked = {
        "prompt": PROMPT,
        "temperature": temperature,
        "seed": 3,
        "max_tokens": 40,
        "logprobs": 2,
        "stop": stop,
    }
    whole = complete(client, **asked)["choices"][0]
    pieces = streamed(client, "/v1/completions", asked)
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert [token for piece in pieces for token in piece["token_ids"]] == whole["token_ids"]
    for name, told in whole["logprobs"].items():
        assert [one for piece in pieces for one in piece["logprobs"][name]] == told
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [
        whole["finish_reason"]
    ]


def test_an_answer_ends_before_a_stop_text(client):
    text = complete(client, max_tokens=40)["choices"][0]["text"]
    stop = text[9:12]
    choice = complete(client, max_tokens=40, stop=["never in it", stop])["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_a_stop_text_is_found_wherever_its_tokens_end(byte_tokenizer):
    text = "«Où vont-ils ?» he asked the gulls; the gulls, who knew, said nothing."
    for stop in ("the gulls, who", "«", "é", ".", "hing", "ils ?»"):
        so_far, shown = TextSoFar(byte_tokenizer, [stop, "the gulls, whom"]), ""
        for token in byte_tokenizer(text)["input_ids"]:
            shown += so_far.add(token)
            assert stop not in shown
            if so_far.stopped:
                break
        shown += so_far.rest()
        assert shown == so_far.shown == text.partition(stop)[0]
        assert so_far.stopped == (stop in text)


def test_the_end_of_a_text_is_not_part_of_it(twin):
    ids = greedy(twin, PROMPT, 8)
    end = next(token for token in ids if token != ids[0])
    writer, written = Writer(twin, PROMPT, 8, end=end), []
    while (token := writer.step()) is not None:
        written.append(token.id)
    assert written == ids[: ids.index(end)]
    assert writer.finish == "stop"
    assert writer.step() is None


def test_a_seed_fixes_what_is_sampled(client):
    def ids(**asked):
        return complete(client, temperature=1.5, max_tokens=20, **asked)["choices"][0]["token_ids"]

    assert ids(seed=5) == ids(seed=5)
    assert len({tuple(ids(seed=seed)) for seed in range(4)}) == 4
    assert len({tuple(ids()) for _ in range(4)}) == 4
    assert complete(client, temperature=5e-324)["choices"] == complete(client)["choices"]


class Fixed(Session):
    """The same logits behind every token. before: called ahead of every step."""

    kernel = "none"
    vocabulary = 6

    def __init__(self, logits=(0.0, 1.0, 2.0, 0.5, -1.0, -30.0), before=lambda: None):
        super().__init__()
        self.logits_now, self.before, self.steps = torch.tensor(logits), before, 0

    @classmethod
    def _refusal(cls, about):
        return None

    def _feed(self, ids, every):
        self.before()
        self.steps += 1
        return self.logits_now.expand(len(ids) if every else 1, -1)

    def _cut(self, length):
        return True


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature):
    session = Fixed()
    writer = Writer(session, [0], 3000, end=None, temperature=temperature, seed=0)
    counts = np.bincount([writer.step().id for _ in range(3000)], minlength=6)
    expected = 3000 * tempered(session.logits_now, temperature).numpy()
    kept = expected > 5
    assert counts[~kept].sum() <= 10
    assert (
        stats.chisquare(counts[kept], expected[kept] * counts[kept].sum() / expected[kept].sum()).pvalue
        > 1e-3
    )
    wrong = tempered(session.logits_now, temperature * 1.5).numpy()[kept]
    assert stats.chisquare(counts[kept], wrong / wrong.sum() * counts[kept].sum()).pvalue < 1e-6


def test_a_chat_is_its_template(client, service):
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "Ships?"}]
    asked = {"messages": messages, "temperature": 0, "max_tokens": 10, "logprobs": True, "top_logprobs": 2}
    choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
    plain = complete(client, prompt="Count.\nShips?\n", max_tokens=10, logprobs=2)["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": plain["text"]}
    content = choice["logprobs"]["content"]
    assert [one["logprob"] for one in content] == plain["logprobs"]["token_logprobs"]
    assert [one["id"] for one in content] == plain["token_ids"]
    assert [[other["logprob"] for other in one["top_logprobs"]] for one in content] == [
        list(told.values()) for told in plain["logprobs"]["top_logprobs"]
    ]
    pieces = streamed(client, "/v1/chat/completions", asked)
    assert "".join(piece["delta"]["content"] for piece in pieces) == plain["text"]
    assert [piece["delta"].get("role") for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [one for piece in pieces for one in piece["logprobs"]["content"]] == content


def test_a_template_that_takes_no_such_conversation(service, byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Roles have to alternate') }}"
    with TestClient(
        create_app(Service(service.session, tokenizer, "tiny"), TOKEN), headers=AUTHORIZED
    ) as client:
        answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400
    assert "Roles have to alternate" in answer.json()["error"]["message"]


def test_health(client):
    told = client.get("/health").json()
    assert told == {
        "status": "ok", "model": "tiny", "kernel": "float32 linear", "vocabulary": 300, "context": 96, "cut": CUT,
        "waiting": 0, "conversations": 0,
    }  # fmt: skip


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
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/verify", 405), ("GET", "/docs", 404)):
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
    ({"prompt": [[5]]}, 400, "invalid_body"),
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
    "change", [{"waiting": -1}, {"max_tokens": 0}, {"request_s": 0.0}, {"idle_s": float("nan")}]
)
def test_limits_that_let_nothing_through(change):
    with pytest.raises(LimitError, match=next(iter(change))):
        Limits(**change)


# Drafts


def verify(client, step, draft, name="conversation", numbers=b"", **more):
    head = {"conversation": name, "step": step, "draft": draft} | more
    if not numbers:
        return client.post("/verify", json=head)
    body = json.dumps(head).encode() + b"\n" + numbers
    return client.post("/verify", content=body, headers={"content-type": "application/octet-stream"})


@pytest.mark.parametrize("length", [0, 1, 3, 8])
def test_verified_drafts_are_what_the_model_writes_alone(client, twin, length):
    expected = greedy(twin, PROMPT, 40)
    random = torch.Generator().manual_seed(length)
    written, step, kept = [], 0, 0
    while len(written) < 24:
        draft = expected[len(written) : len(written) + length]
        if length and step % 2:  # half of the drafts have a wrong token somewhere
            place = int(torch.randint(length, (1,), generator=random))
            draft[place] = (draft[place] + 1) % 300
        begin = {"prompt": PROMPT} if step == 0 else {}
        told = verify(client, step, draft, name=f"length-{length}", **begin).json()
        assert told["step"] == step
        written += [*draft[: told["accepted"]], told["next"]]
        kept, step = kept + told["accepted"], step + 1
        if step == 2:  # somebody else uses the session in between
            complete(client, prompt=[9, 8, 7])
    assert written == expected[: len(written)]
    assert (kept > 0) == (length > 0)


def test_a_step_is_not_done_twice(client, service, monkeypatch):
    steps = []
    monkeypatch.setattr(service.session, "_feed", lambda ids, every, real=service.session._feed: (
        steps.append(ids), real(ids, every))[1])  # fmt: skip
    first = verify(client, 0, [1, 2], prompt=PROMPT).json()
    done = len(steps)
    assert verify(client, 0, [1, 2], prompt=PROMPT).json() == first
    assert len(steps) == done
    for draft, step, more in (([1, 3], 0, {"prompt": PROMPT}), ([1], 2, {}), ([1], 7, {})):
        answer = verify(client, step, draft, **more)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "wrong_step")
    assert len(steps) == done
    second = verify(client, 1, [4]).json()
    assert verify(client, 1, [4]).json() == second
    assert verify(client, 0, [1, 2], prompt=PROMPT).status_code == 409


def test_what_has_been_read_is_not_read_again(client, service, monkeypatch):
    read = []
    monkeypatch.setattr(service.session, "_feed", lambda ids, every, real=service.session._feed: (
        read.append(len(ids)), real(ids, every))[1])  # fmt: skip
    verify(client, 0, [1, 2, 3], prompt=PROMPT)
    verify(client, 1, [4, 5])
    assert read == [len(PROMPT) - 1, 4, 3]


def test_conversations_that_cannot_be(client):
    for answer, status, code in (
        (verify(client, 1, [1]), 404, "unknown_conversation"),
        (verify(client, 0, [1]), 400, "wrong_prompt"),
        (verify(client, 1, [1], prompt=PROMPT), 400, "wrong_prompt"),
        (verify(client, 1, [1], seed=1), 400, "wrong_step"),
        (verify(client, 0, [1] * 9, prompt=PROMPT), 400, "draft_too_long"),
        (verify(client, 0, [300], prompt=PROMPT), 400, "unknown_token"),
        (verify(client, 0, [1], prompt=[300]), 400, "unknown_token"),
        (verify(client, 0, [1], prompt=[5] * 65), 400, "prompt_too_long"),
        (verify(client, 0, [], prompt=[]), 400, "invalid_body"),
        (verify(client, 0, [1], prompt=PROMPT, name="short"), 400, "invalid_body"),
        (verify(client, -1, [1]), 400, "invalid_body"),
        (verify(client, 0, [1], prompt=PROMPT, temperature=1.0), 400, "invalid_probabilities"),
        (verify(client, 0, [1], prompt=PROMPT, numbers=bytes(600)), 400, "invalid_probabilities"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert client.get("/health").json()["conversations"] == 0  # none was opened on the way


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


def probabilities(draft, rows):
    """Some that are exact in float16: a half on the drafted token, the rest spread over 128 others."""
    found = torch.zeros(rows, 300)
    for row, token in zip(found, draft, strict=True):
        row[128:256] = 0.5 / 128
        row[token] = 0.5
    return found


def test_sampled_drafts_are_accepted_by_the_rule(client, twin):
    from edgelab.deployments.hybrid.speculation.acceptance import accept_sampled

    generator, known = torch.Generator().manual_seed(11), list(PROMPT)
    for step, draft in enumerate(([3, 7], [9], [], [20, 21, 22])):
        q = probabilities(draft, len(draft))
        begin = {"prompt": PROMPT, "temperature": 1.5, "seed": 11} if step == 0 else {}
        told = verify(client, step, draft, numbers=probabilities_bytes(q), **begin).json()
        target = tempered(twin.logits(known + draft)[len(known) - 1 :], 1.5)
        expected = accept_sampled(target, q, draft, generator)
        assert (told["accepted"], told["next"]) == expected
        known += [*draft[: expected[0]], expected[1]]


@pytest.mark.parametrize("wrong", ["nan", "negative", "infinite", "sum", "zero", "short", "long"])
def test_probabilities_that_are_none_are_refused(client, wrong):
    q = probabilities([3], 1).half()
    change = {"nan": float("nan"), "negative": -0.5, "infinite": float("inf"), "sum": 0.9}
    if wrong in change:
        q[0, 200] = change[wrong]
    numbers = {"short": lambda: q.numpy().tobytes()[:-2], "long": lambda: q.numpy().tobytes() + b"  "}
    sent = numbers.get(wrong, q.numpy().tobytes)()
    draft = [4] if wrong == "zero" else [3]
    answer = verify(client, 0, draft, numbers=sent, prompt=PROMPT, temperature=1.0)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_probabilities")
    assert verify(
        client, 0, [3], numbers=q.numpy().tobytes(), prompt=PROMPT, temperature=1.0
    ).status_code == (400 if wrong in change else 200)


# The second part of a model


def hidden(client, step, states, name="conversation", format_="float32", tokens=None, numbers=None, top=0):
    head = {"conversation": name, "step": step, "wire": format_, "top": top}
    head["tokens"] = len(states) if tokens is None else tokens
    body = json.dumps(head).encode() + b"\n" + (wire.encoded(states, format_) if numbers is None else numbers)
    return client.post("/hidden", content=body, headers={"content-type": "application/octet-stream"})


@pytest.fixture(scope="module")
def first_part(new_model):
    return Stage(new_model("llama"), 0, CUT + 1)


def first_part_of(stage):
    """Hidden states of the prompt."""
    stage.forget()
    return stage.read(torch.tensor(PROMPT), 0)


@pytest.mark.parametrize("format_", wire.FORMATS)
def test_a_split_model_writes_what_the_whole_one_does(client, twin, first_part, new_model, format_):
    first_part.forget()
    here = Stage(new_model("llama"), CUT + 1, 4)
    given, position, name = list(PROMPT), 0, f"conversation-{format_}"
    for step, token in enumerate(greedy(twin, PROMPT, 10)):
        states = first_part.read(torch.tensor(given), position)
        told = hidden(client, step, states, name, format_, top=3).json()
        logits = here.read(wire.through(states, format_), position)
        assert told["next"] == int(logits.argmax())
        best = logits.log_softmax(-1).topk(3)
        assert [one["id"] for one in told["top"]] == best.indices.tolist()
        assert [one["logprob"] for one in told["top"]] == pytest.approx(best.values.tolist(), abs=1e-5)
        if format_ == "float32":
            assert told["next"] == token
        position += len(given)
        given = [token]
        if (
            step == 1
        ):  # another conversation has other keys and values, and a lost answer is not computed again
            assert hidden(client, 0, states[:1], name="other-one").status_code == 200
            assert hidden(client, step, states, name, format_, top=3).json() == told
    answer = hidden(client, 3, states, name, format_)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "wrong_step")
    client.delete(f"/conversations/{name}")
    client.delete("/conversations/other-one")


def test_states_that_are_none_are_refused(client, first_part):
    states = first_part_of(first_part)
    broken = states.clone()
    broken[0, 0] = float("nan")
    for answer, status, code in (
        (hidden(client, 0, broken), 400, "invalid_states"),
        (hidden(client, 0, states, tokens=3), 400, "invalid_states"),
        (hidden(client, 0, states, tokens=2), 400, "invalid_states"),
        (hidden(client, 0, states, tokens=10**30), 400, "prompt_too_long"),
        (hidden(client, 0, states, tokens=0), 400, "invalid_body"),
        (hidden(client, 0, states, numbers=b"abc"), 400, "invalid_states"),
        (hidden(client, 0, states, numbers=b""), 400, "invalid_states"),
        (hidden(client, 0, states, format_="int8", numbers=b"abc"), 400, "invalid_states"),
        (hidden(client, 0, states, format_="bfloat16", numbers=b"abc"), 400, "unknown_wire"),
        (hidden(client, 2, states), 404, "unknown_conversation"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    for step in range(24):
        answer = hidden(client, step, states)
        assert answer.status_code == 200, answer.text
    assert hidden(client, 24, states).json()["error"]["code"] == "context_length_exceeded"
    assert hidden(client, 25, states).status_code == 404  # and is begun anew


def test_without_a_cut_no_states_are_taken(service):
    with TestClient(create_app(Service(service.session, None, "tiny"), TOKEN), headers=AUTHORIZED) as client:
        answer = hidden(client, 0, torch.zeros(1, 64))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_second_part")


# Who waits, and who leaves


def asgi(app):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZED, timeout=30
    )


def fixed_app(session, tokenizer, **limits):
    return create_app(Service(session, tokenizer, "fixed"), TOKEN, Limits(**limits))


def test_beyond_the_queue_one_is_asked_to_come_again(byte_tokenizer):
    gate, computing = threading.Event(), threading.Event()

    def before():
        computing.set()
        assert gate.wait(30)

    app = fixed_app(Fixed(before=before), byte_tokenizer, waiting=2)
    asked = {"prompt": [0], "max_tokens": 2, "temperature": 0}

    async def run():
        async with asgi(app) as client:
            first = asyncio.create_task(client.post("/v1/completions", json=asked))
            assert await asyncio.to_thread(computing.wait, 30)
            others = [asyncio.create_task(client.post("/v1/completions", json=asked)) for _ in range(2)]
            while (await client.get("/health")).json()["waiting"] < 2:
                await asyncio.sleep(0.001)
            refused = [
                await client.post("/v1/completions", json=asked | {"stream": stream})
                for stream in (False, True)
            ]
            gate.set()
            return refused, await asyncio.gather(first, *others)

    refused, answers = asyncio.run(run())
    for one in refused:
        assert (one.status_code, one.json()["error"]["code"]) == (429, "busy")
        assert 1 <= int(one.headers["retry-after"]) <= 30
    assert [one.json()["choices"][0]["token_ids"] for one in answers] == [[2, 2]] * 3


def talk(app, asked, leave):
    """One request by hand, whose client is gone once `leave` is set; what the server sent."""
    sent = []

    async def run():
        gone = asyncio.Event()
        asyncio.get_running_loop().create_task(asyncio.to_thread(leave.wait, 30)).add_done_callback(
            lambda _: gone.set()
        )
        body = [{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}]

        async def receive():
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"authorization", f"Bearer {TOKEN}".encode()), (b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
            "root_path": "", "scheme": "http", "headers": headers, "server": ("test", 80), "client": ("test", 1),
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(run())
    return sent


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_leaves_ends_what_is_written_for_them(byte_tokenizer, stream):
    leave = threading.Event()

    def before():
        if session.steps == 3:
            leave.set()
        time.sleep(0.005)

    session = Fixed(before=before)
    app = fixed_app(session, byte_tokenizer)
    asked = {"prompt": [0], "max_tokens": 500, "temperature": 0, "stream": stream}
    sent = talk(app, asked, leave)
    assert 3 <= session.steps < 400
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
    steps = session.steps
    with TestClient(app, headers=AUTHORIZED) as client:  # whose turn it is now
        assert complete(client, prompt=[0], max_tokens=2)["choices"][0]["token_ids"] == [2, 2]
    assert session.steps <= steps + 3  # one step may have been under way


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_too_long_is_broken_off(byte_tokenizer, stream):
    session = Fixed(before=lambda: time.sleep(0.02))
    with TestClient(fixed_app(session, byte_tokenizer, request_s=0.3), headers=AUTHORIZED) as client:
        asked = {"prompt": [0], "max_tokens": 500, "temperature": 0, "stream": stream}
        answer = client.post("/v1/completions", json=asked)
        if stream:
            last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
            assert "[DONE]" not in answer.text
        else:
            assert answer.status_code == 408
            last = answer.text
        assert json.loads(last)["error"]["code"] == "slow_request"
        assert client.get("/health").json()["waiting"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_one_sentence(byte_tokenizer, stream):
    session = Fixed(logits=(float("nan"),) * 6)
    app = fixed_app(session, byte_tokenizer)
    with TestClient(app, headers=AUTHORIZED, raise_server_exceptions=False) as client:
        answer = client.post("/v1/completions", json={"prompt": [0], "stream": stream})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "Traceback" not in answer.text
        assert client.get("/health").status_code == 200


# Whatever comes


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
