"""Answers as server-sent events, and work that ends where the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from edgelab.deployments.hybrid.server.gate import ClientGone
from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.errors import EdgeLabError

log = logging.getLogger(__name__)

T = TypeVar("T")
EVENTS = "text/event-stream"
AT_FAULT = "Something went wrong in the server; its log says what."
Tell = Callable[[dict[str, Any]], None]


class Events(Response):
    """An answer as server-sent events. Nobody who computes waits for a client that reads slowly.

    write: computes, and tells each message as it comes. What it refuses before the first one is an answer like others.
    """

    def __init__(self, write: Callable[[Tell], Awaitable[object]]) -> None:
        super().__init__(media_type=EVENTS, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await until_gone(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        pieces: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        writing = asyncio.ensure_future(self._write(pieces.put_nowait))
        writing.add_done_callback(lambda done: pieces.put_nowait(None))
        has_begun = False
        try:
            while (piece := await pieces.get()) is not None:
                if not has_begun:
                    has_begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event(piece), "more_body": True})
            try:
                await writing
                last = b"data: [DONE]\n\n"
            except Exception as error:
                if not has_begun:
                    raise
                last = event((error if isinstance(error, Refusal) else unable(error)).body())
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled where the client leaves first. Raises ClientGone then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(message: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"


def unable(error: Exception) -> Refusal:
    """What is told of something that went wrong here."""
    log.error("A request could not be answered", exc_info=error)
    sentence = str(error) if isinstance(error, EdgeLabError) else AT_FAULT
    return Refusal(500, "server_error", sentence, "server_error")
