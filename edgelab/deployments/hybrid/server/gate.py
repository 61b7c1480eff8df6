"""What every request passes before anything is read of it: the token, and the size and the clock of its body.

The token comes in the header Authorization, `Bearer TOKEN`, and nowhere else; it is compared in constant time and
written nowhere. Bytes of a body are counted as they come, whatever its head says of them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import TYPE_CHECKING

from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Gate:
    """An ASGI application in front of another one."""

    def __init__(self, app: ASGIApp, token: str, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_token(scope)
            body = await self._body(scope, receive)
        except Refusal as refusal:
            await refuse(send, refusal, {"connection": "close"})  # whatever else comes belongs to no request
            return
        except ClientGone:
            return
        await self.app(scope, _replayed(body, receive), send)

    def _check_token(self, scope: Scope) -> None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if not secrets.compare_digest(token.strip(), self._token) or scheme.lower() != b"bearer":
            raise Refusal(
                401,
                "invalid_token",
                "The header Authorization has to hold 'Bearer' and the token that the server was started with.",
                "authentication_error",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self.limits.body_bytes
        too_large = Refusal(413, "body_too_large", f"A body may have {most} bytes, and this one has more.")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit():
            raise Refusal(400, "invalid_length", "The header Content-Length has to be a number of bytes.")
        if len(length) > 18 or int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                408, "slow_body", f"The body was not there after {self.limits.body_s:g} s.", "timeout"
            ) from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, and then what else happens to the connection."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def refuse(send: Send, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
    """Answer with an error in OpenAI's shape."""
    body = json.dumps(refusal.body()).encode()
    told = {"content-type": "application/json", "content-length": str(len(body))}
    told |= refusal.headers() | (headers or {})
    if refusal.status == 401:
        told["www-authenticate"] = "Bearer"
    pairs = [(name.encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
