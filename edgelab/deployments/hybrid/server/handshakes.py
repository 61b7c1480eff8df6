"""TLS agreed upon under a limit and a clock.

asyncio shows a TLS connection to nobody before the handshake is done, for which it gives a minute, so that any number
of connections on which nothing is said would be open meanwhile. Here a connection counts from its first moment.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

from edgelab.deployments.hybrid.server.connections import Guarded
from edgelab.deployments.hybrid.server.limits import Limits

log = logging.getLogger(__name__)

SPARE = 64  # connections beyond the limit, so that some who are too many can be told: that takes a handshake


class Handshake(asyncio.Protocol):
    """A connection until TLS is agreed upon, counted among all; then a `Guarded` one takes its place."""

    def __init__(self, *arguments: Any, limits: Limits, context: ssl.SSLContext, **settings: Any) -> None:
        self.limits = limits
        self._context = context
        self._guarded = Guarded(*arguments, limits=limits, **settings)
        self._transport: asyncio.Transport | None = None
        self._agreeing: asyncio.Task[None] | None = None
        self._early = bytearray()  # what comes between the end of the handshake and the next turn of the loop
        self._is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin the handshake, or end it all where there are far too many connections."""
        connections = self._guarded.connections
        if len(connections) >= self.limits.connections + SPARE:
            transport.abort()
            return
        connections.add(self)
        self._transport = transport
        transport.pause_reading()  # what comes is for TLS, which reads on
        self._agreeing = self._guarded.loop.create_task(self._agree(transport))

    def data_received(self, data: bytes) -> None:
        """Keep it for the one who reads requests."""
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        """Note it."""
        self._is_lost = True

    def shutdown(self) -> None:
        """What uvicorn calls at the end of the server."""
        self._transport.abort()

    async def _agree(self, transport: asyncio.Transport) -> None:
        try:
            secured = await self._guarded.loop.start_tls(
                transport, self, self._context, server_side=True, ssl_handshake_timeout=self.limits.head_s
            )
        except OSError as error:  # no TLS, none that both know, too slow, or gone
            log.debug("No handshake: %s", error)
            return
        finally:
            self._guarded.connections.discard(self)
        if secured is None or self._is_lost or secured.is_closing():
            transport.abort()
            return
        secured.set_protocol(self._guarded)
        self._guarded.connection_made(secured)
        if self._early:
            self._guarded.data_received(bytes(self._early))
