"""Connections that come to an end: uvicorn's HTTP/1.1, with a clock for what it waits for without one.

uvicorn ends a connection that is idle between two requests. A head that comes byte by byte, a connection on which
nothing ever comes, one that takes no answer: those it keeps, and this does not.
"""

from __future__ import annotations

import asyncio
import http
import json
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.deployments.hybrid.server.turns import busy

MARGIN_S = 5.0  # beyond the limits that the application keeps itself
CLOSING_S = 1.0  # for a last sentence to be taken


class _Until(Enum):
    """What the clock of a connection runs for."""

    BEGUN = auto()  # something comes: the first request, or the next one
    HEAD = auto()
    ANSWERED = auto()
    CLOSED = auto()


class Guarded(H11Protocol):
    """One connection. One clock runs at any time: until a head is there, an answer is out, or it is idle too long.

    Every head and every answer has a clock of its own, whether a request comes after the answer to the one before it
    or together with it.
    """

    def __init__(self, *arguments: Any, limits: Limits, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.limits = limits
        self._clock: asyncio.TimerHandle | None = None
        self._until = _Until.BEGUN

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._say(busy(1))
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Read on, and see what is expected now."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._is_asked:
            self._expect_answer()
        elif self.conn.their_state is h11.IDLE:
            self._expect_head()

    def on_response_complete(self) -> None:
        """The answer is out: it has to be taken, and the next request to begin."""
        if self._until is not _Until.CLOSED:
            self._set(_Until.BEGUN, self.timeout_keep_alive + MARGIN_S, self.transport.abort)
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._is_asked:  # the next request was there already
            self._expect_answer()
        elif self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # a part of its head was
            self._unset_keepalive_if_required()
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the shape of all errors."""
        self._say(Refusal(400, "malformed_request", "This is no HTTP request that can be read."))

    @property
    def _is_asked(self) -> bool:
        """Whether a request has begun whose answer is not out."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._until is _Until.HEAD:
            return
        sentence = f"The head of a request was not there after {self.limits.head_s:g} s."
        slow = Refusal(408, "slow_head", sentence, "timeout")
        self._set(_Until.HEAD, self.limits.head_s, lambda: self._say(slow))

    def _expect_answer(self) -> None:
        if self._until is not _Until.ANSWERED:
            most = self.limits
            seconds = most.body_s + most.waiting_s + most.request_s + MARGIN_S
            self._set(_Until.ANSWERED, seconds, self.transport.abort)

    def _say(self, refusal: Refusal) -> None:
        """A last sentence, where no answer has begun, and the end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refusal.body())
            told = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            lines = [f"{name}: {value}" for name, value in (told | refusal.headers()).items()]
            status = f"HTTP/1.1 {refusal.status} {http.HTTPStatus(refusal.status).phrase}"
            self.transport.write("\r\n".join([status, *lines, "", body]).encode())
        self.transport.close()
        self._set(_Until.CLOSED, CLOSING_S, self.transport.abort)

    def _set(self, until: _Until, seconds: float, then: Callable[[], object]) -> None:
        self._stop()
        self._until, self._clock = until, self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
