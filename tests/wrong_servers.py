"""Servers that answer whatever a test says, and all the wrong answers that a client has to live with."""

import json
import socket
import threading
import time

from edgelab.deployments.hybrid.client.failures import (
    CloudBroken,
    CloudBusy,
    CloudDenied,
    CloudDown,
    CloudGarbled,
    CloudLacking,
    CloudRefused,
    CloudSlow,
)
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
    "a token that may not": (http({"error": {"message": "No.", "type": "a", "code": "b"}}, 403), CloudDenied),
    "a redirect": (http("", 307, location="http://other.example/"), CloudLacking),
    "no such thing": (http({"detail": "Not Found"}, 404), CloudLacking),
    "a conversation that is gone": (
        http({"error": {"message": "No.", "type": "a", "code": "unknown_conversation"}}, 404),
        CloudRefused,
    ),
    "half a character": (http(without("text", "\ud800")), CloudGarbled),
    "a number that is too large": (http(json.dumps(GOOD).replace("-0.5", "-1" + "0" * 400)), CloudGarbled),
    "a refusal of two lines": (http({"error": {"message": "\ud800 Too\nlong."}}, 400), CloudRefused),
    "tokens that are not counted": (http(GOOD | {"usage": {"completion_tokens": 1.5}}), CloudGarbled),
    "a refusal": (http({"error": {"message": "Too long.", "type": "a", "code": "b"}}, 400), CloudRefused),
    "a fault": (http("Internal Server Error", 500), CloudBroken),
    "busy for long": (http({"error": {"message": "Later."}}, 429, retry_after="60"), CloudBusy),
    "silence": (silence, CloudSlow),
    "a slow head": (slowly(HEAD), CloudSlow),
    "a slow body": (lambda connection: (connection.sendall(HEAD), slowly(b"{")(connection)), CloudSlow),
}
