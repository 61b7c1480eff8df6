"""One connection to the cloud that counts its bytes and keeps to a deadline, for httpx.

httpx limits each read and each write, so that a server which sends a byte now and then is waited for without end. Here
one deadline holds for all of a request: looking up and reaching the server, sending, and every byte of the answer.
(Looking up a name takes what the system's resolver takes.) Bytes are those of HTTP, heads too; TLS adds its own.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpcore
import httpx

PIECE = 16_384  # bytes sent at once, each within the deadline
KEPT_S = 4.0  # an idle connection: less than the 5 s after which the server closes it


@dataclass
class Meter:
    """Bytes of all requests so far, connections opened for them, and until when the one that runs may take.

    until: in seconds of the monotonic clock. open: the last connection. is_cut: nothing is sent and nothing read,
    whatever time is left.
    """

    sent: int = 0
    received: int = 0
    opened: int = 0
    until: float = 0.0
    open: httpcore.NetworkStream | None = None
    is_cut: threading.Event = field(default_factory=threading.Event)

    def cut(self) -> None:
        """End the connection; a thread that reads or writes on it goes on at once, with NetworkError."""
        self.is_cut.set()
        if (stream := self.open) is not None:
            with suppress(OSError):  # it has ended already
                stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def left(self, late: type[Exception]) -> float:
        """Seconds that are left. Raises `late` where none are, and NetworkError where the connection was cut."""
        self.check()
        left = self.until - time.monotonic()
        if left <= 0:
            raise late("The deadline has passed.")
        return left

    def check(self) -> None:
        """Raises NetworkError where the connection was cut."""
        if self.is_cut.is_set():
            raise httpcore.NetworkError("the connection was cut")


class _Counted(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream, meter: Meter) -> None:
        self._stream, self._meter = stream, meter

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        found = self._stream.read(max_bytes, self._meter.left(httpcore.ReadTimeout))
        self._meter.received += len(found)
        self._meter.check()  # a connection that is cut reads as one that has ended
        return found

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for begin in range(0, len(buffer), PIECE):
            piece = buffer[begin : begin + PIECE]
            self._stream.write(piece, self._meter.left(httpcore.WriteTimeout))
            self._meter.sent += len(piece)

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = self._meter.left(httpcore.ConnectTimeout)
        self._meter.open = self._stream.start_tls(ssl_context, server_hostname, left)
        return _Counted(self._meter.open, self._meter)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Network(httpcore.NetworkBackend):
    def __init__(self, meter: Meter) -> None:
        self._meter, self._plain = meter, httpcore.SyncBackend()

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:  # fmt: skip
        left = self._meter.left(httpcore.ConnectTimeout)
        self._meter.opened += 1
        self._meter.open = self._plain.connect_tcp(host, port, left, local_address, socket_options)
        return _Counted(self._meter.open, self._meter)


class _Body(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        yield from self._answer.stream

    def close(self) -> None:
        self._answer.close()


class CountingTransport(httpx.BaseTransport):
    """One connection at a time, kept open between requests. Errors are httpcore's."""

    def __init__(self, meter: Meter, certificate: str = "") -> None:
        """certificate: a file in PEM to trust in place of the system's authorities."""
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl.create_default_context(cafile=certificate or None),
            max_connections=1,
            keepalive_expiry=KEPT_S,
            network_backend=_Network(meter),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; the answer's body is read as it is asked for."""
        answer = self._pool.handle_request(
            httpcore.Request(
                method=request.method,
                url=httpcore.URL(
                    scheme=request.url.raw_scheme,
                    host=request.url.raw_host,
                    port=request.url.port,
                    target=request.url.raw_path,
                ),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions
        )

    def close(self) -> None:
        """Hang up."""
        self._pool.close()
