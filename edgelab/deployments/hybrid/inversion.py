"""Inversion: the prompt, read back from the hidden states that split inference sends.

The attacker is whoever runs the cloud. The weights are open, so that he has the edge's layers too; he sees the states
of a prompt behind cut k as they arrive, rounded or not, and nothing else.

nearest   each state alone is compared with a table of one state per token. Little is left of it in the middle of a
          model, which suggests a safety that is not there.
search    left to right: with the tokens before it known, a token is found by trying. Candidates go through the edge's
          layers behind the keys and values of those tokens, the likeliest first, until one gives the state that
          arrived. Nikolaou et al. 2025, SIPIT, arXiv:2510.15511, show that a decoder maps different prompts to
          different states, so that what gives the state is the token.

What ranks the candidates costs the attacker nothing: the logits that the cloud computes from the states anyway are the
model's own expectation of the next token.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicCache

from edgelab.deployments.hybrid.split import rounding_bound, through
from edgelab.deployments.partition.stage import Stage, StageError
from edgelab.model.logits import hidden_states, prepacked

AT_ONCE = 64  # candidates
SLACK = 1e-3  # of the root mean square of a state: float32 sums in another order, behind a prefix read token by token

Prior = Callable[[list[int]], Tensor]  # scores of each next token, (vocabulary,), behind some tokens


# One state alone


def lone_states(stage: Stage, before: Sequence[int] = ()) -> Tensor:
    """States (vocabulary, hidden) of every token behind the edge's layers, each alone behind the tokens `before`."""
    vocabulary = stage.model.config.get_text_config().vocab_size
    with torch.inference_mode(), prepacked(stage.model, AT_ONCE):
        prefix = _Prefix(stage, before)
        return torch.cat([prefix.followed_by(ids) for ids in torch.arange(vocabulary).split(AT_ONCE)])


def closeness(states: Tensor, table: Tensor, cosine: bool = False) -> Tensor:
    """How close states (time, hidden) are to each row of a table (vocabulary, hidden): (time, vocabulary).

    Minus the distance, or with cosine the cosine of the angle.
    """
    if cosine:
        return functional.normalize(states.float(), dim=-1) @ functional.normalize(table.float(), dim=-1).T
    return -torch.cdist(states.float(), table.float())


def nearest(states: Tensor, table: Tensor, cosine: bool = False) -> list[int]:
    """The token of a table (vocabulary, hidden) that is closest to each of the states (time, hidden)."""
    return closeness(states, table, cosine).argmax(-1).tolist()


# The search


@dataclass
class Recovered:
    """What the search finds. One entry for each token that was not known before.

    ids: the tokens. matched: whether its state lies within the tolerance; else the token is the nearest of those that
    were tried. tried: candidates whose state was computed. distances: from the state of the token to the one that
    arrived, over the norm of that one.
    """

    ids: list[int] = field(default_factory=list)
    matched: list[bool] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    def share(self, ids: Sequence[int]) -> float:
        """Share of the tokens that were sent which are recovered, each in its place."""
        return sum(a == b for a, b in zip(self.ids, ids, strict=True)) / len(ids)


def tolerance_of(arrived: Tensor, wire: str) -> Tensor:
    """By how much each number of the states that arrived may be off for the right token: (time, hidden).

    Half a step of the wire's format, and SLACK for sums in another order.
    """
    rms = arrived.float().square().mean(-1, keepdim=True).sqrt()
    return rounding_bound(arrived, wire) + SLACK * rms


def cloud_prior(cloud: Stage, arrived: Tensor, first: Tensor | None = None) -> Prior:
    """Scores of the next token from the cloud's own logits, for the states (time, hidden) of one prompt.

    first: scores (vocabulary,) of the first token, which nothing stands before; all the same by default.
    """
    cloud.forget()
    logits = cloud.read(arrived, 0, every=True)  # (time, vocabulary)
    cloud.forget()
    unknown = torch.zeros_like(logits[0]) if first is None else first
    return lambda ids: logits[len(ids) - 1] if ids else unknown


