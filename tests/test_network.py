"""Links and the proxy: computed times, bytes counted and passed whole, order kept, a link changed on the way."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from edgelab import network
from edgelab.deployments.hybrid import CloudAlone, Split
from edgelab.network import Link, LinkError, Proxies, Proxy


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
        {"down_mbps": float("inf")},
        {"jitter_ms": float("inf")},
        {"outage_s": -1},
        {"between_outages_s": 0},
    ],
)
def test_links_that_cannot_be(wrong):
    with pytest.raises(LinkError, match=next(iter(wrong))):
        Link(**{"name": "made", "down_mbps": 1, "up_mbps": 1} | wrong)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A copy of links.csv, which is read in its place."""
    copy = tmp_path / "links.csv"
    copy.write_text("name,down_mbps,up_mbps,round_trip_ms,jitter_ms,loss,source\nlte,12,12,70,0,0,a\n")
    monkeypatch.setattr(network, "data_dir", lambda: tmp_path)
    return copy


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("12,12,", "12,,", "links.csv, line 2, column up_mbps: '' is no number"),
        ("12,12,70,0,0,a", "12", "line 2, column up_mbps: '' is no number"),
        (
            "12,12,",
            '"12,5",12,',
            "column down_mbps: '12,5' is no number; write one such as 8 or 25.6, with a full stop, not",
        ),
        ("12,12,", "12,5,12,", "and write a number with a full stop"),
        ("12,12,", "1_000,12,", "line 2, column down_mbps: '1_000' is no number"),
        ("70,0,0,a", "70 ms,0,0,a", "line 2, column round_trip_ms: '70 ms' is no number"),
        ("70,0,0,a", "inf,0,0,a", "line 2, column round_trip_ms: 'inf' is no number"),
        ("70,0,0,a", "70,0,1,a", "line 2: Link lte: loss is 1.0"),
        ("70,0,0,a", "70,0,0,a, and b", "line 2: there are 8 cells for 7 columns"),
        ("lte,12", "lte,9,9,70,0,0,a\nlte,12", "line 3, column name: 'lte' is there twice"),
        ("lte,12", ",12", "line 2, column name: it is empty"),
        ("loss,source", "loss,note", "line 1: no column is called 'note'; there are name, down_mbps"),
        ("name,down_mbps,", "name,", "line 1: the column down_mbps is missing"),
        (",", ";", "line 1: no column is called 'name;down_mbps;"),
    ],
)
def test_a_bad_line_is_refused_by_line_and_column(file, was, now, said):
    assert was in file.read_text()
    file.write_text(file.read_text().replace(was, now))
    with pytest.raises(LinkError) as caught:
        network.find("lte")
    assert said in str(caught.value)


def test_a_file_as_a_spreadsheet_writes_it_is_read(file):
    known = network.find("lte")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n") + b",,,,,,\r\n")
    assert network.find("lte") == known == Link("lte", 12, 12, 70, source="a")
    file.write_bytes(file.read_text(encoding="utf-8-sig").replace(",a", ",é").encode("latin-1"))
    with pytest.raises(LinkError, match=r"links\.csv cannot be read"):
        network.find("lte")
    file.unlink()
    with pytest.raises(LinkError, match=r"links\.csv cannot be read"):
        network.find("lte")


def test_commas_behind_every_line_are_no_cells(file):
    known = network.find("lte")
    file.write_text(file.read_text().replace("\n", ",,\n") + ",,,,,,,,\n")
    assert network.find("lte") == known
    file.write_text(file.read_text().replace("0,0,a,,", "0,0,a,,b"))
    with pytest.raises(LinkError, match="line 2: there are 9 cells for 7 columns"):
        network.find("lte")


def test_what_a_line_leaves_out_is_the_default(file):
    """Outages of one link alone, and lines that end early."""
    file.write_text("name,down_mbps,up_mbps,outage_s,between_outages_s,source\na,1,2,5,,x\nb,3,4,,,\nc,5,6\n")
    assert list(network.links().values()) == [
        Link("a", 1, 2, outage_s=5, source="x"),
        Link("b", 3, 4),
        Link("c", 5, 6),
    ]


@pytest.mark.parametrize("shared", [CloudAlone(), Split()])
def test_rows_follow_the_figures_of_a_link_and_not_its_source(file, shared):
    before = shared.reads()
    file.write_text(file.read_text().replace("0,0,a", "0,0,b"))
    assert shared.reads() == before
    file.write_text(file.read_text().replace("12,70", "13,70"))
    assert shared.reads() != before


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


