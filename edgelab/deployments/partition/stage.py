"""A stage: some parts of a model, with the keys and values of its own blocks for each request.

The parts are those of a profile: part 0 is the embedding, part i is block i - 1, the last part is the final norm and
the head. The first stage reads tokens, every other one the hidden states of the one before it, and the last gives
logits. Every stage runs the model's own forward pass over its own blocks, so that any chain of stages gives the same
logits to the last bit as one stage of all parts. (Against the model as it was loaded they may differ by some 1e-6: the
order of sums in a product depends on where in memory a weight begins.) What comes in says where it belongs: a stage
never reads the same position twice.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.devices.shapes import ModelShape, ShapeError
from edgelab.errors import EdgeLabError
from edgelab.model.blocks import block_list
from edgelab.model.logits import check_frequencies, head_logits
from edgelab.model.shapes import skeleton
from edgelab.runtimes.eager import TorchCache, use_kernels
from edgelab.storage import variants
from edgelab.techniques.pruning.layers import take_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORMS = ("norm", "final_layernorm")  # of the layouts that shapes are known of


class StageError(EdgeLabError):
    """A stage that cannot be made, or that was asked for what does not follow."""


class Stage:
    """Parts first to last - 1 of a model, which is taken apart for it: what a stage does not need it lets go."""

    def __init__(self, model: PreTrainedModel, first: int, last: int) -> None:
        count = len(block_list(model)[1])
        check_parts(first, last, count + 2)
        try:
            ModelShape.from_config(model.config)
        except ShapeError as error:
            raise StageError(f"This model is not cut into stages: {error}") from None
        self.first, self.last, self.parts, self.model = first, last, count + 2, model
        self.hidden_size: int = model.config.get_text_config().hidden_size
        own = blocks_of(first, last, count + 2)
        self.blocks, self.dtype = len(own), model.dtype
        name, _ = block_list(model)
        self._base = model.get_submodule(name.rpartition(".")[0])
        take_out(model, set(range(count)) - set(own))
        place = next((one for one in NORMS if hasattr(self._base, one)), None)
        if place is None:
            raise StageError(f"The final norm of a {model.config.model_type} model is not known here.")
        self._norm = self._base.get_submodule(place)
        setattr(self._base, place, nn.Identity())
        if first > 0:
            model.set_input_embeddings(nn.Identity())
        if last < self.parts:
            model.set_output_embeddings(nn.Identity())
            self._norm = nn.Identity()
        self._given: Tensor | None = None
        if own and first > 0:
            model.get_submodule(name)[0].register_forward_pre_hook(self._hand_in)
        self._caches: dict[int, TorchCache] = {}
        self._length: dict[int, int] = {}

    @classmethod
    def load(cls, folder: Path, first: int, last: int) -> Stage:
        """Of a variant, reading the tensors of these parts alone; packed layers run on their kernels."""
        shell = skeleton(variants.load_config(folder))
        _, blocks = block_list(shell)
        check_parts(first, last, len(blocks) + 2)
        own = blocks_of(first, last, len(blocks) + 2)
        others = [blocks[place] for place in range(len(blocks)) if place not in own]
        others += [shell.get_input_embeddings()] * (first > 0)
        others += [shell.get_output_embeddings()] * (last < len(blocks) + 2)
        unwanted = {id(part) for module in others for part in module.modules()}
        names = {which for which, module in shell.named_modules() if id(module) in unwanted}
        model = variants.load_part(folder, lambda which: which not in names)
        use_kernels(model)
        return cls(model, first, last)

    def held_bytes(self) -> int:
        """Of the weights, each counted once."""
        kept = (*self.model.parameters(), *self.model.buffers(), *self._norm.parameters())
        return sum({one.data_ptr(): one.nbytes for one in kept}.values())

    def modules(self) -> list[nn.Module]:
        """What its parts consist of, in order: embedding, blocks, head. The final norm is not among them."""
        blocks = list(block_list(self.model)[1]) if self.blocks else []
        embedding = [self.model.get_input_embeddings()] * (self.first == 0)
        return embedding + blocks + [self.model.get_output_embeddings()] * (self.last == self.parts)

    def length(self, request: int = 0) -> int:
        """Tokens of a request that this stage has read."""
        return self._length.get(request, 0)

    @torch.inference_mode()
    def read(self, given: Tensor, position: int, request: int = 0, every: bool = False) -> Tensor:
        """Go on: token ids (time,) at the first stage, hidden states (time, hidden) at others.

        position: of the first of them in the request. Returns hidden states (time, hidden), only the last of them where
        nothing but the head follows, or at the last stage logits of the last token, (vocabulary,) float32; with every,
        of each token, (time, vocabulary). Raises StageError where the position is not the next one; the head alone may
        leave some out. Raises LogitsError where what was read before has other rotary frequencies.
        """
        is_next = position == self.length(request) or (not self.blocks and position > self.length(request))
        if not is_next:
            raise StageError(
                f"Request {request} goes on at token {self.length(request)} in this stage, not at {position}; read the "
                "whole sequence again, or what was sent twice once."
            )
        check_frequencies(self.model.config, self.length(request), len(given))
        states = given[None] if given.dtype == torch.long else given[None].to(self.dtype)
        if self.first == 0 or self.blocks:
            states = self._through_blocks(states, request)
        self._length[request] = position + len(given)
        if self.last == self.parts - 1 and not every:
            return states[0, -1:]
        if self.last < self.parts:
            return states[0]
        states = self._norm(states)  # of all positions: of one alone it would be another sum
        return head_logits(self.model, states)[0] if every else head_logits(self.model, states[:, -1:])[0, -1]

    def _through_blocks(self, states: Tensor, request: int) -> Tensor:
        what = {"input_ids": states} if self.first == 0 else {"inputs_embeds": states}
        self._given = states
        if not self.blocks:
            return self._base(**what, use_cache=False)[0]
        cache = self._caches.setdefault(request, TorchCache(self.model))
        return self._base(**what, past_key_values=cache.values, use_cache=True)[0]

    def _hand_in(self, block: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states that came in, whatever the model makes of embeddings before its first block."""
        return (self._given, *arguments[1:])

    def forget(self, request: int = 0) -> None:
        """Let go of a request."""
        self._caches.pop(request, None)
        self._length.pop(request, None)

    def forget_all(self) -> None:
        """Let go of every request."""
        self._caches.clear()
        self._length.clear()


