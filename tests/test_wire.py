"""What travels between stages: four formats, messages whole or not at all, and bytes that the formula counts."""

import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelab.deployments.partition import wire
from edgelab.deployments.partition.formats import group_size, hidden_bytes
from edgelab.deployments.partition.wire import FRAME_BYTES, Kind, Message, WireError


@pytest.fixture
def pair():
    """A function that gives two connected sockets."""
    opened = []

    def make():
        opened.extend(both := socket.socketpair())
        return both

    yield make
    for one in opened:
        one.close()


def test_by_hand():
    states = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    assert torch.equal(wire.through(states, "float32"), states)
    assert torch.equal(wire.through(states, "float16"), states)
    found = wire.through(states, "int8")
    assert found[0].tolist() == pytest.approx(
        [64 * 2 / 127, -2.0, 32 * 2 / 127]
    )  # 63.5 and 31.75 are rounded
    assert found[1].tolist() == [0, 0, 0]
    assert wire.through(torch.tensor([[1e6, -1e6]]), "float16").tolist() == [[65504.0, -65504.0]]


@pytest.mark.parametrize("format_", wire.FORMATS)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("hidden", [48, 64, 576])
def test_bytes_are_those_of_the_formula(format_, tokens, hidden):
    states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(0))
    assert len(wire.encoded(states, format_)) == tokens * hidden_bytes(hidden, format_)


def test_int4_by_hand():
    states = torch.tensor([[7.0, -3.4, 0.4, 2.6], [0.0, 0.0, 0.0, 0.0]])
    integers, scale = wire.quantize_int4(states, 4)
    assert integers.tolist() == [[7, -3, 0, 3], [0, 0, 0, 0]]
    assert scale[0].tolist() == [1.0]
    assert wire.through(states, "int4").tolist() == [[7, -3, 0, 3], [0, 0, 0, 0]]
    payload = wire.encoded(states[:1], "int4")
    assert payload[2:] == bytes([0xF | 5 << 4, 8 | 11 << 4])  # the first of two in the lower half, plus 8


def test_a_large_channel_rounds_only_its_group_to_zero():
    states = torch.full((1, 64), 7.0)
    states[0, 3] = 7000.0
    arrived = wire.through(states, "int4")
    assert (arrived[0, 32:] == 7).all()
    assert arrived[0, :32].count_nonzero() == 1
    assert wire.through(states, "int8")[0, 32:].count_nonzero() == 0  # one scale for the token


def test_groups_divide_the_hidden_size():
    assert [group_size(hidden) for hidden in (576, 64, 48, 40, 26)] == [32, 32, 24, 20, 26]
    for ask in (lambda: group_size(75), lambda: wire.encoded(torch.ones(1, 75), "int4")):
        with pytest.raises(WireError, match="75 is odd"):
            ask()


@given(st.integers(0, 10_000))
def test_int4_is_off_by_half_a_step_at_most(seed):
    """Of states of any size, with one channel a hundred times as large."""
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    states[:, seed % 64] *= 100
    step = states.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 7
    assert ((wire.through(states, "int4") - states).abs().unflatten(-1, (-1, 32)) <= step * 0.505).all()


@given(st.integers(0, 10_000))
def test_int8_is_off_by_half_a_step_at_most(seed):
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((wire.through(states, "int8") - states).abs() <= step * 0.5001).all()


@pytest.mark.parametrize(("format_", "state_bytes"), [("int8", 4 + 4), ("int4", 2 + 2)])
def test_states_arrive_as_they_were_sent(pair, format_, state_bytes):
    here, there = pair()
    sent = Message(Kind.STATES, b"", 3, 4, 5, 0, 6).with_states(torch.ones(2, 4), format_)
    wire.send(here, sent)
    assert len(there.recv(1000, socket.MSG_PEEK)) == FRAME_BYTES + 2 * state_bytes
    assert wire.receive(there) == sent


def test_a_message_arrives_as_it_was_sent(pair):
    here, there = pair()
    asked = Message(Kind.TOKENS, wire.ids_bytes([7, 300]), 1, tokens=2, logits=True)
    wire.send(here, asked)
    found = wire.receive(there)
    assert found == asked
    assert wire.ids_of(found.payload) == [7, 300]
    logits = torch.tensor([0.1, 2.0, -1.0])
    assert found.answer(logits).kind is Kind.LOGITS
    assert wire.ids_of(Message(Kind.STATES).answer(logits).payload) == [1]


def test_half_a_message_is_none(pair):
    here, there = pair()
    here.sendall(b"x" * (FRAME_BYTES - 1))
    here.close()
    assert wire.receive(there) is None
    here, there = pair()
    wire.send(here, Message(Kind.TOKENS, b"12345678"))
    here.close()
    assert wire.receive(there).payload == b"12345678"
    assert wire.receive(there) is None


def test_what_is_no_message_is_refused(pair):
    here, there = pair()
    here.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    with pytest.raises(WireError, match="something else connects"):
        wire.receive(there)


def test_what_are_no_states_is_refused():
    for ask in (
        lambda: wire.encoded(torch.ones(1, 4), "int2"),
        lambda: wire.decoded(b"1234", "int2", 1, 4),
        lambda: hidden_bytes(4, "int2"),
    ):
        with pytest.raises(WireError, match="wire=int2 is no format; there are float32, float16, int8, int4"):
            ask()
    for format_ in wire.FORMATS:
        payload = wire.encoded(torch.ones(2, 64), format_)
        with pytest.raises(WireError, match="are no 3 states of 64"):
            wire.decoded(payload, format_, 3, 64)
        with pytest.raises(WireError, match=f"{len(payload) - 1} bytes are no 2 states"):
            wire.decoded(payload[:-1], format_, 2, 64)
