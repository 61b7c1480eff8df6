"""Int8 activations: rounding what enters a layer as well as its weights, so that the product is one of integers.

y = x W^T  ~  scale_x scale_W (q_x - zero_point) q_W^T      q_W: int8, one symmetric scale per row
                                                            q_x: uint8, scale_x = (high - low) / 255

dynamic: low and high are those of each token, found when it runs
static:  low and high of the whole tensor, found on calibration text: `minmax` takes all of it, `percentile` cuts its
         tails, `mse` cuts where the squared error, of rounding within the range and of clipping outside it, is least.

Why not symmetric, as the weights are: an outlier has one sign, and the grid would spend a bit on the other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from edgelab.model import blocks as structure
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import ActivationGrid, PackedLinear
from edgelab.techniques.calibration import Calibrated, CalibrationError
from edgelab.techniques.quantization.ranges import Range
from edgelab.techniques.quantization.rtn import linear_layers, quantize_affine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHRINKS = 2.0 ** -(
    torch.arange(0, 97) / 8
)  # ends of the range that `mse` tries, down to 1/4096 of the largest value


class Histogram:
    """How often each value occurred in a tensor seen in pieces, to the precision of bfloat16 (1/256 of the value).

    The first 16 bits of a float32 number its bin, so that the histogram is fine near zero, has no range that could be
    too short, and takes 0.5 MB however much it sees. `low` and `high` are exact.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2**16, dtype=torch.int64)
        self.low, self.high = torch.tensor(0.0), torch.tensor(0.0)

    def add(self, values: Tensor) -> None:
        """Count values, of any shape, finite."""
        bins = values.to(torch.bfloat16).flatten().view(torch.int16).int() + 2**15
        self.counts += torch.bincount(bins, minlength=2**16)
        low, high = values.aminmax()
        self.low, self.high = torch.minimum(self.low, low.float()), torch.maximum(self.high, high.float())

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Values that occurred, ascending, and how often: (bins,) float32 and (bins,) int64."""
        places = self.counts.nonzero().flatten()
        values = (places - 2**15).to(torch.int16).view(torch.bfloat16).float()
        order = values.argsort()
        return values[order].clamp(self.low, self.high), self.counts[places[order]]

    def percentile(self, percentile: float) -> tuple[Tensor, Tensor]:
        """Low and high between which `percentile` per cent of the values lie, the tails cut equally."""
        values, counts = self.occupied()
        below = counts.cumsum(0) / counts.sum()
        tail = (1 - percentile / 100) / 2
        ends = torch.searchsorted(below, torch.tensor([tail, 1 - tail], dtype=below.dtype))
        low, high = values[ends.clamp(max=len(values) - 1)]
        return low, high

    def ends(self, kind: Range, percentile: float) -> tuple[float, float]:
        """The range by one of the three rules."""
        if kind == "percentile":
            return self.percentile(percentile)
        return self.mse() if kind == "mse" else (self.low, self.high)

    def mse(self) -> tuple[Tensor, Tensor]:
        """Low and high with the least squared error of a uint8 grid, each end shrunk in turn until neither moves."""
        values, counts = self.occupied()
        low, high = self.low, self.high
        for _ in range(8):
            before = low, high
            low = _least(values, counts, self.low * SHRINKS, high.expand(len(SHRINKS)))
            high = _least(values, counts, low.expand(len(SHRINKS)), self.high * SHRINKS, second=True)
            if (low, high) == before:
                break
        return low, high


def expected_error(values: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Squared error of values on the uint8 grid from low to high: (candidates,) float64 for as many lows and highs.

    values, counts: (bins,). Within the range a value is off by scale**2 / 12 on average, or by its own square where
    it is so small that it becomes zero; outside, by its distance to the range as well.
    """
    scale = ((high - low) / 255)[:, None]
    rounding = torch.where(values.abs() < scale / 2, values**2, scale**2 / 12)
    clipping = (values - values.clamp(low[:, None], high[:, None])) ** 2
    return ((rounding + clipping).double() * counts).sum(-1)


def _least(values: Tensor, counts: Tensor, low: Tensor, high: Tensor, second: bool = False) -> Tensor:
    best = expected_error(values, counts, low, high).argmin()
    return (high if second else low)[best]


