"""Profiles: what every part of a model costs on every member of a fleet.

The parts of a model, in order: its embedding, its blocks, its head. The head is a part of its own: it reads as many
bytes for a token as several blocks do. A tied matrix is held by both.

    seconds   bytes that a part reads for a token / (peak memory bandwidth of the device x efficiency)    *analytic*
    handed    the hidden state, and behind the head the id of a token, in the format of the wire
    memory    weights, and keys and values of `context` tokens for every request in flight
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelab.deployments.partition.fleet import Fleet, FleetError
from edgelab.deployments.partition.problem import Problem
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.shapes import ModelShape

WIRE_BYTES = {"float32": 4.0, "float16": 2.0, "int8": 1.0}
TOKEN_BYTES = 4  # an id
SCALE_BYTES = 4  # int8 hands on one float32 scale with every state


@dataclass(frozen=True, eq=False)
class Profile:
    """seconds: (parts, devices), of a token. memory and handed: (parts,), bytes. names: of the parts."""

    model: str
    seconds: np.ndarray
    memory: np.ndarray
    handed: np.ndarray
    names: tuple[str, ...]


def hidden_bytes(hidden_size: int, wire: str = "float32") -> float:
    """Bytes of one hidden state on the wire. Raises FleetError for an unknown format."""
    if wire not in WIRE_BYTES:
        raise FleetError(f"wire={wire} is no format; there are {', '.join(WIRE_BYTES)}.")
    return hidden_size * WIRE_BYTES[wire] + SCALE_BYTES * (wire == "int8")


def from_shape(
    shape: ModelShape,
    fleet: Fleet,
    efficiency: float,
    *,
    bits: float = 32,
    context: int = 128,
    requests: int = 1,
    cache_bits: int = 32,
    wire: str = "float32",
) -> Profile:
    """*Analytic*: a decoding step reads every weight once, at a share of the peak bandwidth of the device.

    efficiency: that share, above 0 to 1. bits: of a stored weight, with its scales. Raises FleetError for a device
    whose bandwidth nobody knows.
    """
    unknown = [one.name for one in fleet.members if not one.device.memory_bandwidth_gb_s]
    if unknown:
        raise FleetError(
            f"{unknown[0]} has no memory bandwidth in the catalogue, from which its seconds are counted; measure it."
        )
    per_block = sum(rows * columns for rows, columns in shape.linear_shapes) * bits / 8
    table = shape.vocab_size * shape.hidden_size * bits / 8
    read = np.array([0.0, *[per_block] * shape.layers, table])
    held = np.array([table, *[per_block] * shape.layers, table])
    cache = kv_cache_bytes(shape, context, cache_bits) * requests / shape.layers
    held[1:-1] += cache
    rates = np.array(
        [1e9 * one.device.memory_bandwidth_gb_s * efficiency / one.slow_down for one in fleet.members]
    )
    state = hidden_bytes(shape.hidden_size, wire)
    return Profile(
        shape.name,
        read[:, None] / rates,
        held,
        np.array([state] * (shape.layers + 1) + [TOKEN_BYTES]),
        ("embedding", *(f"block {place}" for place in range(shape.layers)), "head"),
    )


def problem_of(profile: Profile, fleet: Fleet, *, first: int = 1, last: int = 0) -> Problem:
    """What a planner gets. first, last: parts at either end that stay on the source; last=1 is the head."""
    parts, devices = profile.seconds.shape
    allowed = np.ones((parts, devices), dtype=bool)
    allowed[: max(first, 0), 1:] = False
    allowed[parts - last :, 1:] = False
    return Problem(
        seconds=profile.seconds,
        handed=profile.handed,
        memory=profile.memory,
        room=np.array([1e9 * member.room_gb for member in fleet.members]),
        bandwidth=fleet.bandwidth,
        delay=fleet.delay,
        watts=np.array([member.device.power_w or 0.0 for member in fleet.members]),
        allowed=allowed,
        names=fleet.names,
    )
