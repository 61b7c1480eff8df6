"""Bytes on a socket, plain or over TLS, and a server in a thread of the test that takes them."""

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial

import uvicorn

from edgelab.deployments.hybrid.server.connections import Guarded
from edgelab.deployments.hybrid.server.handshakes import Handshake
from edgelab.network import LOCAL

PATIENCE_S = 30  # for what should happen within a second or two, on a busy machine


def secured(connection: socket.socket) -> ssl.SSLSocket:
    """Over TLS, with whoever it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connection)


def say(
    place: tuple[str, int], *pieces: bytes, pause_s: float = 0.0, wrapped: Callable = lambda plain: plain
) -> tuple[int, bytes]:
    """Send pieces on a connection of its own; status and body of what comes back before it is closed, 0 for nothing."""
    with wrapped(socket.create_connection(place, PATIENCE_S)) as connection:
        found = b""
        connection.settimeout(0.001)
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break
            try:
                if not (more := connection.recv(65_536)):
                    break
                found += more
            except (TimeoutError, ssl.SSLWantReadError):
                time.sleep(pause_s)
            except OSError:
                break
        connection.settimeout(PATIENCE_S)
        try:
            while more := connection.recv(65_536):
                found += more
        except (ConnectionResetError, ssl.SSLEOFError):
            pass
    head, _, body = found.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def code(body: bytes) -> str:
    return json.loads(body)["error"]["code"]


def get(path: str, more: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: a\r\n{more}\r\n".encode()


LAST = get("/", "connection: close\r\n")


def told(connection: socket.socket) -> str:
    """The body of the next answer, and nothing of what follows it."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += (byte := connection.recv(1))
        assert byte, head
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    return b"".join(connection.recv(1) for _ in range(length)).decode()


def ended(connection: socket.socket) -> bytes:
    """What comes before the end."""
    connection.settimeout(PATIENCE_S)
    found = b""
    try:
        while more := connection.recv(65_536):
            found += more
    except ConnectionResetError:
        pass
    return found


class InThread:
    """uvicorn with `Guarded` connections in a thread of the test, around an application of the test."""

    def __init__(self, application, limits, context=None, keep_alive_s=5.0):
        self.place = socket.create_server((LOCAL, 0), backlog=1024)
        kind = Guarded if context is None else partial(Handshake, context=context)
        config = uvicorn.Config(
            application, http=partial(kind, limits=limits), ws="none", lifespan="off", log_config=None,
            timeout_keep_alive=keep_alive_s,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.place],))

    def __enter__(self):
        self.thread.start()
        return self.place.getsockname()

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()
