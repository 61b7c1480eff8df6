"""What travels between stages: three formats, messages whole or not at all, and bytes that the formula counts."""

import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelab.deployments.partition import wire
from edgelab.deployments.partition.profile import hidden_bytes
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
def test_bytes_are_those_of_the_formula(format_, tokens):
    states = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(0))
    assert len(wire.encoded(states, format_)) == tokens * hidden_bytes(48, format_)


@given(st.integers(0, 10_000))
def test_int8_is_off_by_half_a_step_at_most(seed):
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    step = states.abs().amax(-1, keepdim=True) / 127
    assert ((wire.through(states, "int8") - states).abs() <= step * 0.5001).all()


def test_a_message_arrives_as_it_was_sent(pair):
    here, there = pair()
    sent = Message(Kind.STATES, b"", 3, 4, 5, 0, 6).with_states(torch.ones(2, 4), "int8")
    wire.send(here, sent)
    assert len(there.recv(1000, socket.MSG_PEEK)) == FRAME_BYTES + 2 * (4 + 4)
    assert wire.receive(there) == sent
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
    with pytest.raises(WireError, match="float32, float16, int8"):
        wire.encoded(torch.ones(1, 2), "bf16")
    with pytest.raises(WireError, match="are no 2 states"):
        wire.decoded(b"123", "float32", 2)
