"""The edge's client: servers that do everything wrong, the bytes of a request, a breaker on a clock of the test."""

import json
import socket
import threading
import time

import pytest
import torch

from edgelab import runtimes
from edgelab.deployments.hybrid.client.breaker import CircuitBreaker
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import (
    CircuitOpen,
    CloudBroken,
    CloudBusy,
    CloudDenied,
    CloudDown,
    CloudError,
    CloudGarbled,
    CloudRefused,
    CloudSlow,
)
from edgelab.errors import EdgeLabError
from edgelab.network import LOCAL

DEADLINE_S = 1.0
GRACE_S = 4.0  # of a busy machine, beyond the deadline

CHOICE = {"index": 0, "text": " ships", "token_ids": [5, 6], "finish_reason": "length", "logprobs": {
    "tokens": [" sh", "ips"], "token_logprobs": [-0.5, -1.0], "text_offset": [0, 3],
    "top_logprobs": [{" sh": -0.5, "a": -2.0}, {"ips": -1.0}]}}  # fmt: skip


def http(body: bytes | str | dict, status: int = 200, **headers: str) -> bytes:
    """A whole answer."""
    body = json.dumps(body) if isinstance(body, dict) else body
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} Said", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Server:
    """Answers one request after another, each as the next of `answers` says: bytes, or a function of the connection."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.connections = 0
        self.sent = 0
        self.place = socket.create_server((LOCAL, 0))
        self.url = f"http://{LOCAL}:{self.place.getsockname()[1]}"
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self):
        while self.answers:
            try:
                connection, _ = self.place.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                while self.answers and (request := self._read(connection)):
                    self.requests.append(request)
                    answer = self.answers.pop(0)
                    try:
                        if callable(answer):
                            answer(connection)
                            break
                        connection.sendall(answer)
                        self.sent += len(answer)
                    except OSError:
                        break

    def _read(self, connection) -> bytes:
        found = b""
        while b"\r\n\r\n" not in found:
            if not (more := connection.recv(65_536)):
                return b""
            found += more
        head, _, body = found.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0
        )
        while len(body) < length:
            body += connection.recv(65_536)
        return head + b"\r\n\r\n" + body

    def close(self):
        self.place.close()


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


def slowly(head: bytes):
    """One byte after the other, for much longer than the deadline."""

    def send(connection):
        for place in range(400):
            connection.sendall(head[place : place + 1] or b" ")
            time.sleep(0.05)

    return send


def silence(connection):
    connection.settimeout(20)
    while connection.recv(1000):
        pass


HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
GOOD = {"choices": [CHOICE]}


def without(name: str, value: object = None) -> dict:
    choice = {**CHOICE, name: value}
    return {"choices": [choice]}


WRONG = {
    "nothing": (lambda connection: None, CloudDown),
    "half a head": (lambda connection: connection.sendall(b"HTTP/1.1 200 O"), CloudGarbled),
    "half a body": (lambda connection: connection.sendall(HEAD + b'{"choices": ['), CloudGarbled),
    "half a chunk": (
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\n{"),
        CloudGarbled,
    ),
    "another protocol": (b"220 mail.example.org ESMTP\r\n", CloudGarbled),
    "no JSON": (http("<html>"), CloudGarbled),
    "no UTF-8": (http(b'{"choices": "\xff\xfe"}'), CloudGarbled),
    "deep": (http("[" * 100_000), CloudGarbled),
    "a list": (http("[1]"), CloudGarbled),
    "an empty object": (http({}), CloudGarbled),
    "no choice": (http({"choices": []}), CloudGarbled),
    "choices of another kind": (http({"choices": "none"}), CloudGarbled),
    "a text that is none": (http(without("text", 5)), CloudGarbled),
    "tokens that are none": (http(without("token_ids", [1, "2"])), CloudGarbled),
    "negative tokens": (http(without("token_ids", [-1, 2])), CloudGarbled),
    "too few tokens": (http(without("token_ids", [1])), CloudGarbled),
    "no reason to end": (http(without("finish_reason")), CloudGarbled),
    "NaN": (http(json.dumps(GOOD).replace("-0.5", "NaN")), CloudGarbled),
    "compressed": (http(b"\x1f\x8b" + bytes(50), content_encoding="gzip"), CloudGarbled),
    "a wrong token": (
        http({"error": {"message": "No.", "type": "a", "code": "invalid_token"}}, 401),
        CloudDenied,
    ),
    "a redirect": (http("", 307, location="http://other.example/"), CloudRefused),
    "a refusal": (http({"error": {"message": "Too long.", "type": "a", "code": "b"}}, 400), CloudRefused),
    "a fault": (http("Internal Server Error", 500), CloudBroken),
    "busy for long": (http({"error": {"message": "Later."}}, 429, retry_after="60"), CloudBusy),
    "silence": (silence, CloudSlow),
    "a slow head": (slowly(HEAD), CloudSlow),
    "a slow body": (lambda connection: (connection.sendall(HEAD), slowly(b"{")(connection)), CloudSlow),
}


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
        (f"https://{LOCAL}", {"certificate": "nowhere.pem"}, "no certificate"),
    ],
)
def test_a_client_that_cannot_be(url, settings, sentence):
    with pytest.raises(CloudError, match=sentence):
        Cloud(url, **{"token": "secret"} | settings)
    assert "secret" not in repr(Cloud(f"http://{LOCAL}", "secret"))


# The breaker


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def fails(error=CloudDown):
    def ask():
        raise error("It failed.")

    return ask


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return CircuitBreaker(failures=3, cool_down_s=10, clock=clock)


def trip(breaker, times=3):
    for _ in range(times):
        with pytest.raises(CloudDown):
            breaker.call(fails())


def test_it_opens_after_failures_in_a_row(breaker):
    trip(breaker, 2)
    assert breaker.call(lambda: 5) == 5  # which begins a new row
    trip(breaker, 2)
    assert breaker.state == "closed"
    trip(breaker, 1)
    assert breaker.state == "open"
    with pytest.raises(
        CircuitOpen, match=r"failed 3 times in a row and is not asked; it is again in 10\.0 s"
    ):
        breaker.call(lambda: pytest.fail("nothing goes through"))


def test_one_trial_after_the_cool_down(breaker, clock):
    trip(breaker)
    clock.now += 9.9
    with pytest.raises(CircuitOpen):
        breaker.enter()
    clock.now += 0.2
    assert breaker.state == "trial"
    breaker.enter()
    with pytest.raises(CircuitOpen, match="under way"):  # a second one is none
        breaker.enter()
    breaker.worked()
    assert breaker.state == "closed"
    trip(breaker, 2)
    assert breaker.state == "closed"


def test_a_trial_that_fails_opens_it_for_as_long_again(breaker, clock):
    trip(breaker)
    clock.now += 11
    trip(breaker, 1)
    assert breaker.state == "open"
    clock.now += 9
    with pytest.raises(CircuitOpen):
        breaker.enter()
    clock.now += 2
    assert breaker.call(lambda: "again") == "again"


def test_a_refusal_is_an_answer(breaker, clock):
    trip(breaker, 2)
    with pytest.raises(CloudRefused):
        breaker.call(lambda: (_ for _ in ()).throw(CloudRefused("Too long.", 400)))
    trip(breaker, 2)
    assert breaker.state == "closed"
    for error in (CloudSlow, CloudGarbled):
        breaker.worked()
        for _ in range(3):
            with pytest.raises(error):
                breaker.call(fails(error))
        assert breaker.state == "open"


def test_an_interrupted_trial_ends_it(breaker, clock):
    trip(breaker)
    clock.now += 11
    with pytest.raises(KeyboardInterrupt):
        breaker.call(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    clock.now += 11
    assert breaker.call(lambda: 1) == 1


def test_a_breaker_that_would_never_close():
    for change in ({"failures": 0}, {"cool_down_s": -1}, {"cool_down_s": float("nan")}):
        with pytest.raises(EdgeLabError, match=next(iter(change))):
            CircuitBreaker(**change)


def test_a_lone_trial_among_many_threads(breaker, clock):
    trip(breaker)
    clock.now += 11
    start, entered = threading.Barrier(20), []

    def enter():
        start.wait()
        try:
            breaker.enter()
            entered.append(1)
        except CircuitOpen:
            pass

    threads = [threading.Thread(target=enter) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1


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
        found = cloud.complete(prompt, 4, logprobs=3)
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
