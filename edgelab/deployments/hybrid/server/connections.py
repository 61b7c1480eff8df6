"""Connections that come to an end: uvicorn's HTTP/1.1, with a clock for what it waits for without one.

uvicorn ends a connection that is idle between two requests. A head that comes byte by byte, a connection on which
nothing ever comes, one that takes no answer: those it keeps, and this does not.
"""

from __future__ import annotations

import asyncio
import http
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.deployments.hybrid.server.turns import busy

MARGIN_S = 5.0  # beyond the limits that the application keeps itself
CLOSING_S = 1.0  # for a last sentence to be taken


class Guarded(H11Protocol):
    """One connection. One clock runs at any time: until a head is there, an answer is out, or it is idle too long."""

    def __init__(self, *arguments: Any, limits: Limits, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.limits = limits
        self._clock: asyncio.TimerHandle | None = None
        self._waits_for_head = False

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
        if self.conn.their_state is not h11.IDLE:
            self._expect_answer()
        elif not self._waits_for_head:
            self._expect_head()

    def on_response_complete(self) -> None:
        """The answer is out: it has to be taken, and the next request to begin."""
        self._waits_for_head = False
        self._set(self.timeout_keep_alive + MARGIN_S, self.transport.abort)
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE and not self.transport.is_closing():
            self._expect_answer()  # the next request was there already

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the shape of all errors."""
        self._say(Refusal(400, "malformed_request", "This is no HTTP request that can be read."))

    def _expect_head(self) -> None:
        self._waits_for_head = True
        sentence = f"The head of a request was not there after {self.limits.head_s:g} s."
        self._set(self.limits.head_s, lambda: self._say(Refusal(408, "slow_head", sentence, "timeout")))

    def _expect_answer(self) -> None:
        if self._waits_for_head or self._clock is None:
            self._waits_for_head = False
            self._set(self.limits.body_s + self.limits.request_s + MARGIN_S, self.transport.abort)

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
        self._set(CLOSING_S, self.transport.abort)

    def _set(self, seconds: float, then: Callable[[], object]) -> None:
        self._stop()
        self._clock = self.loop.call_later(seconds, then)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
