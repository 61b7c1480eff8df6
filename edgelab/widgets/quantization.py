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
from edgelab.techniques.quantization.one_bit import quantize_binary, quantize_ternary
from edgelab.techniques.quantization.rtn import quantize_affine
from edgelab.widgets import BITS, GROUP_SIZES, WIDE, Picture, group_words

GRIDS = {
    "asymmetric": lambda weight, bits, group_size: quantize_affine(weight, bits, group_size),
    "symmetric": lambda weight, bits, group_size: quantize_affine(weight, bits, group_size, symmetric=True),
    "ternary": lambda weight, bits, group_size: quantize_ternary(weight, group_size),
    "binary": lambda weight, bits, group_size: quantize_binary(weight, group_size),
}
WITH_BITS = ("asymmetric", "symmetric")  # the others have three and two levels


def grid_explorer(weight: Tensor, grid: str = "asymmetric") -> ipywidgets.VBox:
    """Pick a row of `weight`, (out_features, in_features), a grid, bits and group size; the picture answers at once.

    grid: of GRIDS, the one to begin with. Above the picture it says mean squared error, largest error in steps of the
    grid, and effective bits per weight.
    """
    out_features, in_features = weight.shape
    fitting = [(group_words(size), size) for size in GROUP_SIZES if not size or in_features % size == 0]
    row = ipywidgets.IntSlider(min=0, max=out_features - 1, description="Row", **WIDE)
    kind = ipywidgets.ToggleButtons(options=list(GRIDS), value=grid, description="Grid", **WIDE)
    bits = ipywidgets.IntSlider(min=BITS[0], max=BITS[-1], value=4, description="Bits", **WIDE)
    group_size = ipywidgets.SelectionSlider(options=fitting, description="Group size", **WIDE)
    answer, image = ipywidgets.HTML(), Picture()

    def redraw(change: Mapping | None = None) -> None:
        weights = weight[row.value : row.value + 1].detach().float()  # (1, in_features)
        tensor = GRIDS[kind.value](weights, bits.value, group_size.value)
        bits.disabled = kind.value not in WITH_BITS
        answer.value = grid_sentence(weights, tensor)
        width = kind.value if bits.disabled else f"{kind.value}, {bits.value} bits"
        title = f"Row {row.value}, {width}, {group_words(group_size.value)}"
        levels = grid_levels(tensor, ternary=kind.value == "ternary")
        image.draw(weight_grid(weights[0].numpy(), tensor.dequantize()[0].numpy(), levels, title))

    for control in (row, kind, bits, group_size):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([row, kind, bits, group_size, answer, image])


def grid_levels(tensor: QuantizedTensor, ternary: bool = False) -> np.ndarray:
    """What the integers of each group of the first row stand for: (groups, 2**bits), of a ternary one (groups, 3)."""
    integers = torch.arange(1 if ternary else 0, 2**tensor.bits)
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
