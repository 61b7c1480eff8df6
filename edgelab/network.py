"""What connects two devices: links by name, and a proxy that makes a TCP connection as slow as one.

A link has a rate each way, a round-trip time, jitter, loss, and outages. The proxy holds back every byte of real
traffic until the link would have delivered it, so that no rights of the system are needed. TCP hides a lost packet as a
stall of about two round trips, and so does the proxy. In an outage nothing moves either way; TCP goes on behind it.

A message of n bytes arrives after n / rate + round trip / 2: the last byte leaves at the end of n / rate, and every
byte is half a round trip on its way.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from edgelab import csv_files
from edgelab.assets import data_dir
from edgelab.errors import EdgeLabError

T = TypeVar("T")
PIECE = 16_384  # bytes that are read at once, at most
SLICE_S = 0.002  # of sending time is handed on at once: shorter sleeps are not kept
STALL_ROUND_TRIPS = 2.0  # that a lost packet costs
PACKET = 1500  # bytes
LOCAL = "127.0.0.1"


class LinkError(EdgeLabError):
    """A link that nobody knows, or with figures that no link has."""


@dataclass(frozen=True)
class Link:
    """Rates in megabits per second, towards the device (down) and from it (up); times in ms; loss as a share.

    outage_s: how long an outage lasts, 0 where there are none. between_outages_s: from the end of one to the next, on
    average, as a Poisson process.
    """

    name: str
    down_mbps: float
    up_mbps: float
    round_trip_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    source: str = ""
    outage_s: float = 0.0
    between_outages_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("down_mbps", "up_mbps", "between_outages_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise LinkError(
                    f"Link {self.name}: {name} is {getattr(self, name)} and should be above 0 and finite; leave the "
                    "link out where there is none."
                )
        for name in ("round_trip_ms", "jitter_ms", "outage_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LinkError(
                    f"Link {self.name}: {name} is {getattr(self, name)} and should be at least 0 and finite."
                )
        if not 0 <= self.loss < 1:
            raise LinkError(f"Link {self.name}: loss is {self.loss} and should be 0 to below 1.")

    def up_s(self, size: int) -> float:
        """Seconds until `size` bytes have arrived at the other end."""
        return size * 8 / (self.up_mbps * 1e6) + self.round_trip_ms / 2e3

    def down_s(self, size: int) -> float:
        """Seconds until `size` bytes have arrived from the other end."""
        return size * 8 / (self.down_mbps * 1e6) + self.round_trip_ms / 2e3


def links() -> dict[str, Link]:
    """The links of `data/links.csv`, by name; each with its source. What a line leaves out is as `Link` has it.

    Raises LinkError with the line that is none.
    """
    columns, needed = [one.name for one in fields(Link)], ("name", "down_mbps", "up_mbps")
    found = {}
    for where, cells in csv_files.lines(
        data_dir() / "links.csv", LinkError, columns, needed=needed, unique="name"
    ):
        figures = {
            name: csv_files.number(cells, name, where, LinkError)
            for name, text in cells.items()
            if name not in ("name", "source") and (text or name in needed)
        }
        try:
            found[cells["name"]] = Link(cells["name"], **figures, source=cells.get("source", ""))
        except LinkError as error:
            raise LinkError(f"{where}: {error}") from None
    return found


def find(name: str) -> Link:
    """A link of `data/links.csv`. Raises LinkError with those there are."""
    known = links()
    if name not in known:
        raise LinkError(f"No link is called {name!r}; there are {', '.join(known)}.")
    return known[name]


@dataclass
class Traffic:
    """Bytes that have passed each way."""

    up: int = 0
    down: int = 0


class _Outages:
    """When a link is down, both ways; one outage after the other as a Poisson process has it."""

    def __init__(self, link: Link, seed: int) -> None:
        self.link, self.random = link, random.Random(seed)
        self.begins = [self._after(time.monotonic())] if link.outage_s else [math.inf]

    def _after(self, moment: float) -> float:
        return moment + self.random.expovariate(1 / self.link.between_outages_s)

    def over(self, moment: float) -> float:
        """When what is to be sent at a moment can be: then, or at the end of the outage."""
        while self.begins[-1] <= moment:
            self.begins.append(self._after(self.begins[-1] + self.link.outage_s))
        last = bisect_right(self.begins, moment) - 1
        return max(moment, self.begins[last] + self.link.outage_s) if last >= 0 else moment


class _Packets:
    """How many packets the bytes of one direction of a connection begin."""

    def __init__(self) -> None:
        self.room = 0  # bytes that the packet in hand still takes

    def end(self) -> None:
        """A message is over: its last packet goes as it is, and the next byte begins another."""
        self.room = 0

    def begun(self, size: int) -> int:
        """Packets that the next `size` bytes begin, the first of which may go into the packet in hand."""
        count = -(-max(size - self.room, 0) // PACKET)
        self.room += count * PACKET - size
        return count


class _Shaper:
    """When the bytes of one direction may arrive: behind those before them, at the rate, half a round trip later."""

    def __init__(self, mbps: float, link: Link, seed: int, outages: _Outages) -> None:
        self.bytes_per_s = mbps * 1e6 / 8
        self.link, self.outages = link, outages
        self.random = random.Random(seed)
        self.free = 0.0  # until then the link is busy with earlier bytes
        self.last = 0.0

    def arrival(self, size: int, now: float, packets: int) -> float:
        """Of `size` bytes that begin so many packets, each of which may be lost."""
        self.free = self.outages.over(max(self.free, now)) + size / self.bytes_per_s
        late = self.link.round_trip_ms / 2e3
        if self.link.jitter_ms:
            late += abs(self.random.gauss(0, self.link.jitter_ms / 1e3))
        if self.link.loss and sum(self.random.random() < self.link.loss for _ in range(packets)):
            late += STALL_ROUND_TRIPS * self.link.round_trip_ms / 1e3
        self.last = max(self.last, self.free + late)  # TCP keeps the order
        return self.last

    def step(self) -> int:
        return max(1, min(PIECE, int(self.bytes_per_s * SLICE_S)))


@dataclass
class Proxy:
    """Listens on this machine and passes bytes on to `host:port` as slowly as a link would.

    link may be changed while it runs. All connections share the link. traffic counts what has passed.
    """

    link: Link
    host: str
    port: int
    seed: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    listening: int = 0
    _open: set[asyncio.Task] = field(default_factory=set)

    @asynccontextmanager
    async def running(self, port: int = 0, at: str = LOCAL) -> AsyncIterator[Proxy]:
        """Listen while the context lasts; `listening` is the port, a free one for 0."""
        self.use(self.link)
        server = await asyncio.start_server(self._accept, at, port)
        self.listening = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in list(self._open):
                task.cancel()
            await asyncio.gather(*self._open, return_exceptions=True)
            await server.wait_closed()

    def use(self, link: Link) -> None:
        """Change the link for all that is sent from now on."""
        self.link = link
        outages = _Outages(link, self.seed + 2)
        self._up, self._down = (
            _Shaper(link.up_mbps, link, self.seed, outages),
            _Shaper(link.down_mbps, link, self.seed + 1, outages),
        )

    def interrupt(self, seconds: float) -> None:
        """An outage that begins now."""
        for shaper in (self._up, self._down):
            shaper.free = max(shaper.free, time.monotonic() + seconds)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._open.add(task)
        writers = [writer]
        try:
            with suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection(self.host, self.port)
                writers.append(far_writer)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass(reader, far_writer, "up"))
                    both.create_task(self._pass(far_reader, writer, "down"))
        except* (OSError, asyncio.CancelledError):  # `running` ends it, and nobody waits for it
            pass
        finally:
            self._open.discard(task)
            for one in writers:
                one.close()
            for one in writers:
                with suppress(OSError, asyncio.CancelledError):
                    await one.wait_closed()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """One direction: read as fast as bytes come, up to what the link holds, and hand on when they are due."""
        waiting: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(maxsize=256)
        packets, sent = _Packets(), 0.0

        async def hand_on() -> None:
            while (due := await waiting.get()) is not None:
                when, piece = due
                if (left := when - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                writer.write(piece)
                await writer.drain()
            with suppress(OSError):
                writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(hand_on())
            while piece := await reader.read(PIECE):
                setattr(self.traffic, way, getattr(self.traffic, way) + len(piece))
                shaper = self._up if way == "up" else self._down
                step = shaper.step()
                if time.monotonic() >= sent:  # all before this has left: another message
                    packets.end()
                for first in range(0, len(piece), step):
                    part = piece[first : first + step]
                    due = shaper.arrival(len(part), time.monotonic(), packets.begun(len(part)))
                    sent = shaper.free
                    await waiting.put((due, part))
            await waiting.put(None)


class Proxies:
    """Proxies on a thread of their own, for code that waits."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._open = AsyncExitStack()
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def open(self, link: Link, host: str, port: int) -> Proxy:
        """A proxy to `host:port` that listens already."""
        return self._run(self._open.enter_async_context(Proxy(link, host, port).running()))

    def use(self, proxy: Proxy, link: Link) -> None:
        """Change the link of a proxy for all that is sent from now on."""
        self._loop.call_soon_threadsafe(proxy.use, link)

    def interrupt(self, proxy: Proxy, seconds: float) -> None:
        """An outage of a proxy's link that begins now."""
        self._loop.call_soon_threadsafe(proxy.interrupt, seconds)

    def close(self) -> None:
        """End all of them, and the thread. Any thread may, also while another one does."""
        with self._closing:
            if self._thread.is_alive():
                self._run(self._open.aclose())
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
