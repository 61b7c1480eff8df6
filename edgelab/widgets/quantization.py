"""Quantization to turn: a weight row on its grid, and the trade-off plot with a point measured live."""

import html
import math
from collections.abc import Mapping

import ipywidgets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from edgelab import assets, corpora, ledger
from edgelab.errors import EdgeLabError
from edgelab.lab import Settings, measure
from edgelab.measure.divergence import paired_delta
from edgelab.plots import NothingToDraw, label, tradeoff, weight_grid
from edgelab.recipes import parse
from edgelab.reference import EMBEDDED, resolve
from edgelab.techniques.quantization.packed import QuantizedTensor
from edgelab.techniques.quantization.rtn import quantize_affine
from edgelab.widgets import figure_png

BITS = tuple(range(2, 9))
GROUP_SIZES = (32, 64, 96, 192, 0)
BROKEN_PPL = 1000  # a row above is drawn only where it is the chosen one: it presses all others into a line
WIDE = {"style": {"description_width": "90px"}, "layout": {"width": "auto", "max_width": "480px"}}


def grid_explorer(weight: Tensor) -> ipywidgets.VBox:
    """Pick a row of `weight`, (out_features, in_features), bits, group size and symmetry; its grid answers at once.

    Beside the picture it says mean squared error, largest error in steps of the grid, and effective bits per weight.
    """
    out_features, in_features = weight.shape
    fitting = [(_group_words(size), size) for size in GROUP_SIZES if not size or in_features % size == 0]
    row = ipywidgets.IntSlider(min=0, max=out_features - 1, description="Row", **WIDE)
    bits = ipywidgets.IntSlider(min=BITS[0], max=BITS[-1], value=4, description="Bits", **WIDE)
    group_size = ipywidgets.SelectionSlider(options=fitting, description="Group size", **WIDE)
    symmetric = ipywidgets.Checkbox(
        description="symmetric: zero in the middle of the grid", indent=True, **WIDE
    )
    answer = ipywidgets.HTML()
    picture = _picture()

    def redraw(change: Mapping | None = None) -> None:
        weights = weight[row.value : row.value + 1].detach().float()  # (1, in_features)
        tensor = quantize_affine(weights, bits.value, group_size.value, symmetric.value)
        answer.value = grid_sentence(weights, tensor)
        title = f"Row {row.value}, {bits.value} bits, {_group_words(group_size.value)}"
        figure = weight_grid(weights[0].numpy(), tensor.dequantize()[0].numpy(), grid_levels(tensor), title)
        picture.value = figure_png(figure)

    for control in (row, bits, group_size, symmetric):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([row, bits, group_size, symmetric, answer, picture])


def grid_levels(tensor: QuantizedTensor) -> np.ndarray:
    """What the integers of each group of the first row stand for: (groups, 2**bits)."""
    integers = torch.arange(2**tensor.bits)
    return ((integers - tensor.centre()[0, :, None]) * tensor.scale[0, :, None].float()).numpy()


def grid_sentence(weights: Tensor, tensor: QuantizedTensor) -> str:
    """HTML: how far rounding moved the weights, and what they take. The error also stands in `data-mse`."""
    error = tensor.dequantize() - weights
    mse = error.square().mean().item()
    steps = (error.unflatten(-1, (tensor.scale.shape[1], -1)).abs() / tensor.scale[..., None]).max().item()
    noise_db = 10 * math.log10(weights.square().mean().item() / mse) if mse else math.inf
    symmetric = tensor.zero_point is None
    stored = effective_bits(tensor.bits, tensor.group_size, symmetric)
    share = "scales" if symmetric else "scales and zero-points"
    return (
        f'<span class="edgelab-grid" data-mse="{mse:.6e}">Mean squared error <b>{mse:.3e}</b>, '
        f"{noise_db:.1f} dB below the weights. Largest error <b>{steps:.2f} steps</b> of its grid. "
        f"<b>{stored:.3f} bits per weight</b>: {tensor.bits} and a share of the {share}.</span>"
    )


def effective_bits(bits: int, group_size: int, symmetric: bool) -> float:
    """Stored bits per weight, with a 16-bit scale and, unless symmetric, a zero-point of `bits` bits per group."""
    return bits + (16 + (0 if symmetric else bits)) / group_size