def recover(
    stage: Stage,
    hidden: Tensor,
    prior: Prior,
    tolerance: Tensor,
    known: Sequence[int] = (),
    most: int | None = None,
) -> Recovered:
    """The tokens whose states (time, hidden) arrived, one after the other.

    stage: the edge's parts, from the embedding on. prior: see `cloud_prior`; any function of the tokens found so far
    will do. tolerance: (time, hidden) or (time, 1), per number of a state. known: tokens that the prompt begins with,
    such as those of a chat template. most: candidates for one token; all of the vocabulary by default.

    Of several candidates that match, the likeliest is taken: rounding leaves nothing else to tell them apart. Where
    none does, the nearest is taken, and what follows is read behind a wrong token: its states match no longer, so that
    every later token costs `most` candidates and is the nearest, which may still be right.
    """
    if stage.first != 0:
        raise StageError(f"The stage begins at part {stage.first} and not at the embedding, part 0.")
    found, ids = Recovered(), list(known)
    with torch.inference_mode(), prepacked(stage.model, AT_ONCE):
        prefix = _Prefix(stage, known)
        for target, bound in zip(hidden[len(ids) :], tolerance[len(ids) :], strict=True):
            order = prior(ids).argsort(descending=True, stable=True)[:most]
            token, matched, tried, distance = _search(prefix, target, bound, order)
            found.ids.append(token)
            found.matched.append(matched)
            found.tried.append(tried)
            found.distances.append(distance / max(float(target.norm()), 1e-30))
            ids.append(token)
            prefix.append([token])
    return found


def _search(prefix: _Prefix, target: Tensor, bound: Tensor, order: Tensor) -> tuple[int, bool, int, float]:
    """The first candidate of an order (candidates,) whose state is the target (hidden,), or the nearest of them all.

    Returns it, whether it matches, how many were tried, and its distance.
    """
    best, least = -1, math.inf
    for start in range(0, len(order), AT_ONCE):
        candidates = order[start : start + AT_ONCE]
        off = prefix.followed_by(candidates) - target  # (candidates, hidden)
        distances = off.norm(dim=-1)
        matches = (off.abs() <= bound).all(-1)
        if matches.any():
            place = int(matches.int().argmax())
            return int(candidates[place]), True, start + len(candidates), float(distances[place])
        if (near := float(distances.min())) < least:
            best, least = int(candidates[distances.argmin()]), near
    return best, False, len(order), least


class _Prefix:
    """Tokens with their keys and values in the edge's layers, which all candidates for the next one share."""

    def __init__(self, stage: Stage, ids: Sequence[int]) -> None:
        self.model = stage.model
        self.cache = DynamicCache(config=stage.model.config) if stage.blocks else None
        self.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        """Go on by some tokens."""
        if len(ids) and self.cache is not None:
            hidden_states(self.model, torch.tensor([list(ids)]), self.cache)

    def followed_by(self, ids: Tensor) -> Tensor:
        """States (candidates, hidden), float32, of each of the tokens (candidates,) as the next one."""
        return hidden_states(self.model, ids[:, None], self._shared(len(ids)))[:, 0].float()

    def _shared(self, batch: int) -> Cache | None:
        """The cache for a batch; a view of it until a layer puts the candidates' own keys and values behind."""
        if self.cache is None:
            return None
        twin = copy.copy(self.cache)
        twin.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in twin.layers:
            if layer.is_initialized:
                layer.keys = layer.keys.expand(batch, -1, -1, -1)
                layer.values = layer.values.expand(batch, -1, -1, -1)
        return twin


# Both, of one prompt


@dataclass(frozen=True)
class Exposure:
    """What a prompt's states give away at a cut and in a format of the wire: shares of its tokens.

    nearest: by each state alone. searched: by the search, with candidates tried per token and seconds for the prompt.
    """

    cut: int
    wire: str
    nearest: float
    searched: float
    tried: float
    seconds: float


def exposure(
    edge: Stage,
    cloud: Stage,
    ids: Sequence[int],
    wire: str,
    known: Sequence[int] = (),
    table: Tensor | None = None,
    most: int | None = None,
) -> Exposure:
    """Send the tokens `known` and `ids` in a format and attack what arrives; `ids` is what the attacker wants.

    table: of `lone_states`, (vocabulary, hidden), for the nearest and for a token that nothing stands before; by
    default the embedding, compared by cosine. most: see `recover`. Raises WireError for an unknown format.
    """
    whole = [*known, *ids]
    edge.forget()
    arrived = through(edge.read(torch.tensor(whole), 0, every=True), wire)
    edge.forget()
    begun = time.perf_counter()
    cosine = table is None  # a model may scale what it embeds
    if table is None:
        table = _embedding(edge)
    first = None if known else closeness(arrived[:1], table, cosine)[0]
    found = recover(
        edge, arrived, cloud_prior(cloud, arrived, first), tolerance_of(arrived, wire), known, most
    )
    seconds = time.perf_counter() - begun
    alone = nearest(arrived[len(known) :], table, cosine)
    right = sum(a == b for a, b in zip(alone, ids, strict=True))
    tried = sum(found.tried) / len(ids)
    return Exposure(edge.last - 1, wire, right / len(ids), found.share(ids), tried, seconds)


def _embedding(edge: Stage) -> Tensor:
    """The embedding of every token, (vocabulary, hidden) float32, packed or not."""
    embedding = edge.model.get_input_embeddings()
    with torch.inference_mode():
        return embedding(torch.arange(edge.model.config.get_text_config().vocab_size)).float()
