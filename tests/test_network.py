"""Links and the proxy: computed times, bytes counted and passed whole, order kept, a link changed on the way."""

import asyncio
import time

import pytest

from edgelab import network
from edgelab.network import Link, LinkError, Proxy


async def echo(reader, writer):
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    finally:  # a test may end before all that was said has come
        writer.close()


async def sent(link: Link, message: bytes, answer: int | None = None) -> tuple[float, bytes, Proxy]:
    """Seconds until a message has come back through a proxy, what came, and the proxy."""
    server = await asyncio.start_server(echo, network.LOCAL, 0)
    async with server:
        proxy = Proxy(link, network.LOCAL, server.sockets[0].getsockname()[1])
        async with proxy.running():
            reader, writer = await asyncio.open_connection(network.LOCAL, proxy.listening)
            started = time.monotonic()
            writer.write(message)
            back = await reader.readexactly(len(message))
            seconds = time.monotonic() - started
            writer.close()
            await writer.wait_closed()
            return seconds, back, proxy


def test_times_of_a_link():
    link = Link("made", down_mbps=50, up_mbps=10, round_trip_ms=30)
    assert link.up_s(16_384) == pytest.approx(0.0131072 + 0.015)
    assert link.down_s(16_384) == pytest.approx(0.00262144 + 0.015)


def test_named_links_have_sources():
    known = network.links()
    assert {"wifi", "lte", "3g", "satellite", "ethernet"} <= known.keys()
    assert all(link.source for link in known.values())
    assert (known["3g"].down_mbps, known["3g"].up_mbps, known["3g"].round_trip_ms) == (1.6, 0.768, 300)
    with pytest.raises(LinkError, match="there are ethernet"):
        network.find("carrier pigeon")


@pytest.mark.parametrize(
    "wrong",
    [
        {"up_mbps": 0},
        {"down_mbps": -1},
        {"round_trip_ms": -1},
        {"loss": 1},
        {"up_mbps": float("nan")},
        {"outage_s": -1},
        {"between_outages_s": 0},
    ],
)
def test_links_that_cannot_be(wrong):
    with pytest.raises(LinkError, match=next(iter(wrong))):
        Link(**{"name": "made", "down_mbps": 1, "up_mbps": 1} | wrong)


def test_bytes_arrive_whole_and_never_before_their_time():
    """100 kB each way at 16 Mbps: 50 ms a way, which overlap by all but a piece, and a round trip of 40 ms."""
    link = Link("made", 16, 16, round_trip_ms=40)
    message = bytes(range(256)) * 400
    seconds, back, proxy = asyncio.run(sent(link, message))
    assert back == message
    assert (proxy.traffic.up, proxy.traffic.down) == (len(message), len(message))
    assert seconds >= len(message) * 8 / 16e6 + 0.040


def test_loss_is_a_stall_and_keeps_the_order():
    lossy = Link("made", 100, 100, round_trip_ms=20, jitter_ms=3, loss=0.9)
    message = bytes(range(256)) * 20
    seconds, back, _ = asyncio.run(sent(lossy, message))
    assert back == message
    assert seconds >= 0.020 + network.STALL_ROUND_TRIPS * 0.020


def test_nothing_moves_in_an_outage_and_all_arrives_behind_it():
    message = bytes(range(256)) * 20
    always = Link("made", 100, 100, outage_s=0.2, between_outages_s=1e-6)  # the next one begins at once
    seconds, back, _ = asyncio.run(sent(always, message))
    assert back == message
    assert seconds >= 0.2


def test_outages_follow_each_other_as_often_as_the_link_says():
    """Both directions see the same ones, whatever moment they ask for first."""
    outages = network._Outages(Link("made", 1, 1, outage_s=1.0, between_outages_s=3.0), seed=0)
    start = time.monotonic()
    moments = [start + 0.1 * step for step in range(100_000)]
    waits = [outages.over(moment) - moment for moment in moments]
    assert max(waits) <= 1.0
    assert sum(wait > 0 for wait in waits) / len(waits) == pytest.approx(0.25, abs=0.01)  # 1 s of 1 + 3
    assert [outages.over(moment) - moment for moment in reversed(moments)] == waits[::-1]


def test_an_outage_now():
    async def interrupted() -> float:
        server = await asyncio.start_server(echo, network.LOCAL, 0)
        async with server:
            proxy = Proxy(Link("made", 100, 100), network.LOCAL, server.sockets[0].getsockname()[1])
            async with proxy.running():
                reader, writer = await asyncio.open_connection(network.LOCAL, proxy.listening)
                proxy.interrupt(0.3)
                started = time.monotonic()
                writer.write(b"hello")
                assert await reader.readexactly(5) == b"hello"
                writer.close()
                await writer.wait_closed()
                return time.monotonic() - started

    assert asyncio.run(interrupted()) >= 0.3


def test_a_link_may_change_on_the_way():
    async def both() -> tuple[float, float]:
        server = await asyncio.start_server(echo, network.LOCAL, 0)
        async with server:
            proxy = Proxy(Link("quick", 1000, 1000), network.LOCAL, server.sockets[0].getsockname()[1])
            async with proxy.running():
                reader, writer = await asyncio.open_connection(network.LOCAL, proxy.listening)
                found = []
                for link in (proxy.link, Link("slow", 1000, 1)):
                    proxy.use(link)
                    started = time.monotonic()
                    writer.write(bytes(12_500))
                    await reader.readexactly(12_500)
                    found.append(time.monotonic() - started)
                writer.close()
                await writer.wait_closed()
                return tuple(found)

    _, slow = asyncio.run(both())
    assert slow >= 0.1  # 12.5 kB at 1 Mbps


def test_nobody_at_the_other_end_closes_the_connection():
    async def ask() -> bytes:
        async with Proxy(Link("made", 1, 1), network.LOCAL, 1).running() as proxy:
            reader, writer = await asyncio.open_connection(network.LOCAL, proxy.listening)
            found = await reader.read()
            writer.close()
            await writer.wait_closed()
            return found

    assert asyncio.run(ask()) == b""


def test_leaving_in_mid_transfer_leaves_nothing_open():
    async def leave() -> int:
        server = await asyncio.start_server(echo, network.LOCAL, 0)
        async with server:
            proxy = Proxy(Link("slow", 1, 1), network.LOCAL, server.sockets[0].getsockname()[1])
            async with proxy.running():
                _, writer = await asyncio.open_connection(network.LOCAL, proxy.listening)
                writer.write(bytes(1_000_000))
                await asyncio.sleep(0.05)
                writer.transport.abort()
            return len(proxy._open)

    assert asyncio.run(asyncio.wait_for(leave(), 20)) == 0
