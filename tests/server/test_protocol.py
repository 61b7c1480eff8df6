"""What the server writes: completions, chats, verified drafts, and the second part of a model."""

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server.app import create_app
from edgelab.deployments.hybrid.server.framing import probabilities_bytes
from edgelab.deployments.hybrid.server.service import Service
from edgelab.deployments.hybrid.server.spelling import Spelling
from edgelab.deployments.hybrid.server.writing import TextSoFar, Writer, tempered
from edgelab.deployments.partition import wire
from edgelab.deployments.partition.stage import Stage
from edgelab.runtimes.eager import Eager
from edgelab.tasks import vocabulary_fingerprint
from tests.server.requests import AUTHORIZED, CUT, LIMITS, PROMPT, TOKEN, complete, hidden, streamed, verify
from tests.server.sessions import Fixed, first_part_of, greedy

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
        assert next(iter(told)) == Spelling(byte_tokenizer).name(int(best.indices[0]))
    assert choice["logprobs"]["tokens"] == [Spelling(byte_tokenizer).name(token) for token in ids]


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
    writer, written = Writer(twin, PROMPT, 8, ends=[end]), []
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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature):
    session = Fixed()
    writer = Writer(session, [0], 3000, ends=(), temperature=temperature, seed=0)
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


@pytest.mark.parametrize("context", [96, 40, None])
def test_a_chat_that_names_no_number_of_tokens_goes_on_to_its_end(new_model, byte_tokenizer, context):
    """Up to what the server writes at most, 48 tokens, or to the end of the context; the model ends none before."""
    messages = [{"role": "user", "content": "Ships?"}]
    service = Service(Eager(new_model("llama")), byte_tokenizer, "tiny", context)
    with TestClient(create_app(service, TOKEN, LIMITS), headers=AUTHORIZED) as client:
        told = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0}).json()
        read = told["usage"]["prompt_tokens"]
        assert told["usage"]["completion_tokens"] == min(48, (context or 1000) - read) > 16
        assert told["choices"][0]["finish_reason"] == "length"
        for name in ("max_tokens", "max_completion_tokens"):
            asked = {"messages": messages, "temperature": 0, name: 3}
            few = client.post("/v1/chat/completions", json=asked).json()
            assert few["choices"][0]["token_ids"] == told["choices"][0]["token_ids"][:3]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 3}, "invalid_body"),
        ({"max_completion_tokens": 49}, "too_many_tokens"),
        ({"max_completion_tokens": 0}, "invalid_body"),
    ],
)
def test_a_number_of_tokens_that_a_chat_cannot_have(client, change, code):
    asked = {"messages": [{"role": "user", "content": "a"}]} | change
    answer = client.post("/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


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


class Words:
    """A tokenizer as far as its vocabulary."""

    def __init__(self, **ids):
        self.ids = ids

    def get_vocab(self):
        return self.ids


def test_the_fingerprint_is_of_tokens_and_ids():
    pairs = b'[["a", 0], ["b", 1]]'
    assert vocabulary_fingerprint(Words(b=1, a=0)) == hashlib.sha256(pairs).hexdigest()[:16]
    assert vocabulary_fingerprint(Words(a=1, b=0)) != vocabulary_fingerprint(Words(a=0, b=1))
    assert vocabulary_fingerprint(Words(a=0)) != vocabulary_fingerprint(Words(a=0, b=1))


def test_health(client, byte_tokenizer):
    told = client.get("/health").json()
    assert told == {
        "status": "ok", "model": "tiny", "kernel": "float32 linear", "vocabulary": 300, "context": 96, "cut": CUT,
        "tokenizer": vocabulary_fingerprint(byte_tokenizer), "waiting": 0, "conversations": 0,
    }  # fmt: skip


# Drafts


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


def test_without_a_cut_no_states_are_taken(service, byte_tokenizer):
    app = create_app(Service(service.session, byte_tokenizer, "tiny"), TOKEN)
    with TestClient(app, headers=AUTHORIZED) as client:
        answer = hidden(client, 0, torch.zeros(1, 64))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_second_part")
