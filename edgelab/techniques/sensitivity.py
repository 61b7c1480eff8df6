"""Sensitivity: how much a model minds that one of its layers is changed, measured, or predicted for far less.

kl           the divergence itself: each layer is changed alone, and the blocks from its own on run again
fisher       1/2 mean_t log(1 + (g_t . D x_t)**2)    g_t: gradient of -log p(y) in the output, y drawn from the model
gradient     sum |D * dL/dW|                         to first order, L the loss on the text
activation   sum D**2 * mean_t x_t**2                outputs moved, as if inputs were independent
magnitude    sum D**2                                whatever reads it

D = W' - W is what a change does to the weights of a layer, x_t what the layer reads at token t. Each of the five is a
function of a model, tokens and the candidates for each layer, and gives a cost for each candidate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from edgelab.model import blocks as structure
from edgelab.model.losses import cross_entropy
from edgelab.recipes import Context
from edgelab.techniques.observing import input_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 4  # windows of a longer calibration text that costs are measured on: every token counts

Candidates = Callable[
    [str, Tensor], Iterable[Tensor]
]  # name and weight of a layer -> what may replace the weight
Costs = dict[str, list[float]]  # of each layer of the blocks by name, one for each candidate


@torch.no_grad()
def walk(found: list[structure.Block], hidden: Tensor) -> list[Tensor]:
    """Hidden states (samples, length, hidden) that enter each block, and those that leave the last."""
    states = [hidden]
    for block in found:
        states.append(torch.cat([block(sample[None]) for sample in states[-1]]))
    return states


@contextmanager
def _skipped(found: list[structure.Block], hidden: Tensor) -> Iterator[None]:
    """Let every block answer `hidden`, so that the model runs its norm and head over it and nothing else."""
    try:
        for block in found:
            answer = block.answer(hidden)
            block.module.forward = lambda *_, answer=answer, **__: answer
        yield
    finally:
        for block in found:
            del block.module.forward


def logits(model: PreTrainedModel, found: list[structure.Block], tokens: Tensor, hidden: Tensor) -> Tensor:
    """Float32 logits (length, vocabulary) of one sample from the states (1, length, hidden) of its last block."""
    with _skipped(found, hidden):
        return model(input_ids=tokens[None], use_cache=False).logits[0].float()


@torch.enable_grad()
def tail_gradient(
    model: PreTrainedModel, found: list[structure.Block], tokens: Tensor, hidden: Tensor, seed: int
) -> Tensor:
    """Gradient of -log p(y) in the states that leave the last block, each y drawn from the model's own distribution.

    tokens: (samples, length). hidden and the answer: (samples, length, hidden).
    """
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for ids, states in zip(tokens, hidden, strict=True):
        leaf = states[None].detach().requires_grad_()
        log_p = torch.log_softmax(logits(model, found, ids, leaf), -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)  # (length, 1)
        gradients.append(torch.autograd.grad(-log_p.gather(1, drawn).sum(), leaf)[0])
    return torch.cat(gradients)


def block_gradients(
    block: structure.Block, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Carry the gradient (samples, length, hidden) from behind a block to before it, and keep what its layers saw.

    Returns that gradient, and for each linear layer, by name within the block, its inputs (tokens, in_features) and
    the gradient in its outputs (tokens, out_features).
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = arguments[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in block.linear().items()]
    try:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            entering, *grads = torch.autograd.grad(
                block(leaf), [leaf, *outputs.values()], gradient, allow_unused=True, materialize_grads=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(inputs, grads, strict=True)
    return entering, {name: (inputs[name].flatten(0, -2), grad.flatten(0, -2)) for name, grad in pairs}


def fisher_cost(error: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """Half the mean over tokens of log(1 + (gradient . error input)**2): predicted KL divergence, nats per token.

    error: (out_features, in_features). inputs: (tokens, in_features). gradients: (tokens, out_features).
    Without the logarithm a few tokens, such as the first of a text with its massive activations, would decide alone
    by squares far outside the range of the second order. Errors at two tokens that add up in the prediction of a
    third are left out: values in attention (v_proj) look about half as sensitive as `kl_costs` finds them.
    """
    with structure.half_precision():
        moved = inputs @ error.T
    return torch.linalg.vecdot(moved.float(), gradients).square().log1p().mean().item() / 2


@torch.no_grad()
def fisher_costs(model: PreTrainedModel, tokens: Tensor, candidates: Candidates, context: Context) -> Costs:
    """Predicted KL divergence in nats per token of every linear layer of the blocks, one for each candidate of it.

    tokens: (samples, length). candidates: what may stand in for the weight of a layer. One pass forward, one backward,
    block by block, and a product of the inputs with each error: for few tokens far cheaper than `kl_costs`.
    """
    found, hidden = structure.blocks(model, tokens)
    states = walk(found, hidden)
    gradient = tail_gradient(model, found, tokens, states[-1], context.seed)
    costs: Costs = {}
    for done, (block, entering) in enumerate(zip(reversed(found), reversed(states[:-1]), strict=True), 1):
        gradient, seen = block_gradients(block, entering, gradient)
        for name, layer in block.linear().items():
            full, pair = f"{block.name}.{name}", seen.get(name)
            costs[full] = [
                fisher_cost(candidate - layer.weight, *pair) if pair else 0.0  # some layers never run
                for candidate in candidates(full, layer.weight)
            ]
        context.progress(done, len(found))
    return costs


@torch.no_grad()
def kl_costs(model: PreTrainedModel, tokens: Tensor, candidates: Candidates, context: Context) -> Costs:
    """As `fisher_costs`, but measured: each layer is changed alone and the blocks from its own on run again.

    Holds the reference's log-probabilities, samples x length x vocabulary in float32.
    """
    found, hidden = structure.blocks(model, tokens)
    states = walk(found, hidden)
    reference = [
        torch.log_softmax(logits(model, found, ids, leaving[None]), -1)
        for ids, leaving in zip(tokens, states[-1], strict=True)
    ]
    costs: Costs = {}
    for first, block in enumerate(found):
        for name, layer in block.linear().items():
            weight, full = layer.weight.data, f"{block.name}.{name}"
            costs[full] = []
            for candidate in candidates(full, weight):
                try:
                    layer.weight.data = candidate.to(weight.dtype)
                    leaving = walk(found[first:], states[first])[-1]
                finally:  # also where somebody has had enough of waiting
                    layer.weight.data = weight
                divergences = []
                for ids, after, log_p in zip(tokens, leaving, reference, strict=True):
                    log_q = torch.log_softmax(logits(model, found, ids, after[None]), -1)
                    divergences.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q).mean().item())
                costs[full].append(float(np.mean(divergences)))
        context.progress(first + 1, len(found))
    return costs


@torch.enable_grad()
def gradient_costs(model: PreTrainedModel, tokens: Tensor, candidates: Candidates, context: Context) -> Costs:
    """|error * gradient of the loss|, summed over the weights of a layer: nats per token to first order."""
    twin = copy.deepcopy(model).requires_grad_(False)
    layers = block_layers(twin)
    for layer in layers.values():
        layer.weight.requires_grad_()
    for done, sample in enumerate(tokens, 1):
        with structure.half_precision():
            loss = cross_entropy(twin, sample[None]) / len(tokens)
        loss.backward()  # adds to the gradients of the samples before
        context.progress(done, len(tokens))

    def cost(name: str, error: Tensor) -> float:
        gradient = layers[name].weight.grad
        return 0.0 if gradient is None else float((error * gradient).abs().sum())

    return _from_errors(model, candidates, cost)


def activation_costs(
    model: PreTrainedModel, tokens: Tensor, candidates: Candidates, context: Context
) -> Costs:
    """error**2 times the mean square of its input, summed over the weights of a layer."""
    sizes = input_sizes(model, list(block_layers(model)), tokens, context.progress)

    def cost(name: str, error: Tensor) -> float:
        return float((error.square() @ sizes[name].square()).sum()) if name in sizes else 0.0

    return _from_errors(model, candidates, cost)


def magnitude_costs(
    model: PreTrainedModel, tokens: Tensor, candidates: Candidates, context: Context
) -> Costs:
    """error**2, summed over the weights of a layer. No text is needed."""
    return _from_errors(model, candidates, lambda name, error: float(error.square().sum()))


@torch.no_grad()
def _from_errors(
    model: PreTrainedModel, candidates: Candidates, cost: Callable[[str, Tensor], float]
) -> Costs:
    return {
        name: [cost(name, (candidate - layer.weight).float()) for candidate in candidates(name, layer.weight)]
        for name, layer in block_layers(model).items()
    }


def block_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The float linear layers of the blocks, by name within the model."""
    place, modules = structure.block_list(model)
    return {
        f"{place}.{index}.{name}": layer
        for index, module in enumerate(modules)
        for name, layer in structure.float_linear(module).items()
    }


MEASURES = {
    "kl": kl_costs,
    "fisher": fisher_costs,
    "gradient": gradient_costs,
    "activation": activation_costs,
    "magnitude": magnitude_costs,
}
