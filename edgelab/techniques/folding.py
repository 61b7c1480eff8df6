"""Folding: scales moved from the input of linear layers into what made that input, exact but for float rounding.

W x = (W diag(s)) (x / s)      and x / s costs nothing where the module before can be divided by s:

a norm        x = n (c + w) + b      ->  w' = (c + w) / s - c,  b' = b / s      c = 1 in Gemma's norms, else 0
a linear      x = f(V y + b) . g     ->  V' = V / s per row,    b' = b / s      where f is homogeneous of degree 1

The second holds for down_proj after up_proj (x = act(gate) . up), for o_proj after v_proj where heads are not grouped
(attention mixes tokens, not channels), and for two layers around a ReLU. SmoothQuant and AWQ are made of this step.

Whether a module is such a source is found by trying: the block runs before and after, and gives the same only where
the layers of the group are all that read what the module makes. A router, an expert or a residual that reads it, too,
would see it divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgelab.errors import listed
from edgelab.model.blocks import Block, Group, is_linear
from edgelab.recipes import RecipeError

CANNOT_RUN = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError)


@dataclass(frozen=True)
class Source:
    """What makes the input of a group and can be divided: a norm with weight offset + w, or a linear layer."""

    module: nn.Module
    offset: float = 0.0


@torch.no_grad()
def fold_scale(block: Block, group: Group, scale: Tensor, source: Source | None = None) -> bool:
    """Multiply the weights of a group's layers by `scale` per input and divide what makes that input by it, in place.

    scale: (in_features,), positive. source: as `find_source` gives it, which looks where this is None. Returns False
    and changes nothing where there is none, or where the outputs of the block would move by more than rounding.
    Raises RecipeError for a scale that is not positive and finite, or of another length.
    """
    inputs = block.module.get_submodule(group.layers[0]).in_features
    if scale.shape != (inputs,) or not bool(((scale > 0) & scale.isfinite()).all()):
        raise RecipeError(
            f"A scale of {listed(group.layers)} is {inputs} positive finite numbers, one for each input; "
            f"this one has shape {tuple(scale.shape)} and a smallest value of {float(scale.min()):g}."
        )
    source = source or find_source(block, group)
    return source is not None and _try(block, group, source, scale.to(torch.float32), keep=True)


@torch.no_grad()
def find_source(block: Block, group: Group) -> Source | None:
    """The module that can be divided in place of the group's input; None where there is none, or another reader."""
    width = block.module.get_submodule(group.layers[0]).in_features
    generator = torch.Generator().manual_seed(1)
    factors = 2.0 ** torch.randint(-3, 4, (width,), generator=generator)  # exact in any float
    for source in _candidates(block, group, width):
        if _try(block, group, source, factors, keep=False):
            return source
    return None


def _candidates(block: Block, group: Group, width: int) -> Iterator[Source]:
    """Modules of the right shape: the norm whose output the group reads, and linear layers next to its first layer."""
    if group.source is not None:
        norm = block.module.get_submodule(group.source)
        offset = norm_offset(norm)
        if offset is not None:
            yield Source(norm, offset)
    owner = block.module.get_submodule(group.layers[0].rpartition(".")[0])
    for name, layer in owner.named_children():
        if is_linear(layer) and layer.out_features == width and name != group.layers[0].rpartition(".")[2]:
            yield Source(layer)


def norm_offset(module: nn.Module) -> float | None:
    """The c of a module that computes n(x) (c + w) + b with a weight w of one dimension: 0 or 1. None for any other."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or parameters.keys() - {"weight", "bias"}:
        return None
    inputs = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    ones = zeros | {"weight": torch.ones_like(weight)}
    try:
        at_zero, at_one = (torch.func.functional_call(module, values, (inputs,)) for values in (zeros, ones))
    except CANNOT_RUN:  # such as a norm that is given a gate as well
        return None
    if not at_zero.any():
        return 0.0
    return 1.0 if torch.allclose(at_one, 2 * at_zero, rtol=1e-2) else None


def _try(block: Block, group: Group, source: Source, scale: Tensor, keep: bool) -> bool:
    """Fold a scale and say whether the outputs of the block stay; the weights stay folded only if so, and `keep`."""
    layers = [block.module.get_submodule(name) for name in group.layers]
    bias = getattr(source.module, "bias", None)
    changed = [source.module.weight, *([] if bias is None else [bias]), *(layer.weight for layer in layers)]
    if any(id(parameter) in block.shared for parameter in changed):
        return False
    before, stored = block.on_probe(), [parameter.clone() for parameter in changed]
    per_output = scale[:, None] if isinstance(source.module, nn.Linear) else scale
    _assign(source.module.weight, (source.module.weight.float() + source.offset) / per_output - source.offset)
    if bias is not None:
        _assign(bias, bias.float() / scale)
    for layer in layers:
        _assign(layer.weight, layer.weight.float() * scale)
    stays = _same(block.on_probe(), before, block.probe)
    if not (stays and keep):
        for parameter, values in zip(changed, stored, strict=True):
            parameter.copy_(values)
    return stays


def _assign(parameter: nn.Parameter, values: Tensor) -> None:
    parameter.copy_(values.to(parameter.dtype))


def _same(after: Tensor, before: Tensor, entered: Tensor) -> bool:
    """Whether outputs (samples, time, hidden) of a block differ by rounding only, token by token.

    A reader that is left out moves what the block adds to a token by a good part; rounding of the weights and of the
    sums by far less than the root of the unit of the format.
    """
    unit = torch.finfo(before.dtype).eps
    moved, added, size = (
        states.float().norm(dim=-1) for states in (after - before, before - entered, before)
    )
    return bool((moved <= unit**0.5 * added + 16 * unit * size).all())