def tradeoff_explorer(rows: pd.DataFrame | None = None, windows: int = 4) -> ipywidgets.VBox:
    """Choose a round-to-nearest recipe, measure its quality live, and see it among the rows of the ledger.

    rows: as `ledger.frame()`, which is the default: the project's rows and the reader's own. Perplexity compares on
    the same text only, so all rows are cut to their first `windows` windows of `wiki`; shorter rows are left out.
    """
    bits = ipywidgets.Dropdown(options=BITS, value=4, description="Bits", **WIDE)
    sizes = [(_group_words(size), size) for size in GROUP_SIZES]
    group_size = ipywidgets.Dropdown(options=sizes, value=64, description="Group size", **WIDE)
    symmetric = ipywidgets.Dropdown(options=[("no", False), ("yes", True)], description="Symmetric", **WIDE)
    widths = [("32 bits, as it is", 0), *((f"{width} bits", width) for width in BITS)]
    embedding = ipywidgets.Dropdown(options=widths, description="Embedding", **WIDE)
    button = ipywidgets.Button(description="Measure live", button_style="primary")
    answer, picture = ipywidgets.HTML(), _picture()
    measured = []  # rows of this widget

    def chosen() -> str:
        return rtn_recipe(bits.value, group_size.value, symmetric.value, embedding.value)

    def redraw(change: Mapping | None = None) -> None:
        known = [ledger.frame() if rows is None else rows, ledger.frame(measured)]
        frame = same_windows(pd.concat([part for part in known if len(part)] or known[:1]), windows)
        found = frame[frame["recipe"] == chosen()]
        answer.value = (
            point_sentence(found.iloc[-1]) if len(found) else f"{chosen()} has not been measured yet."
        )
        try:
            shown = frame[(frame["ppl"] < BROKEN_PPL) | (frame["recipe"] == chosen())]
            picture.value = figure_png(tradeoff(shown, highlight=chosen() if len(found) else None))
        except NothingToDraw:
            answer.value += " Nor has anything else; the button measures it and the baseline."

    def measure_live(_: ipywidgets.Button) -> None:
        recipe = chosen()
        button.disabled = True
        try:
            for step in ("none", recipe):
                answer.value = (
                    f"Measuring <b>{step}</b> on {windows} windows of text; it takes some seconds …"
                )
                measured.append(measure(step, only="quality", windows=windows))
            redraw()
        except EdgeLabError as error:
            answer.value = html.escape(str(error))
        finally:
            button.disabled = False

    for control in (bits, group_size, symmetric, embedding):
        control.observe(redraw, "value")
    button.on_click(measure_live)
    redraw()
    return ipywidgets.VBox([bits, group_size, symmetric, embedding, button, answer, picture])


def rtn_recipe(bits: int, group_size: int, symmetric: bool, embedding_bits: int) -> str:
    """The canonical text of a round-to-nearest recipe."""
    settings = f"bits={bits},group_size={group_size},symmetric={symmetric},embedding_bits={embedding_bits}"
    return str(parse(f"quantize.rtn:{settings}"))


def same_windows(rows: pd.DataFrame, windows: int) -> pd.DataFrame:
    """Rows of the embedded model on `wiki`, with their quality over the first `windows` windows only.

    A row of 32 windows holds the NLL of each, so that it also answers for 4. Their difference to the baseline and its
    interval are computed anew where the rows hold the baseline.
    """
    asked = {
        "model": resolve(EMBEDDED).name,
        "protocol": Settings.protocol,
        "corpus": corpora.identity("wiki"),
    }
    rows = rows[rows["fast"].eq(False) | assets.fast()]  # rows of fast mode stay out of full mode
    long_enough = rows["window_nll"].map(lambda nll: isinstance(nll, list) and len(nll) >= windows)
    rows = rows[long_enough & (rows["status"] == "ok") & (rows[list(asked)] == asked).all(axis=1)].copy()
    tokens = rows["n_tokens"] / rows["window_nll"].map(len)  # every window scores as many
    rows["window_nll"] = rows["window_nll"].map(lambda nll: nll[:windows])
    mean = rows["window_nll"].map(np.mean).astype(float)
    rows = rows.assign(n_tokens=tokens * windows, nll_sum=mean * tokens * windows, ppl=np.exp(mean))
    rows[["delta_nll", "delta_nll_low", "delta_nll_high"]] = math.nan
    baseline = rows.loc[rows["recipe"] == "none", "window_nll"].tail(1)
    for index, row in rows[rows["recipe"] != "none"].iterrows() if len(baseline) else ():
        delta = paired_delta(row["window_nll"], baseline.iloc[0], [1] * windows)  # means over equal windows
        rows.loc[index, ["delta_nll", "delta_nll_low", "delta_nll_high"]] = delta.mean, delta.low, delta.high
    return rows.drop(columns=["bits_per_byte", "kld_mean", "top1_agreement"])


def point_sentence(row: pd.Series) -> str:
    """HTML: perplexity, size and badge of a measured row. The perplexity also stands in `data-ppl`."""
    return (
        f'<span class="edgelab-point" data-ppl="{row["ppl"]:.6f}"><b>{label(row["recipe"])}</b>: perplexity '
        f"<b>{row['ppl']:,.2f}</b> on {len(row['window_nll'])} windows, {row['weights_mb']:,.1f} MB, "
        f"{row['bits_per_weight']:.2f} bits per weight ({row['badge']}).</span>"
    )


def _group_words(size: int) -> str:
    return f"groups of {size}" if size else "one group per row"


def _picture() -> ipywidgets.Image:
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", width="850px"))
