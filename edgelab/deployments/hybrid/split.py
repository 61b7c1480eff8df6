"""Split inference: the first layers at the edge, the rest in the cloud, hidden states on the wire between them.

Cut k leaves the embedding and the first k layers at the edge. What has to travel is one hidden state per token, as
many bytes at every cut: what the cut decides is the work at the edge, and how much rounding does to the answer.

float32, float16, int8   as between the stages of a partition: `edgelab.deployments.partition.wire`
int4                     states = integers * scale, two integers from -7 to 7 in a byte, one bfloat16 scale =
                         max |state| / 7 for every GROUP channels of a token

A few channels of a hidden state are hundreds of times as large as the others (Sun et al. 2024, arXiv:2402.17762). One
scale per token would round all others to zero at 4 bits, which is why int4 has groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from edgelab.deployments.partition import wire as partition
from edgelab.deployments.partition.profile import TOKEN_BYTES, hidden_bytes
from edgelab.deployments.partition.stage import Stage, StageError
from edgelab.deployments.partition.wire import WireError
from edgelab.devices.shapes import ModelShape
from edgelab.model.blocks import block_list
from edgelab.model.logits import SLICE, prepacked
from edgelab.runtimes.session import Can, Session
from edgelab.storage.bits import pack_last, unpack_last
from edgelab.storage.description import Description

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = (*partition.FORMATS, "int4")
GROUP = 32  # channels that share a scale, or the most below it that divide the hidden size
INT4_SCALE_BYTES = 2  # bfloat16 holds any size of state, in half a bit per channel less than float32
_TINY = torch.finfo(torch.float32).tiny

# The wire


def group_size(hidden_size: int) -> int:
    """Channels that share a scale in int4. Raises WireError for an odd hidden size, of which two make no byte."""
    if hidden_size % 2:
        raise WireError(
            f"A hidden size of {hidden_size} is odd and cannot be packed two to a byte; use int8."
        )
    return max(size for size in range(2, GROUP + 1, 2) if hidden_size % size == 0)


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
    _check(wire)
    if wire != "int4":
        return partition.encoded(states, wire)
    integers, scale = quantize_int4(states, group_size(states.shape[-1]))
    packed = pack_last((integers + 8).to(torch.uint8), 4)  # (tokens, hidden / 2)
    return scale.view(torch.int16).numpy().tobytes() + packed.numpy().tobytes()


def decoded(payload: bytes, wire: str, tokens: int, hidden_size: int) -> Tensor:
    """Hidden states (tokens, hidden_size), float32, of what `encoded` made. Raises WireError for another number of
    bytes."""
    if len(payload) != (expected := tokens * payload_bytes(hidden_size, wire)):
        raise WireError(
            f"{len(payload)} bytes are no {tokens} states of {hidden_size} in {wire}, which take {expected:.0f}."
        )
    if wire != "int4":
        return partition.decoded(payload, wire, tokens)
    group = group_size(hidden_size)
    split = INT4_SCALE_BYTES * tokens * (hidden_size // group)
    scale = torch.from_numpy(np.frombuffer(payload[:split], np.int16).copy()).view(torch.bfloat16)
    packed = torch.from_numpy(np.frombuffer(payload[split:], np.uint8).copy()).view(tokens, -1)
    integers = unpack_last(packed, 4).float() - 8
    return (integers.view(tokens, -1, group) * scale.float().view(tokens, -1, 1)).flatten(-2)


def through(states: Tensor, wire: str) -> Tensor:
    """Hidden states (tokens, hidden) as they arrive."""
    return decoded(encoded(states, wire), wire, *states.shape)


def rounding_bound(arrived: Tensor, wire: str) -> Tensor:
    """By how much each number of the states that arrived, (tokens, hidden), may differ from what was sent.

    Half a step, which is read off the states themselves: the largest of a token or group is a whole number of steps.
    Shape (tokens, hidden). float16: half the distance to the next number, and any for one that was cut at 65,504.
    """
    _check(wire)
    states = arrived.float()
    if wire == "float32":
        return torch.zeros_like(states)
    if wire == "float16":
        half = (states.abs() * 2.0**-11).clamp_min(2.0**-25)
        return half.masked_fill(states.abs() >= torch.finfo(torch.float16).max, math.inf)
    group, steps = (states.shape[-1], 127) if wire == "int8" else (group_size(states.shape[-1]), 7)
    largest = states.unflatten(-1, (-1, group)).abs().amax(-1)  # (tokens, groups)
    return (largest / steps / 2).repeat_interleave(group, -1)


def _check(wire: str) -> None:
    if wire not in FORMATS:
        raise WireError(f"wire={wire} is no format; there are {', '.join(FORMATS)}.")


# Bytes


def payload_bytes(hidden_size: int, wire: str) -> float:
    """Bytes of one hidden state on the wire, its scales among them. Raises WireError for an unknown format."""
    _check(wire)
    if wire != "int4":
        return hidden_bytes(hidden_size, wire)
    return hidden_size / 2 + INT4_SCALE_BYTES * (hidden_size // group_size(hidden_size))


@dataclass(frozen=True)
class Traffic:
    """What travels when a model is cut behind so many layers; framing is not counted.

    prompt_bytes: up, for the prompt. token_bytes: up, for every token that is written behind it. answer_bytes: down,
    for each of them and for the first.
    """

    cut: int
    prompt_bytes: float
    token_bytes: float
    answer_bytes: float = TOKEN_BYTES


def traffic(shape: ModelShape, wire: str, prompt_tokens: int) -> list[Traffic]:
    """Traffic of every cut of a model, from 0 (the embedding alone at the edge) to all layers (the head in the cloud).

    The cuts differ in one thing: behind the last layer only the last state of a prompt is wanted.
    """
    state = payload_bytes(shape.hidden_size, wire)
    return [
        Traffic(cut, state * (prompt_tokens if cut < shape.layers else 1), state)
        for cut in range(shape.layers + 1)
    ]


# Running it


def cut_behind(model: PreTrainedModel, layers: Sequence[int]) -> list[Stage]:
    """The stages of a model that is cut behind so many layers, once or more often, 0 being the embedding alone.

    They share the weights of the model, which is left as it is; `Stage.load` reads one stage of a variant alone.
    """
    count = len(block_list(model)[1])
    ends = [0, *(cut + 1 for cut in layers), count + 2]
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return [Stage(copy.deepcopy(model, dict(shared)), first, last) for first, last in pairwise(ends)]


class Rest(Protocol):
    """The cloud's part of a model, wherever it runs."""

    def read(self, payload: bytes, tokens: int, position: int, every: bool) -> Tensor:
        """Go on by the states in a payload, so many and from this position on.

        Logits, float32: behind each of them, (tokens, vocabulary), or behind the last, (vocabulary,).
        """

    def forget(self) -> None:
        """Let go of the sequence: the next payload begins another."""