def blocks_of(first: int, last: int, parts: int) -> range:
    """The blocks among parts first to last - 1."""
    return range(max(first - 1, 0), min(last - 1, parts - 2))


def check_parts(first: int, last: int, parts: int) -> None:
    """Raises StageError for a run that a model of so many parts has not."""
    if not 0 <= first < last <= parts:
        raise StageError(f"A stage of parts {first} to {last - 1} is none of a model of {parts} parts.")


def chain_of(model: PreTrainedModel, cuts: list[int]) -> list[Stage]:
    """The stages of a model in one process, cut before each of these parts; for comparing them with the whole."""
    ends = [0, *cuts, len(block_list(model)[1]) + 2]
    return [Stage(copy.deepcopy(model), first, last) for first, last in pairwise(ends)]


def read_through(stages: list[Stage], ids: Tensor, position: int, request: int = 0) -> Tensor:
    """Logits of the last token, (vocabulary,), of token ids (time,) that every stage reads in turn."""
    given = ids
    for stage in stages:
        given = stage.read(given, position, request)
    return given


def generate(stages: list[Stage], ids: list[int], tokens: int, request: int = 0) -> list[int]:
    """The likeliest tokens that follow a prompt."""
    found: list[int] = []
    given, position = torch.tensor(ids), 0
    for _ in range(tokens):
        logits = read_through(stages, given, position, request)
        position += len(given)
        found.append(int(logits.argmax()))
        given = torch.tensor(found[-1:])
    return found
