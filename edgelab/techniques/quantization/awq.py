"""AWQ: give the input channels that carry much a finer grid, by scaling their weights up and their inputs down.

W x = (W diag(s)) (diag(s)^-1 x)          s_j = mean|x_j|**alpha, alpha searched for the least output error
E = Q(W diag(s)) diag(s)^-1 - W           output error = trace(E H E^T) with H = mean of x x^T
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgelab.model.blocks import Block, Group, blocks, half_precision, longest
from edgelab.recipes import Context, register
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.folding import find_source, fold_scale
from edgelab.techniques.quantization.gptq import input_products
from edgelab.techniques.quantization.ranges import find_grid, on_grid, round_to_grid
from edgelab.techniques.quantization.rtn import (
    check_group_size,
    check_settings,
    in_groups,
    linear_layers,
    round_rest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_SHARE = 1e-5  # of the largest magnitude: what an input that is always zero counts as
ALPHAS = 20  # steps of the search from no scaling to scaling by the whole mean magnitude


def search_scale(
    weight: Tensor, magnitude: Tensor, hessian: Tensor, bits: int, group_size: int, symmetric: bool = False
) -> tuple[Tensor, float]:
    """The scale of input channels that makes the rounding error of the outputs least, and its alpha.

    weight: (out_features, in_features). magnitude: mean |x| of each input, (in_features,). hessian: mean of x x^T.
    Returns (in_features,) with geometric middle of the extremes 1. Lin et al. 2024, arXiv:2306.00978, section 3.2.
    """
    best, least, best_alpha = torch.ones_like(magnitude), torch.inf, 0.0
    least_magnitude = float(magnitude.amax()) * SMALLEST_SHARE or 1.0
    for step in range(ALPHAS):
        alpha = step / ALPHAS
        scale = magnitude.clamp(min=least_magnitude) ** alpha
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        groups = in_groups(weight * scale, group_size)
        rounded = on_grid(groups, *find_grid(groups, bits, symmetric), bits)
        error = rounded.flatten(1) / scale - weight
        loss = float(((error @ hessian) * error).sum())
        if loss < least:
            best, least, best_alpha = scale, loss, alpha
    return best, best_alpha


@register("quantize.awq", shown=("bits", "group_size"))
@dataclass(frozen=True, kw_only=True)
class AWQ(Calibrated):
    """Activation-aware scales for every group of layers that read the same input, clipped ranges, then rounding.

    Scales are folded into what makes the input, a norm or a linear layer; where nothing can take them, only clipping
    is left.

    bits: 2 to 8. group_size: inputs that share a scale, 0 for a whole row. symmetric: zero in the middle of the grid.
    clip: search the share of each range that makes the squared error of the weights least, each counted by the mean
    square of its input. scales_only: fold the scales and leave the weights in float, for another technique to round:
    quantize.awq:scales_only=true + quantize.gptq.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    clip: bool = True
    scales_only: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.method, self.group_size, self.bits)

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with folded scales and, unless scales_only, PackedLinear layers."""
        layers = linear_layers(model, context.record)
        check_group_size(self.group_size, [layer.in_features for layer in layers.values()])
        tokens = self.draw(context, longest(model))
        model = copy.deepcopy(model)
        found, hidden = blocks(model, tokens)
        scaled: list[bool] = []
        with torch.no_grad(), half_precision():
            for done, block in enumerate(found, 1):
                hidden, of_block = self._change_block(block, hidden, context)
                scaled += of_block
                context.progress(done, len(found))
        context.record.notes.append(f"{sum(scaled)} of {len(scaled)} inputs scaled")
        if not self.scales_only:
            round_rest(model, context, self.bits, self.group_size, self.symmetric)
        return model

    def _change_block(self, block: Block, hidden: Tensor, context: Context) -> tuple[Tensor, list[bool]]:
        """Scale and round the layers of one block in place; returns the hidden states behind it.

        And for each group of layers whether a scale was found and folded.
        """
        seen: dict[Group, tuple[Tensor, Tensor]] = {}

        def visit(group: Group, inputs: Tensor) -> None:
            hessian, lost = input_products(inputs)
            if lost:
                context.record.notes.append(f"{block.name}: {lost} tokens with non-finite inputs left out.")
            seen[group] = hessian, inputs.nan_to_num(0, 0, 0).abs().flatten(0, -2).mean(0).float()

        outputs = block.on_the_way(hidden, block.groups(hidden[:1]), visit)
        layers, scaled = block.linear(), []
        with torch.autocast("cpu", enabled=False):
            for group, (hessian, magnitude) in seen.items():
                source = find_source(block, group)
                if source is not None:
                    weight = torch.cat([layers[name].weight for name in group.layers])
                    scale, _ = search_scale(
                        weight, magnitude, hessian, self.bits, self.group_size, self.symmetric
                    )
                scaled.append(source is not None and fold_scale(block, group, scale, source))
                if scaled[-1]:
                    seen[group] = hessian / scale / scale[:, None], magnitude
            if self.scales_only:
                return outputs, scaled
            for group, (hessian, _) in seen.items():
                for name in group.layers:
                    tensor = self._round(layers[name].weight, hessian)
                    block.module.set_submodule(name, PackedLinear(tensor, layers[name].bias))
        return block(hidden), scaled

    def _round(self, weight: Tensor, hessian: Tensor) -> QuantizedTensor:
        groups = in_groups(weight, self.group_size)
        importance = hessian.diagonal().view(groups.shape[1:])
        rule = "mse" if self.clip else "minmax"
        scale, zero_point = find_grid(groups, self.bits, self.symmetric, rule, importance=importance)
        integers = round_to_grid(groups, scale, zero_point, self.bits)
        return QuantizedTensor(integers.flatten(1).to(torch.uint8), scale, zero_point, self.bits)