class Here:
    """The cloud's part in this process."""

    def __init__(self, cloud: Stage, wire: str) -> None:
        self.cloud, self.wire = cloud, wire
        self.hidden_size = cloud.model.config.get_text_config().hidden_size

    def read(self, payload: bytes, tokens: int, position: int, every: bool) -> Tensor:
        states = decoded(payload, self.wire, tokens, self.hidden_size)
        return self.cloud.read(states, position, every=every)

    def forget(self) -> None:
        self.cloud.forget()


class Split(Session):
    """A model whose first layers run here and whose other ones are asked for by payload.

    edge: parts 0 to `cut` of the model. rest: the others. sent_bytes: of the payloads so far.
    """

    badge = "packed"
    can = Can(rewind=False)
    elsewhere = True
    tolerance = 1e-4  # float32 sums in another order; what the wire rounds comes on top

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        if about.marks.native is None:
            return None
        return f"native.{about.marks.native} is rounded by an engine itself, and stages are run by PyTorch."

    def __init__(self, edge: Stage, rest: Rest, wire: str = "float32") -> None:
        super().__init__()
        _check(wire)
        if edge.first != 0 or edge.last == edge.parts:
            raise StageError(
                f"Parts {edge.first} to {edge.last - 1} are no edge of a model of {edge.parts} parts: it begins with "
                "part 0, the embedding, and leaves the head to the cloud."
            )
        self.edge, self.rest, self.wire, self.cut = edge, rest, wire, edge.last - 1
        self.vocabulary = edge.model.config.get_text_config().vocab_size
        self.kernel = f"{self.cut} layers here, {wire} states"
        self.sent_bytes = 0

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        states = self.edge.read(torch.tensor(ids), self.length, every=every)
        payload = encoded(states, self.wire)
        self.sent_bytes += len(payload)
        found = self.rest.read(payload, len(states), self.length + len(ids) - len(states), every)
        return found if every else found[None]

    def _cut(self, length: int) -> bool:
        if length > 0:  # a stage takes nothing back
            return False
        self.edge.forget()
        self.rest.forget()
        return True


