"""Shapes that a configuration does not give: one layer narrower than another, or two factors in place of a layer.

A configuration of transformers has one width for all layers. What differs from the model that it describes is written
down by name, and put back before the weights are read. Factors are a `Sequential` of two layers, `name.0` and `name.1`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Shapes = dict[str, list[int]]


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model without memory: shapes only."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def odd_shapes(model: PreTrainedModel) -> Shapes:
    """Weights whose shape is another than the configuration gives, by the name of their layer.

    Layers of any kind that have `out_features` and `in_features` count, packed ones too, vectors such as norms, and
    the two factors of a layer.
    """
    usual = dict(skeleton(model.config).named_modules())
    return {
        name: shape
        for name, layer in model.named_modules()
        if (shape := _shape(layer))
        and (shape != _shape(usual[name]) if name in usual else name.rpartition(".")[0] in usual)
    }


def give_shapes(model: PreTrainedModel, shapes: Shapes) -> None:
    """Give layers of a skeleton their own shapes, in place."""
    there = dict(model.named_modules())
    for name in dict.fromkeys(one.rpartition(".")[0] for one in shapes if one not in there):
        first, second = (_linear(shapes[f"{name}.{place}"], there[name], bias=place == 1) for place in (0, 1))
        model.set_submodule(name, nn.Sequential(first, second))
    for name, shape in shapes.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = shape
            if layer.bias is not None:
                layer.bias = _empty(layer.bias, shape[:1])
        layer.weight = _empty(layer.weight, shape)


def _linear(shape: list[int], like: nn.Linear, bias: bool) -> nn.Linear:
    bias = bias and like.bias is not None
    return nn.Linear(shape[1], shape[0], bias, device="meta", dtype=like.weight.dtype).requires_grad_(False)


def _empty(parameter: nn.Parameter, shape: list[int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), requires_grad=False)


def _shape(layer: nn.Module) -> list[int] | None:
    if hasattr(layer, "out_features"):
        return [layer.out_features, layer.in_features]
    weight = getattr(layer, "weight", None)
    return list(weight.shape) if isinstance(weight, torch.Tensor) else None