class Counted(random.Random):
    """Keeps what is drawn."""

    def __init__(self, seed):
        super().__init__(seed)
        self.drawn = []

    def random(self):
        self.drawn.append(super().random())
        return self.drawn[-1]


def shaper(mbps, seed=0, **link):
    found = network._Shaper(
        mbps, Link("made", mbps, mbps, **link), seed, network._Outages(Link("m", 1, 1), 0)
    )
    found.random = Counted(seed)
    return found


def test_packets_by_hand():
    packets = network._Packets()
    assert [packets.begun(size) for size in (1, 1499, 1, 3000, 1499, 1)] == [1, 0, 1, 2, 0, 1]
    packets.end()
    assert [packets.begun(size) for size in (100, 100, 16_384)] == [1, 0, 11]


@pytest.mark.parametrize("mbps", [50, 1, 0.01])
def test_a_stream_draws_once_for_each_packet_whatever_the_slices(mbps):
    """Slices have 12,500, 250 and 2 bytes; the same packets are lost at every rate."""
    one, packets, size, calls = shaper(mbps, loss=0.1), network._Packets(), 1000 * network.PACKET, 0
    for first in range(0, size, one.step()):
        part = min(one.step(), size - first)
        one.arrival(part, 0.0, packets.begun(part))
        calls += 1
    assert calls == size // one.step()
    same = random.Random(0)
    assert one.random.drawn == [same.random() for _ in range(1000)]
    assert sum(draw < 0.1 for draw in one.random.drawn) / 1000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("mbps", [50, 1, 0.01])
@pytest.mark.parametrize("loss", [0.01, 0.2])
def test_as_many_packets_stall_as_the_link_loses(mbps, loss):
    """Packets at 10 s from each other, so that none waits for another: a stall takes 4 s, a packet 1.2 s at most."""
    one, packets, stalled = shaper(mbps, loss=loss, round_trip_ms=2000), network._Packets(), []
    for place in range(1000):
        for first in range(0, network.PACKET, one.step()):
            part = min(one.step(), network.PACKET - first)
            due = one.arrival(part, 10.0 * place, packets.begun(part))
        stalled.append(due - one.free > 1.5)  # half a round trip is 1 s
    drawn = one.random.drawn
    assert stalled == [draw < loss for draw in drawn]
    assert sum(stalled) / 1000 == pytest.approx(loss, abs=0.025 if loss > 0.1 else 0.007)


def test_without_loss_nothing_is_drawn_and_times_are_those_of_the_link():
    one, packets = shaper(1, round_trip_ms=100), network._Packets()
    due = [one.arrival(250, 0.0, packets.begun(250)) for _ in range(12)]
    assert due == pytest.approx([0.002 * (place + 1) + 0.05 for place in range(12)])
    assert one.random.drawn == []


def test_the_proxy_draws_for_packets_and_a_short_message_is_one():
    async def drawn(link: Link, messages: list[bytes]) -> tuple[int, int]:
        server = await asyncio.start_server(echo, network.LOCAL, 0)
        async with server:
            proxy = Proxy(link, network.LOCAL, server.sockets[0].getsockname()[1])
            async with proxy.running():
                up, down = proxy._up, proxy._down
                up.random, down.random = Counted(0), Counted(1)
                reader, writer = await asyncio.open_connection(network.LOCAL, proxy.listening)
                for message in messages:
                    writer.write(message)
                    await reader.readexactly(len(message))
                writer.close()
                await writer.wait_closed()
                return len(up.random.drawn), len(down.random.drawn)

    lossy = Link("made", 1000, 1000, loss=0.01)
    assert asyncio.run(drawn(lossy, [bytes(100)] * 5)) == (5, 5)
    up, _ = asyncio.run(drawn(Link("made", 1000, 1, loss=0.01), [bytes(15_000)]))
    assert up == 10


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


def test_several_threads_may_end_the_proxies_at_once():
    """As somebody who hangs up while the deployment ends."""
    for _ in range(10):
        proxies = Proxies()
        proxies.open(Link("made", 1, 1), network.LOCAL, 1)
        with ThreadPoolExecutor(4) as threads:
            assert [one.result() for one in [threads.submit(proxies.close) for _ in range(4)]] == [None] * 4
