"""Mixed precision: each layer gets the bits that it needs, so that a budget of bytes costs the least quality.

Rounding moves the weights of a layer by D = Q(W) - W, its output at token t by D x_t, and the next-token distribution
of the model by a KL divergence that is 1/2 (g_t . D x_t)**2 to second order, and less where that is large:

    cost[layer, format] = 1/2 mean_t log(1 + (g_t . D x_t)**2)      g_t = -d log p(y) / d output_t, y drawn from p

choice = argmin sum_l cost[l, choice_l]   such that   sum_l bytes[l, choice_l] <= budget      (an integer programme)
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from edgelab.keys import key
from edgelab.model.blocks import longest
from edgelab.model.marks import fingerprint
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.allocation import CostTable
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.quantization.rtn import check_group_size, linear_layers, quantize_affine
from edgelab.techniques.sensitivity import MEASURES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = (2, 3, 4, 5, 6, 8)
Format = tuple[int, int]  # bits, group_size


def stored_bytes(weights: int, bits: float, group_size: int, row: int) -> float:
    """Bytes of a matrix of `weights` in rows of `row`: integers, a float16 scale and a zero-point of `bits` per group.

    Whole where `bits` is whole. A fraction of bits stands for a mixture of whole ones.
    """
    groups = weights // (group_size or row)
    return np.ceil(weights * bits / 8) + 2 * groups + np.ceil(groups * bits / 8)


@dataclass(frozen=True)
class SensitivityTable(CostTable):
    """What each format of each layer costs: nats per token and bytes.

    formats: (bits, group_size). cost: (layers, formats), predicted KL divergence per token where that layer alone is
    rounded.
    """

    unit: ClassVar[str] = "bytes"

    formats: list[Format]

    @property
    def amounts(self) -> np.ndarray:
        """What a budget counts, (layers, formats)."""
        return self.n_bytes

    @property
    def n_bytes(self) -> np.ndarray:
        """Bytes as they are stored, (layers, formats)."""
        return np.array(
            [[stored_bytes(out * row, *how, row) for how in self.formats] for out, row in self.shapes]
        )

    def budget(self, bits: float, group_size: int) -> float:
        """Bytes of all layers in uniform quantization of so many bits, scales and zero-points included."""
        return float(sum(stored_bytes(out * row, bits, group_size, row) for out, row in self.shapes))

    def allocate(self, bits: float, group_size: int) -> np.ndarray:
        """The best format of each layer, (layers,), in the bytes of uniform quantization of so many bits."""
        return self.choose(self.budget(bits, group_size))

    def frame(self, choice: np.ndarray) -> pd.DataFrame:
        """A row per layer: name, block, kind, bits, group_size, bytes, cost, sensitivity.

        The cost is that of the choice, the sensitivity that of 4 bits, both in nats per token.
        """
        picked = np.arange(len(choice)), choice
        bits, group_size = np.array(self.formats)[choice].T
        return self.places().assign(
            bits=bits,
            group_size=group_size,
            bytes=self.n_bytes[picked],
            cost=self.cost[picked],
            sensitivity=self.cost[:, [width for width, _ in self.formats].index(4)],
        )


@register("quantize.mixed", shown=("bits", "group_size"))
@dataclass(frozen=True)
class Mixed(Calibrated):
    """Round each layer to as many bits as it needs, within the bytes of uniform quantization to `bits` bits.

    bits: 2 to 8, fractions too; the budget is the bytes of that width in groups of group_size with their scales and
    zero-points. group_size: inputs that share a scale in layers of 2 to 4 bits. wide: layers of 5, 6 and 8 bits have
    one scale per row ("rows"), for which there is an int8 kernel, or groups as well ("groups"), which are unpacked
    whenever they are used. sensitivity: "fisher" predicts how much a layer minds from gradients; "kl" rounds each
    layer alone and measures, some twenty times slower. A few samples will do, since every token counts. range: how the
    ends of a grid are chosen; mse takes longer, and here helps at 2 bits only.

    The table of sensitivities is kept on disk, so that a second budget takes seconds. Dong et al. 2019,
    arXiv:1905.03696, and Yao et al. 2021, arXiv:2011.10680, choose bits from curvature and by an integer programme.
    """

    bits: float = 4
    group_size: int = 64
    wide: Literal["rows", "groups"] = "rows"
    sensitivity: Literal["fisher", "kl"] = "fisher"
    range: Literal["minmax", "mse"] = "minmax"
    samples: int = 4
    length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if not WIDTHS[0] <= self.bits <= WIDTHS[-1]:
            raise RecipeError(f"quantize.mixed:bits={self.bits:g} is outside {WIDTHS[0]} to {WIDTHS[-1]}.")
        if self.group_size < 0:
            raise RecipeError(f"quantize.mixed:group_size={self.group_size} is negative; 0 means whole rows.")
        if self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))  # 4 and 4.0 are one recipe

    @property
    def formats(self) -> list[Format]:
        """What a layer may be stored as: (bits, group_size)."""
        wide_group = 0 if self.wide == "rows" else self.group_size
        return [(bits, self.group_size if bits <= 4 else wide_group) for bits in WIDTHS]

    def _round(self, weight: Tensor, how: Format) -> QuantizedTensor:
        return quantize_affine(weight.detach(), *how, range=self.range)

    def table(self, model: PreTrainedModel, context: Context) -> SensitivityTable:
        """How much every linear layer of the blocks minds each format; read from disk where it was computed before."""
        layers = linear_layers(model)
        check_group_size(self.group_size, [layer.in_features for layer in layers.values()])
        tokens = self.draw(context, longest(model))
        return SensitivityTable.kept(
            self._key(model, tokens, context),
            layers,
            tokens.numel(),
            lambda: MEASURES[self.sensitivity](model, tokens, self._roundings, context),
            context,
            formats=self.formats,
        )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with a PackedLinear of its own width in place of every linear layer of the blocks."""
        table = self.table(model, context)
        choice = table.allocate(self.bits, self.group_size)
        outside = [name for name in linear_layers(model, context.record) if name not in table.names]
        if outside:
            context.record.notes.append(f"Outside of the blocks, and in float: {', '.join(outside)}.")
        model = copy.deepcopy(model)
        for name, index in zip(table.names, choice, strict=True):
            layer = model.get_submodule(name)
            tensor = self._round(layer.weight, table.formats[index])
            model.set_submodule(name, PackedLinear(tensor, layer.bias))
        chosen = [table.formats[index][0] for index in choice]
        context.record.numbers["predicted_kld"] = table.predicted(choice)
        context.record.notes.append(f"Layers of {min(chosen)} to {max(chosen)} bits.")
        return model

    def _roundings(self, name: str, weight: Tensor) -> list[Tensor]:
        return [self._round(weight, how).dequantize() for how in self.formats]

    def _key(self, model: PreTrainedModel, tokens: Tensor, context: Context) -> str:
        settings = {name: value for name, value in asdict(self).items() if name != "bits"}
        made_of = context.stage or fingerprint(model)
        return key("sensitivity", self.version, settings, WIDTHS, context.seed, made_of, tokens.tolist())
