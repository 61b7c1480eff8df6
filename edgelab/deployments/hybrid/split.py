"""Split inference: the first layers at the edge, the rest in the cloud, hidden states on the wire between them.

Cut k leaves the embedding and the first k layers at the edge. What has to travel is one hidden state per token, as
many bytes at every cut: what the cut decides is the work at the edge, and how much rounding does to the answer. The
formats are those between the stages of a partition, `edgelab.deployments.partition.formats`. `sharing.Halved` runs it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelab.deployments.partition.formats import FORMATS, check_format, group_size
from edgelab.deployments.partition.formats import hidden_bytes as payload_bytes
from edgelab.deployments.partition.profile import TOKEN_BYTES
from edgelab.deployments.partition.stage import Stage, StageError
from edgelab.deployments.partition.wire import through
from edgelab.devices.shapes import ModelShape
from edgelab.model.blocks import block_list
from edgelab.model.logits import SLICE, prepacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The wire


def rounding_bound(arrived: Tensor, wire: str) -> Tensor:
    """By how much each number of the states that arrived, (tokens, hidden), may differ from what was sent.

    Half a step, which is read off the states themselves: the largest of a token or group is a whole number of steps.
    Shape (tokens, hidden). float16: half the distance to the next number, and any for one that was cut at 65,504.
    """
    check_format(wire)
    states = arrived.float()
    if wire == "float32":
        return torch.zeros_like(states)
    if wire == "float16":
        half = (states.abs() * 2.0**-11).clamp_min(2.0**-25)
        return half.masked_fill(states.abs() >= torch.finfo(torch.float16).max, math.inf)
    group, steps = (states.shape[-1], 127) if wire == "int8" else (group_size(states.shape[-1]), 7)
    largest = states.unflatten(-1, (-1, group)).abs().amax(-1)  # (tokens, groups)
    return (largest / steps / 2).repeat_interleave(group, -1)


# Bytes


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


# Cutting it


def cut_behind(model: PreTrainedModel, layers: Sequence[int]) -> list[Stage]:
    """The stages of a model that is cut behind so many layers, once or more often, 0 being the embedding alone.

    They share the weights of the model, which is left as it is; `Stage.load` reads one stage of a variant alone.
    """
    count = len(block_list(model)[1])
    ends = [0, *(cut + 1 for cut in layers), count + 2]
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return [Stage(copy.deepcopy(model, dict(shared)), first, last) for first, last in pairwise(ends)]


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
