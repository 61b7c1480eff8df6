"""Folding: scales moved from the input of linear layers into what made that input, exact but for float rounding.

W x = (W diag(s)) (x / s)      and x / s costs nothing where the module before can be divided by s:

a norm        x = n (c + w) + b      ->  w' = (c + w) / s - c,  b' = b / s      c = 1 in Gemma's norms, else 0
a linear      x = f(V y + b) . g     ->  V' = V / s per row,    b' = b / s      where f is homogeneous of degree 1

The second holds for down_proj after up_proj (x = act(gate) . up), for o_proj after v_proj where heads are not grouped
(attention mixes tokens, not channels), and for two layers around a ReLU. SmoothQuant and AWQ are made of this step.
"""

from __future__ import annotations

import inspect
from contextlib import suppress

import torch
from torch import Tensor, nn

from edgelab.model.blocks import Group
from edgelab.recipes import RecipeError

PROBE_TOKENS = 4
CANNOT_RUN = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError)


@torch.no_grad()
def fold_scale(block_module: nn.Module, group: Group, scale: Tensor) -> bool:
    """Multiply the weights of a group's layers by `scale` per input and divide what makes that input by it, in place.

    scale: (in_features,), positive. Returns False and changes nothing where no module is known that could be divided.
    The layers of the group have to be all that reads their input. Raises RecipeError for a scale that is not positive
    and finite, or of another length.
    """
    layers = [block_module.get_submodule(name) for name in group.layers]
    inputs = layers[0].in_features
    if scale.shape != (inputs,) or not bool(((scale > 0) & scale.isfinite()).all()):
        raise RecipeError(
            f"A scale of {' and '.join(group.layers)} is {inputs} positive finite numbers, one for each input; "
            f"this one has shape {tuple(scale.shape)} and a smallest value of {float(scale.min()):g}."
        )
    source, offset = find_source(block_module, group)
    if source is None:
        return False
    scale = scale.to(torch.float32)
    per_output = scale[:, None] if isinstance(source, nn.Linear) else scale
    _assign(source.weight, (source.weight.float() + offset) / per_output - offset)
    if getattr(source, "bias", None) is not None:
        _assign(source.bias, source.bias.float() / scale)
    for layer in layers:
        _assign(layer.weight, layer.weight.float() * scale)
    return True


def _assign(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.copy_(values.to(parameter.dtype))


@torch.no_grad()
def find_source(block_module: nn.Module, group: Group) -> tuple[nn.Module | None, float]:
    """The module whose output can be scaled in place of the group's input, and the c of its weight c + w.

    Found by trying, not from names: a norm is what is affine in a weight of one dimension, and a linear layer is a
    source if multiplying its outputs multiplies the same inputs of the group. (None, 0.0) where there is none.
    """
    if group.source is not None:
        norm = block_module.get_submodule(group.source)
        offset = norm_offset(norm)
        if offset is not None:
            return norm, offset
    reader = block_module.get_submodule(group.layers[0])
    owner = block_module.get_submodule(group.layers[0].rpartition(".")[0])
    for layer in owner.children():
        fits = isinstance(layer, nn.Linear) and layer.out_features == reader.in_features
        if fits and layer is not reader and _passes_scale(owner, layer, reader):
            return layer, 0.0
    return None, 0.0


def norm_offset(module: nn.Module) -> float | None:
    """The c of a module that computes n(x) (c + w) + b with a weight w of one dimension: 0 or 1. None for any other."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or parameters.keys() - {"weight", "bias"}:
        return None
    inputs = _probe(weight, len(weight))[0]
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    ones = zeros | {"weight": torch.ones_like(weight)}
    at_zero, at_one = (torch.func.functional_call(module, values, (inputs,)) for values in (zeros, ones))
    if not at_zero.any():
        return 0.0
    return 1.0 if torch.allclose(at_one, 2 * at_zero, rtol=1e-2) else None


def _passes_scale(owner: nn.Module, layer: nn.Linear, reader: nn.Linear) -> bool:
    """Does the input of `reader` scale with the output of `layer`, channel by channel, when `owner` runs?"""
    generator = torch.Generator().manual_seed(1)
    factors = 2.0 ** torch.randint(0, 4, (layer.out_features,), generator=generator)  # exact in any float
    factors = factors.to(layer.weight)
    with suppress(*CANNOT_RUN):  # what needs more arguments, or inputs of another width, cannot be tried
        plain, scaled = (_inputs(reader, owner, layer, by) for by in (torch.ones_like(factors), factors))
        return torch.allclose(scaled, plain * factors, rtol=1e-2, atol=0)
    return False


def _inputs(reader: nn.Linear, owner: nn.Module, layer: nn.Linear, factors: Tensor) -> Tensor:
    """What enters `reader` when `owner` runs on a few random tokens and the outputs of `layer` are times `factors`.

    Attention runs without rotation.
    """
    inputs = _probe(layer.weight, layer.in_features)
    still = inputs.new_ones(1, PROBE_TOKENS, 1), inputs.new_zeros(1, PROBE_TOKENS, 1)  # cosine, sine
    rotary = "position_embeddings" in inspect.signature(owner.forward).parameters
    arguments = {"position_embeddings": still, "attention_mask": None} if rotary else {}
    seen: list[Tensor] = []
    with (
        layer.register_forward_hook(lambda module, inputs, output: output * factors),
        reader.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])),
    ):
        owner(inputs, **arguments)
    return seen[0]


def _probe(like: Tensor, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, PROBE_TOKENS, width, generator=generator).to(like)
