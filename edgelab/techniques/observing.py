"""Looking at a model while it reads: how large the inputs of layers are, and what the loss would say to their absence.

activation   root of the mean of a**2 over tokens
taylor       mean over samples of |sum over tokens of a * dL/da|: to first order, how much the loss of a sample moves
             when the channel is gone (Molchanov et al. 2017, arXiv:1611.06440)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgelab.model.blocks import Block, block_list, half_precision
from edgelab.model.logits import SLICE, head_logits, hidden_states
from edgelab.model.losses import cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_sizes(
    model: PreTrainedModel, layers: list[str], tokens: Tensor, progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """Root mean square of each input of layers, by name: (in_features,). tokens: (samples, length)."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        sums[name] = sums.get(name, 0) + inputs.detach().float().flatten(0, -2).square().sum(0)

    with torch.no_grad(), half_precision(), watched(model, layers, add):
        for done, sample in enumerate(tokens, 1):
            model.base_model(input_ids=sample[None], use_cache=False)
            progress(done, len(tokens))
    return {name: (total / tokens.numel()).sqrt() for name, total in sums.items()}


def taylor(
    model: PreTrainedModel, layers: list[str], tokens: Tensor, progress: Callable[[int, int], None]
) -> dict[str, Tensor]:
    """What the loss would say to the absence of each input of layers, (in_features,). tokens: (samples, length)."""
    totals: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def keep(name: str, inputs: Tensor) -> None:
        inputs.retain_grad()
        seen[name] = inputs

    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = model.get_input_embeddings().weight
    try:
        model.requires_grad_(False)
        embedding.requires_grad_(True)  # a path for the gradient, at the price of one matrix
        with watched(model, layers, keep):
            for done, sample in enumerate(tokens, 1):
                with half_precision():
                    loss = cross_entropy(model, sample[None])
                loss.backward()
                for name, inputs in seen.items():
                    moved = (inputs.detach().float() * inputs.grad.float()).flatten(0, -2).sum(0).abs()
                    totals[name] = totals.get(name, 0) + moved
                embedding.grad = None
                seen.clear()
                progress(done, len(tokens))
    finally:
        embedding.requires_grad_(False)
        for parameter in needed:
            parameter.requires_grad_(True)
    return {name: total / len(tokens) for name, total in totals.items()}


@torch.no_grad()
def nll_behind(model: PreTrainedModel, found: list[Block], hidden: Tensor, tokens: Tensor) -> float:
    """Mean NLL in nats of the next tokens, given the hidden states (samples, length, hidden) behind the last block.

    found: the blocks of the model, none of which is run. tokens: (samples, length).
    """
    _, modules = block_list(model)
    total = 0.0
    given: list[Tensor] = []

    def answer(states: Tensor, *_: object, **__: object) -> Tensor | tuple[Tensor]:
        return found[0].answer(
            given.pop() if given else states
        )  # the first gives them, the others hand them on

    try:
        for module in modules:
            module.forward = answer
        for sample, states in zip(tokens, hidden, strict=True):
            given.append(states[None])
            final = hidden_states(model, sample[None])[0, :-1]
            for part, targets in zip(final.split(SLICE), sample[1:].split(SLICE), strict=True):
                total += float(functional.cross_entropy(head_logits(model, part), targets, reduction="sum"))
    finally:
        for module in modules:
            del module.forward
    return total / (len(tokens) * (tokens.shape[1] - 1))


@contextmanager
def watched(model: nn.Module, names: list[str], visit: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `visit(name, inputs)` whenever a module of these names is about to run, for as long as this lasts."""

    def before(name: str) -> Callable:
        return lambda module, inputs: visit(name, inputs[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(before(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
