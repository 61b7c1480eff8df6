"""A weight row on its grid, at bits and groups to choose."""

import math
from collections.abc import Mapping

import ipywidgets
import numpy as np
import torch
from torch import Tensor

from edgelab.devices import stored_bits
from edgelab.plots import weight_grid
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.rtn import quantize_affine
from edgelab.widgets import BITS, GROUP_SIZES, WIDE, figure_png, group_words, picture


def grid_explorer(weight: Tensor) -> ipywidgets.VBox:
    """Pick a row of `weight`, (out_features, in_features), bits, group size and symmetry; its grid answers at once.

    Above the picture it says mean squared error, largest error in steps of the grid, and effective bits per weight.
    """
    out_features, in_features = weight.shape
    fitting = [(group_words(size), size) for size in GROUP_SIZES if not size or in_features % size == 0]
    row = ipywidgets.IntSlider(min=0, max=out_features - 1, description="Row", **WIDE)
    bits = ipywidgets.IntSlider(min=BITS[0], max=BITS[-1], value=4, description="Bits", **WIDE)
    group_size = ipywidgets.SelectionSlider(options=fitting, description="Group size", **WIDE)
    symmetric = ipywidgets.Checkbox(
        description="symmetric: zero in the middle of the grid", indent=True, **WIDE
    )
    answer, image = ipywidgets.HTML(), picture()

    def redraw(change: Mapping | None = None) -> None:
        weights = weight[row.value : row.value + 1].detach().float()  # (1, in_features)
        tensor = quantize_affine(weights, bits.value, group_size.value, symmetric.value)
        answer.value = grid_sentence(weights, tensor)
        title = f"Row {row.value}, {bits.value} bits, {group_words(group_size.value)}"
        figure = weight_grid(weights[0].numpy(), tensor.dequantize()[0].numpy(), grid_levels(tensor), title)
        image.value = figure_png(figure)

    for control in (row, bits, group_size, symmetric):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([row, bits, group_size, symmetric, answer, image])


def grid_levels(tensor: QuantizedTensor) -> np.ndarray:
    """What the integers of each group of the first row stand for: (groups, 2**bits)."""
    integers = torch.arange(2**tensor.bits)
    return ((integers - tensor.centre()[0, :, None]) * tensor.scale[0, :, None].float()).numpy()


def grid_sentence(weights: Tensor, tensor: QuantizedTensor) -> str:
    """HTML: how far rounding moved the weights, and what they take. The error is in `data-mse`, too."""
    error = tensor.dequantize() - weights
    mse = error.square().mean().item()
    steps = (error.unflatten(-1, (tensor.scale.shape[1], -1)).abs() / tensor.scale[..., None]).max().item()
    noise_db = 10 * math.log10(weights.square().mean().item() / mse) if mse else math.inf
    symmetric = tensor.zero_point is None
    stored = stored_bits(tensor.bits, tensor.group_size, not symmetric)
    share = "scales" if symmetric else "scales and zero-points"
    return (
        f'<span class="edgelab-grid" data-mse="{mse:.6e}">Mean squared error <b>{mse:.3e}</b>, '
        f"{noise_db:.1f} dB below the weights. Largest error <b>{steps:.2f} steps</b> of its grid. "
        f"<b>{stored:.3f} bits per weight</b>: {tensor.bits} and a share of the {share}.</span>"
    )
