"""Connections one by one: the clock of each request, too many of them, and those on which nothing is agreed upon."""

import asyncio
import socket
import ssl
import time
from contextlib import ExitStack

import pytest

from edgelab.deployments.hybrid.server import serving
from edgelab.deployments.hybrid.server.handshakes import SPARE
from edgelab.deployments.hybrid.server.limits import Limits
from tests.server.sockets import LAST, PATIENCE_S, InThread, code, ended, get, say, secured, told


async def answer_much(scope, receive, send):
    """More than any buffer on the way holds."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(400):
        await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def fine(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def slow_or_never(scope, receive, send):
    """/slow takes longer than an idle connection is kept, and /never is not answered."""
    if scope["path"] == "/slow":
        await asyncio.sleep(1.5)
    while scope["path"] == "/never" and (await receive())["type"] != "http.disconnect":
        pass
    body = scope["path"].encode()
    head = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize("together", [False, True])
def test_every_answer_of_a_connection_has_its_time(monkeypatch, together):
    monkeypatch.setattr("edgelab.deployments.hybrid.server.connections.MARGIN_S", 0.2)
    limits = Limits(head_s=PATIENCE_S, body_s=PATIENCE_S, request_s=PATIENCE_S)
    paths = ["/quick", "/slow", "/quick", "/slow"]
    with (
        InThread(slow_or_never, limits, keep_alive_s=0.3) as place,
        socket.create_connection(place, PATIENCE_S) as one,
    ):
        if together:
            one.sendall(b"".join(map(get, paths)))
        for path in paths:
            if not together:
                one.sendall(get(path))
            assert told(one) == path
        assert ended(one) == b""  # idle


@pytest.mark.parametrize("together", [False, True])
def test_an_answer_that_never_comes_ends_the_connection(monkeypatch, together):
    monkeypatch.setattr("edgelab.deployments.hybrid.server.connections.MARGIN_S", 0.1)
    limits = Limits(body_s=0.1, waiting_s=0.1, request_s=0.2)
    with (
        InThread(slow_or_never, limits, keep_alive_s=600) as place,
        socket.create_connection(place, PATIENCE_S) as one,
    ):
        one.sendall(get("/quick") + get("/never") * together)
        assert told(one) == "/quick"
        if not together:
            one.sendall(get("/never"))
        assert ended(one) == b""


def test_a_head_that_had_begun_has_its_time_after_the_answer():
    with (
        InThread(slow_or_never, Limits(head_s=0.5), keep_alive_s=600) as place,
        socket.create_connection(place, PATIENCE_S) as one,
    ):
        one.sendall(get("/slow") + get("/quick")[:10])
        assert told(one) == "/slow"
        assert code(ended(one).partition(b"\r\n\r\n")[2]) == "slow_head"


def test_one_connection_too_many_is_asked_to_come_again():
    with InThread(fine, Limits(connections=2, head_s=60)) as place:
        with socket.create_connection(place), socket.create_connection(place):
            status, body = say(place)
            assert (status, code(body)) == (429, "busy")
        deadline = time.monotonic() + PATIENCE_S
        while (found := say(place, LAST)[0]) == 429:
            assert time.monotonic() < deadline
        assert found == 204


def test_whoever_does_not_take_the_answer_is_left(monkeypatch):
    monkeypatch.setattr("edgelab.deployments.hybrid.server.connections.MARGIN_S", 0.1)
    with (
        InThread(answer_much, Limits(body_s=0.1, waiting_s=0.1, request_s=0.2)) as place,
        socket.create_connection(place) as one,
    ):
        one.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        time.sleep(2)  # takes nothing meanwhile
        one.settimeout(PATIENCE_S)
        size = 0
        with pytest.raises(ConnectionResetError):
            while more := one.recv(1 << 20):
                size += len(more)
            raise ConnectionResetError  # an end in the middle is one, too
        assert size < 400 * 100_000


# What arrives over TLS


@pytest.fixture(scope="module")
def context(certificate):
    return serving.tls_context(*certificate)


@pytest.mark.parametrize(
    "sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"\x16\x03\x01\x02\x00\x01"]
)
def test_a_handshake_that_is_not_finished_is_ended(context, sent):
    with InThread(fine, Limits(head_s=0.5), context) as place:
        with socket.create_connection(place) as one:
            one.sendall(sent)
            assert len(ended(one)) < 20  # an alert of TLS, if anything
        assert say(place, LAST, wrapped=secured)[0] == 204


def test_over_tls_heads_and_answers_have_their_time(context, monkeypatch):
    monkeypatch.setattr("edgelab.deployments.hybrid.server.connections.MARGIN_S", 0.1)
    with InThread(
        slow_or_never, Limits(head_s=0.5, body_s=0.1, waiting_s=0.1, request_s=0.2), context
    ) as place:
        for pieces in ((), (get("/quick")[:10],), [get("/quick")[at : at + 1] for at in range(20)]):
            status, body = say(place, *pieces, wrapped=secured, pause_s=0.1)
            assert (status, code(body)) == (408, "slow_head")
        assert say(place, get("/never"), wrapped=secured) == (0, b"")
        with secured(socket.create_connection(place, PATIENCE_S)) as one:
            one.sendall(get("/quick") * 2)
            assert [told(one), told(one)] == ["/quick"] * 2


def test_a_request_with_the_end_of_the_handshake_is_answered(context):
    """The client's last message of TLS 1.3 and its request come in one piece."""
    outer = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    outer.check_hostname, outer.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = outer.wrap_bio(incoming, outgoing)
    with (
        InThread(slow_or_never, Limits(), context) as place,
        socket.create_connection(place, PATIENCE_S) as one,
    ):
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                one.sendall(outgoing.read())
                incoming.write(one.recv(65_536))
        client.write(get("/quick"))
        one.sendall(outgoing.read())
        found = b""
        while not found.endswith(b"/quick"):
            try:
                found += client.read(65_536)
            except ssl.SSLWantReadError:
                more = one.recv(65_536)
                assert more, found
                incoming.write(more)
        assert found.startswith(b"HTTP/1.1 200")


def test_connections_count_before_tls_is_agreed_upon(context):
    limits = Limits(connections=2, head_s=60)
    with InThread(fine, limits, context) as place, ExitStack() as silent:
        for _ in range(2):
            silent.enter_context(socket.create_connection(place))
        status, body = say(place, wrapped=secured)
        assert (status, code(body)) == (429, "busy")
        for _ in range(SPARE):
            silent.enter_context(socket.create_connection(place))
        with socket.create_connection(place) as one:
            assert ended(one) == b""  # at once: the others are still silent
        silent.close()
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert time.monotonic() < deadline
            try:
                if say(place, LAST, wrapped=secured)[0] == 204:
                    break
            except OSError:
                time.sleep(0.01)


def test_silent_connections_do_not_hold_up_the_end(context):
    with InThread(fine, Limits(head_s=600), context) as place:
        one = socket.create_connection(place)
    with one:
        assert ended(one) == b""
