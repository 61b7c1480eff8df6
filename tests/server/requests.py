"""What the tests of the server send: a token, limits small enough to meet, and a function for each kind of request."""

import json

from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.partition import wire

TOKEN = "a-token-that-only-the-tests-know"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
PROMPT = [5, 100, 42, 7]
CUT = 1
LIMITS = Limits(prompt_tokens=64, max_tokens=48, draft_tokens=8, body_bytes=60_000, conversations=3)


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


def verify(client, step, draft, name="conversation", numbers=b"", **more):
    head = {"conversation": name, "step": step, "draft": draft} | more
    if not numbers:
        return client.post("/verify", json=head)
    body = json.dumps(head).encode() + b"\n" + numbers
    return client.post("/verify", content=body, headers={"content-type": "application/octet-stream"})


def hidden(client, step, states, name="conversation", format_="float32", tokens=None, numbers=None, top=0):
    head = {"conversation": name, "step": step, "wire": format_, "top": top}
    head["tokens"] = len(states) if tokens is None else tokens
    body = json.dumps(head).encode() + b"\n" + (wire.encoded(states, format_) if numbers is None else numbers)
    return client.post("/hidden", content=body, headers={"content-type": "application/octet-stream"})
