"""What travels between stages: messages over TCP, each a header and a payload, and hidden states in three formats.

float32  as they are
float16  rounded; what is beyond 65,504 is cut there
int8     states = integers * scale, one float32 scale = max |state| / 127 for every token

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

from edgelab.errors import EdgeLabError

FORMATS = ("float32", "float16", "int8")
_HEADER = struct.Struct(
    "<BB2xIIIIII"
)  # kind, wire, epoch, request, step, position, tokens, bytes of the payload
FRAME_BYTES = _HEADER.size
_LARGEST = 1 << 30  # bytes of a payload
_FLOAT16 = torch.finfo(torch.float16).max


class WireError(EdgeLabError):
    """Bytes that are no message of a stage."""


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


def encoded(states: Tensor, wire: str) -> bytes:
    """Bytes of hidden states (tokens, hidden). Raises WireError for an unknown format."""
    states = states.float()
    if wire == "float32":
        return states.numpy().tobytes()
    if wire == "float16":
        return states.clamp(-_FLOAT16, _FLOAT16).half().numpy().tobytes()
    if wire == "int8":
        scale = states.abs().amax(-1, keepdim=True) / 127  # (tokens, 1)
        integers = (states / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        return scale.numpy().tobytes() + integers.numpy().tobytes()
    raise WireError(f"wire={wire} is no format; there are {', '.join(FORMATS)}.")


def decoded(payload: bytes, wire: str, tokens: int) -> Tensor:
    """Hidden states (tokens, hidden), float32, of what `encoded` made. Raises WireError where bytes are missing."""
    try:
        if wire == "int8":
            scale = np.frombuffer(payload, np.float32, tokens).reshape(tokens, 1)
            return torch.from_numpy(
                np.frombuffer(payload, np.int8, offset=4 * tokens).reshape(tokens, -1) * scale
            )
        values = np.frombuffer(payload, np.float32 if wire == "float32" else np.float16)
        return torch.from_numpy(values.reshape(tokens, -1).astype(np.float32))
    except ValueError as error:
        raise WireError(f"{len(payload)} bytes are no {tokens} states in {wire}: {error}.") from None


def through(states: Tensor, wire: str) -> Tensor:
    """Hidden states as they arrive."""
    return states if wire == "float32" else decoded(encoded(states, wire), wire, len(states))


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
