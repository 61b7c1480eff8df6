"""Sparsity where it costs least: what each layer loses alone at several sparsities, and the best allocation of zeros.

A layer is one projection of one block. Its candidates are what the masks of Wanda leave, for SparseGPT as well: its
updates lower the cost of every layer, and an allocation only asks which layers cost more than others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from edgelab.keys import key
from edgelab.model.blocks import longest
from edgelab.model.marks import fingerprint
from edgelab.recipes import Context
from edgelab.techniques.allocation import CostTable
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.observing import input_sizes
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.techniques.sensitivity import MEASURES, block_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1  # of a table on disk
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class SparsityTable(CostTable):
    """What each sparsity of each layer costs; every row of a layer loses as many weights.

    sparsities: shares that go, ascending.
    """

    unit: ClassVar[str] = "weights"

    sparsities: list[float]

    @property
    def amounts(self) -> np.ndarray:
        """Weights that stay, (layers, sparsities)."""
        return np.stack([self.uniform(sparsity) for sparsity in self.sparsities], axis=1)

    def budget(self, sparsity: float) -> int:
        """Weights of all layers that stay where every row loses this share, in whole weights."""
        return int(self.uniform(sparsity).sum())

    def uniform(self, sparsity: float) -> np.ndarray:
        """Weights that stay in each layer, (layers,), where every row of each loses this share."""
        return np.array([_stay(*shape, sparsity) for shape in self.shapes])

    def allocate(self, sparsity: float) -> np.ndarray:
        """Weights that stay in each layer, (layers,): as many in all as a uniform sparsity leaves.

        All rows of a layer lose as many, so the last few weights have no layer to go to: fewer than the narrowest
        layer has rows.
        """
        rows = np.array([out_features for out_features, _ in self.shapes])
        return self.spend(self.budget(sparsity), rows)

    def frame(self, stay: np.ndarray) -> pd.DataFrame:
        """A row per layer: name, block, kind, sparsity, weights that stay, cost, sensitivity.

        stay: (layers,). The cost is that of the sparsity, the sensitivity that of 50 %, both in nats per token.
        """
        return self.places().assign(
            sparsity=1 - stay / np.prod(self.shapes, axis=1),
            weights=stay,
            cost=self.costs_at(stay),
            sensitivity=self.costs_at(self.uniform(0.5)),
        )


def _stay(out_features: int, in_features: int, sparsity: float) -> int:
    return out_features * (in_features - round(sparsity * in_features))


def sparsity_table(
    model: PreTrainedModel,
    tokens: Tensor,
    measure: str,
    context: Context,
    sparsities: Sequence[float] = SPARSITIES,
) -> SparsityTable:
    """What every linear layer of the blocks loses at each sparsity; read from disk where it was computed before.

    tokens: (samples, length). measure: of `MEASURES`. Layers that never run are left out.
    """
    layers = block_layers(model)
    sizes: dict[str, Tensor] = {}

    def pruned(name: str, weight: Tensor) -> Iterator[Tensor]:
        if name not in sizes:
            return
        scores = weight.detach().float().abs() * sizes[name]
        # As `keep_mask` ranks within a row, but sorted once for all sparsities
        ranks = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
        for sparsity in sparsities:
            yield weight.detach() * (ranks >= round(sparsity * weight.shape[1]))

    def costs() -> dict[str, list[float]]:
        sizes.update(input_sizes(model, list(layers), tokens, context.progress))
        return MEASURES[measure](model, tokens, pruned, context)

    made_of = context.stage or fingerprint(model)
    address = key("prune", VERSION, measure, list(sparsities), context.seed, made_of, tokens.tolist())
    return SparsityTable.kept(address, layers, tokens.numel(), costs, context, sparsities=list(sparsities))


def sensitivity(
    model: PreTrainedModel,
    context: Context,
    sparsities: Sequence[float] = (0.3, 0.5, 0.7),
    samples: int = 1,
    length: int = 512,
    corpus: str = "web",
) -> pd.DataFrame:
    """How much every linear layer of the blocks minds a sparsity: measured, and as cheaper measures predict it.

    A row per layer and sparsity: name, block, kind, sparsity, kl (nats per token, measured where that layer alone is
    pruned), and fisher, gradient, activation, magnitude, as `edgelab.techniques.sensitivity` defines them. Each is kept
    on disk. Measuring runs the model for every row and sample, from the block of the layer on: some minutes for each
    sparsity of the embedded model, where all others together take seconds.
    """
    linear_layers(model)  # refuses what is quantized already
    tokens = Calibrated(samples=samples, length=length, corpus=corpus).draw(context, longest(model))
    tables = {measure: sparsity_table(model, tokens, measure, context, sparsities) for measure in MEASURES}
    places = next(iter(tables.values())).places()
    frame = places.loc[places.index.repeat(len(sparsities))].reset_index(drop=True)
    return frame.assign(
        sparsity=list(sparsities) * len(places),
        **{measure: table.cost.flatten() for measure, table in tables.items()},
    )
