"""What travels between stages: messages over TCP, each a header and a payload, and hidden states in four `formats`.

Bytes of payloads are those of the formula that plans are made with. Headers are framing and counted apart.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from edgelab.deployments.partition.formats import (
    FORMATS,
    INT4_SCALE_BYTES,
    WireError,
    check_format,
    group_size,
    hidden_bytes,
)
from edgelab.storage.bits import pack_last, unpack_last

_HEADER = struct.Struct(
    "<BB2xIIIIII"
)  # kind, wire, epoch, request, step, position, tokens, bytes of the payload
FRAME_BYTES = _HEADER.size
_LARGEST = 1 << 30  # bytes of a payload
_FLOAT16 = torch.finfo(torch.float16).max
_TINY = torch.finfo(torch.float32).tiny


class Kind(IntEnum):
    """What a message holds."""

    TOKENS = 0  # int32 ids, for the first stage
    STATES = 1  # hidden states, for every other one
    TOKEN = 2  # the likeliest next id, int32, for the source
    LOGITS = 3  # of the next token, float32, where they were asked for
    FORGET = 4  # a request is over
    ERROR = 5  # a sentence
    PING = 6  # answered at once, with the clock of the one who is asked


@dataclass(frozen=True)
class Message:
    """One message. epoch: of the plan that it belongs to. step: of the request, from 0. position: of its first token.

    wire: format of the states. logits: whether the last stage answers with them, in place of the likeliest token.
    """

    kind: Kind
    payload: bytes = field(default=b"", repr=False)
    request: int = 0
    step: int = 0
    position: int = 0
    tokens: int = 0
    epoch: int = 0
    wire: str = "float32"
    logits: bool = False

    def with_states(self, states: Tensor, wire: str) -> Message:
        """The same step, with the last hidden states of it, (tokens, hidden), for the next stage."""
        position = self.position + self.tokens - len(states)
        payload = encoded(states, wire)
        return replace(
            self, kind=Kind.STATES, payload=payload, position=position, tokens=len(states), wire=wire
        )

    def answer(self, logits: Tensor) -> Message:
        """The same step, with what the last stage has to say: logits (vocabulary,), or the likeliest token."""
        if self.logits:
            return replace(self, kind=Kind.LOGITS, payload=logits.float().numpy().tobytes(), tokens=1)
        return replace(self, kind=Kind.TOKEN, payload=ids_bytes([int(logits.argmax())]), tokens=1)


def quantize_int4(states: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round hidden states (tokens, hidden) onto 15 steps, symmetric around zero, per group of channels.

    Returns integers (tokens, hidden) int8 in [-7, 7] and scales (tokens, hidden / group) bfloat16. A number is off by
    half a scale at most: the scale is rounded before the integers are.
    """
    groups = states.float().unflatten(-1, (-1, group))  # (tokens, groups, group)
    scale = (groups.abs().amax(-1) / 7).clamp_min(_TINY).bfloat16()
    integers = (groups / scale.float()[..., None]).round().clamp(-7, 7)
    return integers.flatten(-2).to(torch.int8), scale


def encoded(states: Tensor, wire: str) -> bytes:
    """Bytes of hidden states (tokens, hidden). Raises WireError for an unknown format."""
    check_format(wire)
    states = states.float()
    if wire == "float32":
        return states.numpy().tobytes()
    if wire == "float16":
        return states.clamp(-_FLOAT16, _FLOAT16).half().numpy().tobytes()
    if wire == "int8":
        scale = states.abs().amax(-1, keepdim=True) / 127  # (tokens, 1)
        integers = (states / scale.clamp_min(_TINY)).round().to(torch.int8)
        return scale.numpy().tobytes() + integers.numpy().tobytes()
    integers, scale = quantize_int4(states, group_size(states.shape[-1]))
    packed = pack_last((integers + 8).to(torch.uint8), 4)  # (tokens, hidden / 2)
    return scale.view(torch.int16).numpy().tobytes() + packed.numpy().tobytes()


def decoded(payload: bytes, wire: str, tokens: int, hidden_size: int) -> Tensor:
    """Hidden states (tokens, hidden_size), float32, of what `encoded` made.

    Raises WireError for an unknown format and for another number of bytes.
    """
    if len(payload) != (expected := tokens * hidden_bytes(hidden_size, wire)):
        raise WireError(
            f"{len(payload)} bytes are no {tokens} states of {hidden_size} in {wire}, which take {expected:.0f}."
        )
    if wire == "int8":
        scale = np.frombuffer(payload, np.float32, tokens).reshape(tokens, 1)
        integers = np.frombuffer(payload, np.int8, offset=4 * tokens).reshape(tokens, hidden_size)
        return torch.from_numpy(integers * scale)
    if wire == "int4":
        return _decoded_int4(payload, tokens, hidden_size)
    values = np.frombuffer(payload, np.float32 if wire == "float32" else np.float16)
    return torch.from_numpy(values.reshape(tokens, hidden_size).astype(np.float32))


def _decoded_int4(payload: bytes, tokens: int, hidden_size: int) -> Tensor:
    group = group_size(hidden_size)
    begin = INT4_SCALE_BYTES * tokens * (hidden_size // group)  # of the integers, behind the scales
    scale = torch.from_numpy(np.frombuffer(payload[:begin], np.int16).copy()).view(torch.bfloat16)
    packed = torch.from_numpy(np.frombuffer(payload[begin:], np.uint8).copy()).view(tokens, -1)
    integers = unpack_last(packed, 4).float() - 8
    return (integers.view(tokens, -1, group) * scale.float().view(tokens, -1, 1)).flatten(-2)


def through(states: Tensor, wire: str) -> Tensor:
    """Hidden states (tokens, hidden) as they arrive."""
    return states if wire == "float32" else decoded(encoded(states, wire), wire, *states.shape)


def ids_bytes(ids: list[int]) -> bytes:
    """Token ids as they travel, 4 bytes each."""
    return np.asarray(ids, np.int32).tobytes()


def ids_of(payload: bytes) -> list[int]:
    """Token ids that arrived."""
    return np.frombuffer(payload, np.int32).tolist()


def send(connection: socket.socket, message: Message) -> None:
    """Send a message whole, FRAME_BYTES and its payload. Raises OSError where the other side is gone."""
    wire = FORMATS.index(message.wire) | (message.logits << 7)
    header = _HEADER.pack(
        message.kind, wire, message.epoch, message.request, message.step, message.position, message.tokens,
        len(message.payload),
    )  # fmt: skip
    connection.sendall(header + message.payload)


def receive(connection: socket.socket) -> Message | None:
    """The next message, or None where the other side has closed. Raises WireError for what is no message."""
    header = _exactly(connection, FRAME_BYTES)
    if header is None:
        return None
    kind, wire, epoch, request, step, position, tokens, size = _HEADER.unpack(header)
    if kind not in Kind.__members__.values() or (wire & 127) >= len(FORMATS) or size > _LARGEST:
        raise WireError("What arrives is no message of a stage; something else connects to this port.")
    payload = _exactly(connection, size)
    if payload is None:
        return None
    return Message(
        Kind(kind), payload, request, step, position, tokens, epoch, FORMATS[wire & 127], wire > 127
    )


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    piece = bytearray(size)
    view, done = memoryview(piece), 0
    while done < size:
        got = connection.recv_into(view[done:])
        if not got:
            return None
        done += got
    return bytes(piece)


def connect(host: str, port: int, timeout_s: float = 20.0) -> socket.socket:
    """A connection without delay for small messages. Raises OSError."""
    connection = socket.create_connection((host, port), timeout_s)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
