"""SmoothQuant: moving the outliers of activations into the weights before both become int8.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)      Y = (X / s) (W diag(s))^T

X / s costs nothing: it is folded into the norm or the linear layer that made X (`edgelab.techniques.folding`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from edgelab.model import blocks as structure
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import ActivationGrid
from edgelab.techniques.folding import fold_scale
from edgelab.techniques.quantization.activations import (
    Ranged,
    calibrated_grids,
    channel_peaks,
    to_int8,
    with_unseen,
)
from edgelab.techniques.quantization.rtn import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_SHARE = 1e-5  # of the largest peak: what a channel of zeros counts as


def smoothing_scale(activation_peaks: Tensor, weight_peaks: Tensor, alpha: float) -> Tensor:
    """What each input channel is divided by: (in_features,), float32, positive.

    activation_peaks, weight_peaks: (in_features,), the largest magnitude of a channel in the activations and in all
    weights that read it. alpha 0 leaves weights of equal peaks, alpha 1 activations of equal peaks.
    Xiao et al. 2022, arXiv:2211.10438, equation 4.
    """
    activation_peaks, weight_peaks = (
        peaks.float().clamp(min=float(peaks.amax()) * SMALLEST_SHARE or 1.0)
        for peaks in (activation_peaks, weight_peaks)
    )
    return activation_peaks**alpha / weight_peaks ** (1 - alpha)


@torch.no_grad()
def smooth(model: PreTrainedModel, peaks: dict[str, Tensor], alpha: float, sample: Tensor) -> tuple[int, int]:
    """Fold smoothing scales into a float model, in place; its outputs stay what they were.

    peaks: channel_peaks of the model. sample: (1, length) tokens, from which the structure is read.
    Returns how many groups of layers were smoothed, and how many there are.
    """
    found, hidden = structure.blocks(model, sample[:, :8])
    smoothed = total = 0
    for block in found:
        for group in block.groups(hidden):
            layers = block.linear()
            weight_peaks = torch.stack([layers[name].weight.abs().amax(0) for name in group.layers]).amax(0)
            scale = smoothing_scale(peaks[f"{block.name}.{group.layers[0]}"], weight_peaks, alpha)
            smoothed += fold_scale(block, group, scale)
            total += 1
        hidden = block(hidden)
    return smoothed, total


@register("quantize.smooth", version=3, shown=("alpha",))
@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Ranged):
    """SmoothQuant, then int8 weights per row and uint8 activations, but for the head.

    alpha: how much of the outliers moves into the weights, 0 to 1. activations: static (one calibrated range per
    tensor) or dynamic (a scale per token, for which 0.5 is enough). Inputs without a source to fold into stay as
    they are.
    Xiao et al. 2022, arXiv:2211.10438.
    """

    alpha: float = 0.75
    activations: Literal["static", "dynamic"] = "static"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"quantize.smooth:alpha={self.alpha} is outside 0 to 1.")
        if self.activations == "dynamic" and self.range != "minmax":
            raise RecipeError(
                f"quantize.smooth:range={self.range} has no effect with activations=dynamic; leave one of them out."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with smoothed int8 layers."""
        layers = linear_layers(model, context.record)
        windows = self.draw(context, structure.longest(model))
        passes = 2 if self.activations == "static" else 1
        total = passes * len(windows)
        peaks = channel_peaks(model, windows, progress=lambda done, _: context.progress(done, total))
        model = copy.deepcopy(model)
        smoothed, groups = smooth(model, peaks, self.alpha, windows[:1])
        context.record.notes.append(f"{smoothed} of {groups} inputs smoothed")
        grids = {name: ActivationGrid() for name in layers}
        if self.activations == "static":
            grids = calibrated_grids(
                model,
                windows,
                self.range,
                self.percentile,
                progress=lambda done, _: context.progress(len(windows) + done, total),
            )
            grids = with_unseen(grids, layers, context)
        to_int8(model, grids)
        return model
