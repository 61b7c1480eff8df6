"""Who waits for whom, and who leaves: a full queue, a client that is gone, an answer that takes too long."""

import asyncio
import json
import threading
import time

import httpx
import pytest
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server.app import create_app
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.service import Service
from tests.server.requests import AUTHORIZED, TOKEN, complete
from tests.server.sessions import Fixed


def asgi(app):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test", headers=AUTHORIZED, timeout=30
    )


def fixed_app(session, tokenizer, **limits):
    return create_app(Service(session, tokenizer, "fixed"), TOKEN, Limits(**limits))


class Counted:
    """A tokenizer that notes which texts it reads."""

    def __init__(self, tokenizer):
        self.tokenizer, self.read = tokenizer, []

    def __call__(self, text):
        self.read.append(text)
        return self.tokenizer(text)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("prompt", [[0], "a"])
def test_beyond_the_queue_one_is_asked_to_come_again(byte_tokenizer, prompt):
    gate, computing = threading.Event(), threading.Event()

    def before():
        computing.set()
        assert gate.wait(30)

    session, tokenizer = Fixed(before=before), Counted(byte_tokenizer)
    session.vocabulary = 300
    app = fixed_app(session, tokenizer, waiting=2)
    asked = {"prompt": prompt, "max_tokens": 2, "temperature": 0}

    async def run():
        async with asgi(app) as client:
            first = asyncio.create_task(client.post("/v1/completions", json=asked))
            assert await asyncio.to_thread(computing.wait, 30)
            others = [asyncio.create_task(client.post("/v1/completions", json=asked)) for _ in range(2)]
            deadline = time.monotonic() + 20
            while (await client.get("/health")).json()["waiting"] < 2:
                if time.monotonic() > deadline:
                    gate.set()  # so that the failure is told
                    pytest.fail("nobody waits for a turn")
                await asyncio.sleep(0.001)
            refused = [
                await client.post("/v1/completions", json=asked | {"stream": stream})
                for stream in (False, True)
            ]
            assert tokenizer.read in ([], [prompt])  # nobody who waits, and nobody who is refused
            gate.set()
            return refused, await asyncio.gather(first, *others)

    refused, answers = asyncio.run(run())
    for one in refused:
        assert (one.status_code, one.json()["error"]["code"]) == (429, "busy")
        assert 1 <= int(one.headers["retry-after"]) <= 30
    assert [one.json()["choices"][0]["token_ids"] for one in answers] == [[2, 2]] * 3
    assert [one.json()["usage"]["prompt_tokens"] for one in answers] == [1] * 3


def test_a_text_that_cannot_fit_is_refused_by_its_length(byte_tokenizer):
    longest = max(map(len, byte_tokenizer.get_vocab()))
    session, tokenizer = Fixed(), Counted(byte_tokenizer)
    session.vocabulary = 300
    with TestClient(fixed_app(session, tokenizer, prompt_tokens=4), headers=AUTHORIZED) as client:
        for length, read in ((4 * longest, 1), (4 * longest + 1, 0)):
            tokenizer.read.clear()
            answer = client.post("/v1/completions", json={"prompt": "z" * length, "stream": not read})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "prompt_too_long")
            assert ("characters" in answer.json()["error"]["message"]) == (read == 0)
            assert len(tokenizer.read) == read
        said = [{"role": "user", "content": "z" * (2 * longest)}] * 3
        answer = client.post("/v1/chat/completions", json={"messages": said})
        assert f"{6 * longest} characters" in answer.json()["error"]["message"]
        word = max(byte_tokenizer.get_vocab(), key=len)
        text = byte_tokenizer.convert_tokens_to_string([word]) * 4
        assert complete(client, prompt=text, max_tokens=1)["usage"]["prompt_tokens"] <= 4


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


class Held:
    """A session whose steps wait until they are let go, and what tells that one has begun."""

    def __init__(self):
        self.gate, self.computing = threading.Event(), threading.Event()
        self.session = Fixed(before=self.hold)

    def hold(self):
        self.computing.set()
        assert self.gate.wait(30)


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_has_waited_too_long_is_asked_to_come_again(byte_tokenizer, stream):
    held = Held()
    app = fixed_app(held.session, byte_tokenizer, waiting_s=0.1)
    asked = {"prompt": [0], "max_tokens": 2, "temperature": 0}

    async def run():
        async with asgi(app) as client:
            first = asyncio.create_task(client.post("/v1/completions", json=asked))
            assert await asyncio.to_thread(held.computing.wait, 30)
            second = await client.post("/v1/completions", json=asked | {"stream": stream})
            waiting = (await client.get("/health")).json()["waiting"]
            held.gate.set()
            return await first, second, waiting

    first, second, waiting = asyncio.run(run())
    assert (first.status_code, waiting) == (200, 0)
    assert (second.status_code, second.json()["error"]["code"]) == (429, "busy")
    assert second.json()["error"]["message"].startswith("No turn came within 0.1 s; ask again in ")
    assert int(second.headers["retry-after"]) >= 1


def test_what_a_request_may_take_begins_with_its_turn(byte_tokenizer):
    """The step of the first one goes on after its answer, and the second one waits for that as well."""
    held, most_s = Held(), 1.0
    app = fixed_app(held.session, byte_tokenizer, request_s=most_s)
    asked = {"prompt": [0], "max_tokens": 2, "temperature": 0}

    async def run():
        async with asgi(app) as client:
            first = asyncio.create_task(client.post("/v1/completions", json=asked))
            assert await asyncio.to_thread(held.computing.wait, 30)
            second = asyncio.create_task(client.post("/v1/completions", json=asked))
            ended = await first
            await asyncio.sleep(
                most_s
            )  # as long as the second one may take, and it has waited longer than that
            assert (await client.get("/health")).json()["waiting"] == 1
            held.gate.set()
            return ended, await second

    first, second = asyncio.run(run())
    assert (first.status_code, first.json()["error"]["code"]) == (408, "slow_request")
    assert second.status_code == 200, second.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_is_one_sentence(byte_tokenizer, stream):
    session = Fixed(logits=(float("nan"),) * 6)
    app = fixed_app(session, byte_tokenizer)
    with TestClient(app, headers=AUTHORIZED, raise_server_exceptions=False) as client:
        answer = client.post("/v1/completions", json={"prompt": [0], "stream": stream})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "Traceback" not in answer.text
        assert client.get("/health").status_code == 200
