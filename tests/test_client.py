"""The edge's client: servers that do everything wrong, and the bytes of a request."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from edgelab import runtimes
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import (
    CloudBroken,
    CloudBusy,
    CloudDenied,
    CloudDown,
    CloudError,
    CloudGarbled,
    CloudRefused,
    CloudSlow,
)
from edgelab.network import LOCAL
from tests.wrong_servers import CHOICE, DEADLINE_S, GOOD, GRACE_S, HEAD, WRONG, Server, http


@pytest.fixture
def server():
    made = []

    def make(*answers):
        made.append(Server(*answers))
        return made[-1]

    yield make
    for one in made:
        one.close()


def cloud_of(server, **settings):
    return Cloud(server.url, "secret", **{"deadline_s": DEADLINE_S} | settings)


# What comes back


def test_a_completion_and_its_bytes(server):
    one = server(http({"choices": [CHOICE]}), http({"choices": [CHOICE]}))
    with cloud_of(one, model="tiny") as cloud:
        for turn in (0, 1):
            found = cloud.complete([3, 4], 2, logprobs=2, stop=["x"])
            assert (found.text, found.ids, found.logprobs) == (" ships", [5, 6], [-0.5, -1.0])
            assert found.top == CHOICE["logprobs"]["top_logprobs"]
            assert found.finish == "length"
            assert found.sent_bytes == len(one.requests[turn])
            assert found.received_bytes == one.sent / (turn + 1)
            assert found.seconds > 0
    assert one.connections == 1
    head, _, body = one.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Bearer secret" in head
    assert b"secret" not in head.split(b"\r\n")[0]
    asked = {
        "prompt": [3, 4],
        "max_tokens": 2,
        "temperature": 0.0,
        "logprobs": 2,
        "model": "tiny",
        "stop": ["x"],
    }
    assert json.loads(body) == asked


def test_a_chat_in_the_newer_shape(server):
    content = [
        {
            "id": 7,
            "token": "A",
            "logprob": -0.25,
            "bytes": [65],
            "top_logprobs": [{"token": "A", "logprob": -0.25}],
        }
    ]
    choice = {
        "message": {"role": "assistant", "content": "A"},
        "finish_reason": "stop",
        "logprobs": {"content": content},
    }
    one = server(http({"choices": [choice]}))
    with cloud_of(one) as cloud:
        found = cloud.chat([{"role": "user", "content": "?"}], logprobs=1)
    assert (found.text, found.ids, found.logprobs, found.top) == ("A", [7], [-0.25], [{"A": -0.25}])
    assert json.loads(one.requests[0].partition(b"\r\n\r\n")[2])["top_logprobs"] == 1


def test_no_logprobs_and_no_ids_where_none_are_told(server):
    one = server(http({"choices": [{"text": "a", "finish_reason": "stop"}]}))
    with cloud_of(one) as cloud:
        found = cloud.complete("b")
    assert (found.ids, found.logprobs, found.top) == (None, None, None)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (http({"status": "ok", "tokenizer": "0123456789abcdef"}), "0123456789abcdef"),
        (http({"status": "ok"}), None),
        (http({"status": "ok", "tokenizer": 5}), None),
        (http(""), None),
        (http({"detail": "Not Found"}, 404), None),
        (http({"error": {"message": "No."}}, 401), CloudDenied),
        (http("", 500), CloudBroken),
    ],
)
def test_which_tokens_there_are(server, answer, told):
    """None where a server says none; one that does not answer, or not us, has said nothing about them."""
    with cloud_of(server(answer)) as cloud:
        if isinstance(told, type):
            with pytest.raises(told):
                cloud.vocabulary()
        else:
            assert cloud.vocabulary() == told


def events(*data: str) -> str:
    return "".join(f"data: {one}\n\n" for one in data)


def piece(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"text": text, "token_ids": [1], "finish_reason": finish}]})


def test_a_stream_comes_in_pieces(server):
    said = ": a comment\n\n" + events(piece("«"), piece("é "), piece("", "stop"), "[DONE]")
    one = server(http(said), http(said.replace("\n", "\r\n")), http({"choices": [CHOICE]}))
    with cloud_of(one) as cloud:
        for _ in range(2):
            found = list(cloud.stream("a"))
            assert [each.text for each in found] == ["«", "é ", ""]
            assert [each.finish for each in found] == [None, None, "stop"]
        assert cloud.complete("a").ids == [5, 6]
    assert one.connections == 1


def test_whoever_leaves_a_stream_can_go_on(server):
    def begin(connection):
        connection.sendall(HEAD + events(piece("a")).encode())
        assert connection.recv(1000) == b""  # the client hangs up

    one = server(begin, http({"choices": [CHOICE]}))
    with cloud_of(one) as cloud:
        pieces = cloud.stream("a")
        next(pieces)
        pieces.close()
        assert cloud.complete("a").ids == [5, 6]
    assert one.connections == 2


def test_a_connection_that_was_closed_while_it_was_idle_costs_no_request(server):
    one = server(
        http(GOOD), lambda connection: None, http(GOOD), lambda connection: None, lambda connection: None
    )
    with cloud_of(one) as cloud:
        assert cloud.complete("a").ids == [5, 6]
        assert cloud.complete("a").ids == [5, 6]
        assert (one.connections, len(one.requests)) == (2, 3)
        with pytest.raises(CloudDown, match="hung up"):  # a new connection, too: that is no idle one
            cloud.complete("a")
    assert len(one.requests) == 5


# What goes wrong


@pytest.mark.parametrize("case", WRONG)
def test_whatever_goes_wrong_is_one_sentence_within_the_deadline(server, case):
    answer, kind = WRONG[case]
    one = server(answer)
    began = time.monotonic()
    with cloud_of(one) as cloud, pytest.raises(CloudError) as raised:
        cloud.complete("a", logprobs=1)
    assert time.monotonic() - began < DEADLINE_S + GRACE_S
    assert type(raised.value) is kind
    assert str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
    str(raised.value).encode()
    assert len(one.requests) == 1  # whatever it is, nothing is asked twice


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (events(piece("a"), piece("b", "stop")), CloudGarbled),  # without its end
        (events(piece("a")) + "data: {", CloudGarbled),
        (events(piece("a"), "{", "[DONE]"), CloudGarbled),
        (events(piece("a"), "{}", "[DONE]"), CloudGarbled),
        (events(piece("a")) + "<html>\n", CloudGarbled),
        (
            events(piece("a"), json.dumps({"error": {"message": "No more.", "type": "a", "code": "b"}})),
            CloudBroken,
        ),
    ],
)
def test_a_stream_that_breaks_off_is_noticed(server, said, kind):
    with cloud_of(server(http(said))) as cloud:
        pieces = cloud.stream("a")
        assert next(pieces).text == "a"
        with pytest.raises(kind):
            list(pieces)


def test_a_stream_keeps_to_the_deadline(server):
    def drip(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(200):
            connection.sendall(events(piece("a")).encode())
            time.sleep(0.05)

    began = time.monotonic()
    with cloud_of(server(drip)) as cloud, pytest.raises(CloudSlow):
        list(cloud.stream("a"))
    assert time.monotonic() - began < DEADLINE_S + GRACE_S


def test_an_answer_without_end_is_not_kept(server, monkeypatch):
    monkeypatch.setattr("edgelab.deployments.hybrid.client.answers.LARGEST_ANSWER", 100_000)

    def pour(connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b" " * 10_000)

    with (
        cloud_of(server(pour), deadline_s=30) as cloud,
        pytest.raises(CloudGarbled, match="more than 100000 bytes"),
    ):
        cloud.complete("a")


@pytest.mark.parametrize("begun", [0, 30, 120])
def test_a_connection_that_is_cut_ends_the_request(server, begun):
    """Before the answer, in its head, and in its body; whoever asks then is told so until it is mended."""
    whole, reached = http({"choices": [CHOICE]}), threading.Event()

    def hang(connection):
        connection.sendall(whole[:begun])
        reached.set()
        connection.recv(1)

    one = server(hang, whole)
    with cloud_of(one, deadline_s=60) as cloud, ThreadPoolExecutor(1) as other:
        asked = other.submit(cloud.complete, "a")
        reached.wait()
        cloud.cut()
        for ask in (asked.result, lambda: cloud.complete("a")):
            with pytest.raises(CloudDown, match="the connection was cut"):
                ask()
        assert len(one.requests) == 1
        cloud.mend()
        assert cloud.complete("a").text == " ships"


def test_a_connection_that_is_cut_while_nobody_asks_costs_no_request(server):
    one = server(*[http({"choices": [CHOICE]})] * 2)
    with cloud_of(one) as cloud:
        cloud.complete("a")
        cloud.cut()
        cloud.mend()
        assert cloud.complete("a").text == " ships"
    assert one.connections == 2


def test_whoever_waits_for_a_busy_server_is_cut_off_too(server):
    one = server(http({"error": {"message": "Later."}}, 429, retry_after="50"))
    with cloud_of(one, deadline_s=100) as cloud, ThreadPoolExecutor(1) as other:
        asked = other.submit(cloud.complete, "a")
        while not one.sent:
            time.sleep(0.01)
        cloud.cut()
        with pytest.raises(CloudDown, match="the connection was cut"):
            asked.result()


def test_nobody_there():
    with socket.create_server((LOCAL, 0)) as place:
        port = place.getsockname()[1]
    with (
        Cloud(f"http://{LOCAL}:{port}", deadline_s=DEADLINE_S) as cloud,
        pytest.raises(CloudDown, match="reached"),
    ):
        cloud.health()


def test_nobody_answers_the_call():
    """A full queue of connections: the handshake itself is never answered."""
    with socket.socket() as place:
        place.bind((LOCAL, 0))
        place.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for one in fillers:
            one.setblocking(False)
            one.connect_ex(place.getsockname())
        time.sleep(0.1)
        began = time.monotonic()
        url = f"http://{LOCAL}:{place.getsockname()[1]}"
        with Cloud(url, deadline_s=DEADLINE_S) as cloud, pytest.raises(CloudError) as raised:
            cloud.health()
        assert type(raised.value) in (CloudSlow, CloudDown)
        assert time.monotonic() - began < DEADLINE_S + GRACE_S
        for one in fillers:
            one.close()


def test_a_busy_server_is_asked_again_when_it_says(server):
    busy = http({"error": {"message": "Later.", "type": "a", "code": "busy"}}, 429, retry_after="1")
    one = server(busy, busy, http(GOOD), busy)
    with cloud_of(one, deadline_s=30) as cloud:
        found = cloud.complete("a")
        assert found.ids == [5, 6]
        assert found.seconds >= 2
        assert found.sent_bytes == sum(map(len, one.requests))
    with cloud_of(one, deadline_s=30, waits=False) as cloud, pytest.raises(CloudBusy) as raised:
        cloud.complete("a")
    assert raised.value.retry_s == 1
    assert raised.value.code == "busy"


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"step": 0, "accepted": 1, "next": 7}, None),
        ({"step": 1, "accepted": 1, "next": 7}, CloudGarbled),
        ({"step": 0, "accepted": 3, "next": 7}, CloudGarbled),
        ({"step": 0, "accepted": -1, "next": 7}, CloudGarbled),
        ({"step": 0, "accepted": 1}, CloudGarbled),
        ({"step": 0, "accepted": 1, "next": 7.5}, CloudGarbled),
    ],
)
def test_an_answer_to_a_draft_is_checked(server, told, kind):
    one = server(http(told))
    with cloud_of(one) as cloud:
        if kind is None:
            found = cloud.verify("conversation", 0, [1, 2], prompt=[5])
            assert (found.accepted, found.next) == (1, 7)
            assert found.cost.sent_bytes == len(one.requests[0])
        else:
            with pytest.raises(kind):
                cloud.verify("conversation", 0, [1, 2], prompt=[5])


def test_what_the_server_would_refuse_is_not_sent(server):
    one = server(http({}))
    with cloud_of(one) as cloud:
        for ask in (
            lambda: cloud.verify("no name", 0, [1], prompt=[5]),
            lambda: cloud.verify("conversation", -1, [1]),
            lambda: cloud.hidden("conversation", 0, torch.zeros(0, 64)),
        ):
            with pytest.raises(CloudRefused, match="takes no such request"):
                ask()
    assert not one.requests


@pytest.mark.parametrize(
    ("url", "settings", "sentence"),
    [
        ("ftp://a", {}, "no address of a server"),
        ("edge:80", {}, "no address of a server"),
        ("http://", {}, "no address of a server"),
        ("http://cloud.example", {}, "in clear"),
        ("http://10.0.0.1", {}, "in clear"),
        (f"http://{LOCAL}", {"token": "a\nb"}, "no header may"),
        (f"http://{LOCAL}", {"deadline_s": 0}, "above 0"),
        (f"http://{LOCAL}", {"deadline_s": float("inf")}, "above 0"),
        (
            f"http://{LOCAL}",
            {"deadline_s": 1e10},
            "deadline_s=10000000000.0 should be above 0 and at most 86400",
        ),
        (f"https://{LOCAL}", {"certificate": "nowhere.pem"}, "no certificate"),
    ],
)
def test_a_client_that_cannot_be(url, settings, sentence):
    with pytest.raises(CloudError, match=sentence):
        Cloud(url, **{"token": "secret"} | settings)
    assert "secret" not in repr(Cloud(f"http://{LOCAL}", "secret"))


# With a server that somebody else wrote


def test_it_speaks_to_the_server_of_llama_cpp(variant, byte_tokenizer):
    """llama.cpp's own server, out of the wheel of the engine, over the same weights as a session of ours."""
    xllamacpp = pytest.importorskip("xllamacpp")
    folder = variant("none")
    export = runtimes.exported("llamacpp", folder).folder
    params = xllamacpp.CommonParams()
    params.model.path = str(export / "model.gguf")
    params.port, params.n_ctx, params.n_parallel, params.warmup = 0, 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server, session = xllamacpp.Server(params), runtimes.load("llamacpp", folder)
    prompt = [5, 100, 42, 7]
    with Cloud(server.listening_address, deadline_s=60) as cloud:
        assert cloud.vocabulary() is None
        found = cloud.complete(prompt, 4, logprobs=3)
        assert (found.read, found.written) == (4, 4)
        ids = [session.prefill(prompt)]
        while len(ids) < 6:
            ids.append(session.decode(ids[-1]))
        # llama.cpp leaves tokens out where one is a part of a character, and then nobody knows which they are
        assert cloud.complete(prompt, 6, logprobs=3).ids in (ids, None)
        ids = ids[:4]
        assert found.ids == ids
        logprobs = session.logits(prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(logprobs, ids, strict=True)]
        assert found.logprobs == pytest.approx(expected, abs=0.1)
        assert [max(one.values()) for one in found.top] == pytest.approx(expected, abs=0.1)
        assert "".join(piece.text for piece in cloud.stream(prompt, 4)) == found.text
        assert cloud.chat([{"role": "user", "content": "Ships?"}], 4).finish in ("stop", "length")
    session.close()
    del server
