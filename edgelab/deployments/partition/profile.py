"""Profiles: what every part of a model costs on every member of a fleet.

The parts of a model, in order: its embedding, its blocks, its head. The head is a part of its own: it reads as many
bytes for a token as several blocks do. A tied matrix is held by both.

    seconds   timed on this machine and scaled to a device, or timed by the device itself                 `Timings`
              or bytes that a part reads for a token / (peak memory bandwidth x efficiency)    *analytic* `from_shape`
    handed    the hidden state, and behind the head the id of a token, in the format of the wire
    memory    weights, and keys and values of `context` tokens for every request in flight
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from edgelab.deployments.partition.fleet import Fleet, FleetError
from edgelab.deployments.partition.formats import hidden_bytes
from edgelab.deployments.partition.problem import Problem
from edgelab.devices.catalogue import HERE
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.shapes import ModelShape
from edgelab.errors import EdgeLabError

TOKEN_BYTES = 4  # an id


class ProfileError(EdgeLabError):
    """A profile that cannot be read, or that is of another model."""


@dataclass(frozen=True, eq=False)
class Profile:
    """What a planner has to know of a model on a fleet.

    seconds: (parts, devices), of a token. memory and handed: (parts,), bytes. names: of the parts. prefill: (parts,
    devices), seconds for the prompt, None where it was not timed. hand_over_s: what every hand-over takes beside the
    link.
    """

    model: str
    seconds: np.ndarray
    memory: np.ndarray
    handed: np.ndarray
    names: tuple[str, ...]
    hidden_size: int
    prefill: np.ndarray | None = None
    hand_over_s: float = 0.0

    def in_format(self, wire: str) -> Profile:
        """The same with hidden states in another format on the wire."""
        return replace(self, handed=handed_bytes(self.hidden_size, len(self.names), wire))


@dataclass(frozen=True)
class Timings:
    """What every part of a model took on one device; a file that can be edited and shared.

    decode_ms: by part, for a token behind each of `contexts` tokens. prefill_ms: by part, for each of `prompts` tokens.
    weight_bytes: by part; a tied matrix counts for both of its parts. cache_bytes: by part, of one token. hand_over_ms:
    of sending a hidden state and of what a stage does beside its parts. memory_bandwidth_gb_s: of the device with so
    many threads, by which times are scaled to others.
    """

    model: str
    recipe: str
    device: str
    threads: int
    hidden_size: int
    memory_bandwidth_gb_s: float
    hand_over_ms: float
    contexts: list[int]
    prompts: list[int]
    parts: list[str]
    decode_ms: list[list[float]]
    prefill_ms: list[list[float]]
    weight_bytes: list[float]
    cache_bytes: list[float]

    def __post_init__(self) -> None:
        count = len(self.parts)
        for name in ("decode_ms", "prefill_ms", "weight_bytes", "cache_bytes"):
            if len(getattr(self, name)) != count:
                raise ProfileError(
                    f"The profile of {self.model} has {len(getattr(self, name))} lines of {name} for {count} parts."
                )
        for name, columns in (("decode_ms", self.contexts), ("prefill_ms", self.prompts)):
            if any(len(line) != len(columns) for line in getattr(self, name)):
                raise ProfileError(f"Every line of {name} should have {len(columns)} numbers.")
            if not (np.asarray(getattr(self, name), dtype=float) >= 0).all():
                raise ProfileError(f"{name} should hold milliseconds from 0 on.")

    def decode_s(self, context: int) -> np.ndarray:
        """Seconds of every part for a token behind `context` others, (parts,); between lengths, a straight line."""
        return np.array([np.interp(context, self.contexts, line) for line in self.decode_ms]) / 1e3

    def prefill_s(self, prompt: int) -> np.ndarray:
        """Seconds of every part for a prompt, (parts,); beyond what was timed, as much a token."""
        longest = self.prompts[-1]
        inside = min(prompt, longest)
        found = np.array([np.interp(inside, self.prompts, line) for line in self.prefill_ms]) / 1e3
        return found * prompt / inside

    def save(self, path: Path) -> None:
        """Write it as JSON, a line for each part."""
        about = asdict(self)
        lines = {name: about.pop(name) for name in _BY_PART}
        head = json.dumps(about, indent=1).removesuffix("\n}")
        rows = ",\n  ".join(
            json.dumps(dict(zip(_BY_PART, row, strict=True))) for row in zip(*lines.values(), strict=True)
        )
        path.write_text(f'{head},\n "by_part": [\n  {rows}\n ]\n}}\n')


_BY_PART = ("parts", "decode_ms", "prefill_ms", "weight_bytes", "cache_bytes")


def read(path: Path, model: str | None = None, recipe: str | None = None) -> Timings:
    """A profile from a file. Raises ProfileError for what is none, and for one of another model or recipe."""
    try:
        about = json.loads(path.read_text())
        rows = about.pop("by_part")
        found = Timings(**about, **{name: [row[name] for row in rows] for name in _BY_PART})
    except OSError as error:
        raise ProfileError(
            f"{path} cannot be read ({error.strerror}); `edgelab plan --profile` writes one."
        ) from None
    except json.JSONDecodeError as error:
        raise ProfileError(f"{path.name}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except (TypeError, KeyError, AttributeError) as error:
        wanted = ", ".join(one.name for one in fields(Timings) if one.name not in _BY_PART)
        raise ProfileError(f"{path.name} is no profile ({error}); it has {wanted} and by_part.") from None
    if model is not None and found.model != model:
        raise ProfileError(
            f"{path.name} is a profile of {found.model}, and the model is {model}; measure that one."
        )
    if recipe is not None and found.recipe != recipe:
        raise ProfileError(
            f"{path.name} is a profile of {found.recipe}, and the recipe is {recipe}; measure that one."
        )
    return found


def spread(
    timings: Timings | Mapping[str, Timings],
    fleet: Fleet,
    *,
    context: int = 128,
    prompt: int = 32,
    requests: int = 1,
    wire: str = "float32",
) -> Profile:
    """Timings of one machine, scaled to every member of a fleet; or those of every member by its name, as they are.

    A member that is this machine takes as long as was timed, one of the catalogue longer or shorter by the ratio of
    memory bandwidths; both times what the fleet calls slow_down.
    """
    by_name = timings if isinstance(timings, Mapping) else dict.fromkeys(fleet.names, timings)
    if missing := [name for name in fleet.names if name not in by_name]:
        raise ProfileError(f"No profile of {missing[0]}; there are those of {', '.join(by_name)}.")
    one = by_name[fleet.names[0]]
    if other := next((found for found in by_name.values() if found.parts != one.parts), None):
        raise ProfileError(
            f"One profile is of {one.model} and another of {other.model}; measure the same model."
        )
    seconds = np.stack([by_name[name].decode_s(context) for name in fleet.names], 1)
    prefill = np.stack([by_name[name].prefill_s(prompt) for name in fleet.names], 1)
    if not isinstance(timings, Mapping):
        factors = scales(timings, fleet)
        seconds, prefill = seconds * factors, prefill * factors
    return Profile(
        one.model,
        seconds,
        np.array(one.weight_bytes) + requests * context * np.array(one.cache_bytes),
        handed_bytes(one.hidden_size, len(one.parts), wire),
        tuple(one.parts),
        one.hidden_size,
        prefill,
        max(found.hand_over_ms for found in by_name.values()) / 1e3,
    )


def scales(timings: Timings, fleet: Fleet) -> np.ndarray:
    """How many times as long every member takes as the machine that was timed, (members,)."""
    found = []
    for member in fleet.members:
        rate = (
            timings.memory_bandwidth_gb_s
            if member.device.name == HERE
            else member.device.memory_bandwidth_gb_s
        )
        if not rate:
            raise FleetError(
                f"{member.name} has no memory bandwidth in the catalogue, by which times are scaled; measure it there."
            )
        found.append(member.slow_down * timings.memory_bandwidth_gb_s / rate)
    return np.array(found)


def handed_bytes(hidden_size: int, parts: int, wire: str) -> np.ndarray:
    """Bytes that every part gives to the next one, (parts,); behind the head it is the id of a token."""
    return np.array([hidden_bytes(hidden_size, wire)] * (parts - 1) + [TOKEN_BYTES])


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
    return Profile(
        shape.name,
        read[:, None] / rates,
        held,
        handed_bytes(shape.hidden_size, shape.layers + 2, wire),
        ("embedding", *(f"block {place}" for place in range(shape.layers)), "head"),
        shape.hidden_size,
    )


def problem_of(
    profile: Profile, fleet: Fleet, *, first: int = 1, last: int = 0, use: str = "", avoid: str = ""
) -> Problem:
    """What a planner gets. first, last: parts at either end that stay on the source; last=1 is the head.

    use, avoid: devices that have to take part, or that may not, joined by a slash.
    """
    parts, devices = profile.seconds.shape
    needed = frozenset(fleet.index(name) for name in use.split("/") if name)
    allowed = np.ones((parts, devices), dtype=bool)
    allowed[: max(first, 0), 1:] = False
    allowed[parts - last :, 1:] = False
    allowed[:, [fleet.index(name) for name in avoid.split("/") if name]] = False
    return Problem(
        seconds=profile.seconds,
        handed=profile.handed,
        memory=profile.memory,
        room=np.array([1e9 * member.room_gb for member in fleet.members]),
        bandwidth=fleet.bandwidth,
        delay=fleet.delay,
        hand_over_s=profile.hand_over_s,
        watts=np.array([member.device.power_w or 0.0 for member in fleet.members]),
        allowed=allowed,
        needed=needed,
        returning=max(last, 1),
        names=fleet.names,
    )