def observe(
    model: PreTrainedModel,
    windows: Tensor,
    watch: Callable[[str, Tensor], None],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, str]:
    """Run a float model over windows (samples, length) and show `watch` every tensor that its linear layers read.

    watch(name, inputs): called once for all layers that read one tensor, with the name of the first of them.
    Returns that name for every linear layer that runs, but for the head. Raises CalibrationError where inputs are not
    finite.
    """
    first: dict[str, str] = {}
    reader = WeakIdKeyDictionary()  # the tensors of this window that are still alive

    def enter(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not inputs[0].numel():  # an expert that no token of this window goes to
                return
            first[name] = reader.setdefault(inputs[0], name)
            if first[name] == name:
                if not inputs[0].isfinite().all():
                    raise CalibrationError(
                        f"The inputs of {name} are not finite on this text; use a model whose outputs are numbers."
                    )
                watch(name, inputs[0])

        return hook

    hooks = [layer.register_forward_pre_hook(enter(name)) for name, layer in linear_layers(model).items()]
    try:
        with torch.inference_mode():
            for done, window in enumerate(windows, 1):
                model.base_model(input_ids=window[None], use_cache=False)
                progress(done, len(windows))
    finally:
        for hook in hooks:
            hook.remove()
    return first


def channel_peaks(model: PreTrainedModel, windows: Tensor, **progress: Callable) -> dict[str, Tensor]:
    """Largest magnitude of every input channel over windows (samples, length), by linear layer: (in_features,) each."""
    peaks: dict[str, Tensor] = {}

    def watch(name: str, inputs: Tensor) -> None:
        peak = inputs.flatten(0, -2).abs().amax(0).float()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    first = observe(model, windows, watch, **progress)
    return {name: peaks[first[name]].clone() for name in first}


def calibrated_grids(
    model: PreTrainedModel, windows: Tensor, kind: Range, percentile: float, **progress: Callable
) -> dict[str, ActivationGrid]:
    """The static grid of every linear layer's input, calibrated on windows (samples, length), by layer."""
    seen: dict[str, Histogram] = {}

    def watch(name: str, inputs: Tensor) -> None:
        seen.setdefault(name, Histogram()).add(inputs)

    first = observe(model, windows, watch, **progress)
    ends = {name: histogram.ends(kind, percentile) for name, histogram in seen.items()}
    return {name: ActivationGrid.spanning(*ends[first[name]]) for name in first}


def with_unseen(
    grids: dict[str, ActivationGrid], layers: Iterable[str], context: Context
) -> dict[str, ActivationGrid]:
    """The grids of all layers: those that no calibration text runs get a grid for each token, which is noted."""
    unseen = [name for name in layers if name not in grids]
    if unseen:
        context.record.notes.append(
            f"Layers that calibration does not reach get their ranges at run time: {', '.join(unseen)}."
        )
    return grids | {name: ActivationGrid() for name in unseen}


def to_int8(model: PreTrainedModel, grids: dict[str, ActivationGrid]) -> None:
    """Replace linear layers, in place, by int8 weights per row behind the given activation grids."""
    for name, grid in grids.items():
        layer = model.get_submodule(name)
        tensor = quantize_affine(layer.weight.detach(), 8, 0, symmetric=True)
        model.set_submodule(name, PackedLinear(tensor, layer.bias, grid))


@register("quantize.dynamic", version=2)
@dataclass(frozen=True)
class DynamicInt8:
    """Int8 weights per row and uint8 activations with a scale and a zero-point per token at run time. No data.

    Every linear layer but the head. Dettmers et al. 2022, arXiv:2208.07339, section 2.1, vector-wise, with the
    asymmetric activations of Jacob et al. 2018, arXiv:1712.05877.
    """

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with int8 layers."""
        model = copy.deepcopy(model)
        to_int8(model, {name: ActivationGrid() for name in linear_layers(model, context.record)})
        return model


@dataclass(frozen=True, kw_only=True)
class Ranged(Calibrated):
    """Settings of techniques with static activation ranges.

    range: minmax, percentile or mse. percentile: per cent of the values that a range by percentile keeps.
    """

    range: Range = "minmax"
    percentile: float = 99.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise RecipeError(f"percentile={self.percentile} is outside 50 to 100 per cent, such as 99.99.")
        if self.percentile != Ranged.percentile and self.range != "percentile":
            raise RecipeError(
                f"percentile={self.percentile} has no effect with range={self.range}; write range=percentile beside it."
            )


@register("quantize.static", shown=("range",))
@dataclass(frozen=True, kw_only=True)
class StaticInt8(Ranged):
    """Int8 weights per row and uint8 activations with one calibrated range per tensor, but for the head.

    Layers that read the same tensor share its range. Jacob et al. 2018, arXiv:1712.05877; Wu et al. 2020,
    arXiv:2004.09602, section 5, for the ways to choose a range.
    """

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with int8 layers."""
        layers = linear_layers(model, context.record)
        windows = self.draw(context, structure.longest(model))
        grids = calibrated_grids(model, windows, self.range, self.percentile, progress=context.progress)
        model = copy.deepcopy(model)
        to_int8(model, with_unseen(grids, layers, context))
        return model