# What rounding does to the answer


@dataclass(frozen=True)
class Rounded:
    """What a format of the wire costs at a cut: NLL in nats, summed over the scored tokens of each window.

    nll: with rounding. baseline: of the same windows without. tokens: scored in each.
    """

    cut: int
    wire: str
    nll: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def delta_nll(self) -> float:
        """Difference of the mean NLL per token."""
        return (math.fsum(self.nll) - math.fsum(self.baseline)) / sum(self.tokens)


def delta_nll(
    stages: Sequence[Stage], windows: Iterable[Tensor], formats: Sequence[str] = FORMATS[1:]
) -> list[Rounded]:
    """NLL with the states rounded at one cut less NLL without, for every cut between two stages and every format.

    stages: a whole model, cut as often as is asked. windows: token ids (time,) each; all but the first are scored.
    A window goes through the stages once; from each cut on, once per format.
    """
    _check_chain(stages)
    found = [Rounded(stage.first - 1, wire) for stage in stages[1:] for wire in formats]
    with ExitStack() as stack, torch.inference_mode():
        for stage in stages:
            stack.enter_context(prepacked(stage.model, 2 * SLICE))
        for ids in windows:
            given, handed = ids[:-1], []
            for stage in stages[:-1]:
                given = _all(stage, given)
                handed.append(given)
            baseline = _nll(stages[-1:], given, ids[1:])
            rows = iter(found)
            for place, states in enumerate(handed, 1):
                for wire in formats:
                    row = next(rows)
                    row.nll.append(_nll(stages[place:], through(states, wire), ids[1:]))
                    row.baseline.append(baseline)
                    row.tokens.append(len(ids) - 1)
    return found


def _check_chain(stages: Sequence[Stage]) -> None:
    joined = all(one.last == other.first for one, other in pairwise(stages))
    if len(stages) < 2 or not joined or stages[0].first != 0 or stages[-1].last != stages[-1].parts:
        runs = ", ".join(f"{stage.first} to {stage.last - 1}" for stage in stages)
        raise StageError(
            f"Stages of parts {runs} are no model that is cut; two or more of them have to hold parts 0 to "
            f"{stages[0].parts - 1}, one after the other."
        )


def _all(stage: Stage, given: Tensor) -> Tensor:
    """All states (time, hidden) behind a stage, of a text that it has not seen and does not keep."""
    stage.forget()
    found = stage.read(given, 0, every=True)
    stage.forget()
    return found


def _nll(stages: Sequence[Stage], states: Tensor, targets: Tensor) -> float:
    """Sum over the targets (time,) of their NLL in nats, the stages reading states (time, hidden).

    The last stage reads SLICE positions at a time, so that no more logits than theirs exist.
    """
    for stage in stages[:-1]:
        states = _all(stage, states)
    last, total = stages[-1], 0.0
    last.forget()
    for begin in range(0, len(states), SLICE):
        logits = last.read(states[begin : begin + SLICE], begin, every=True)
        taken = logits.log_softmax(-1).gather(1, targets[begin : begin + SLICE, None])
        total -= taken.double().sum().item()
    last.forget()
    return total
