"""Mixed precision: each layer gets the bits that it needs, so that a budget of bytes costs the least quality.

Rounding moves the weights of a layer by D = Q(W) - W, its output at token t by D x_t, and the next-token distribution
of the model by a KL divergence that is 1/2 (g_t . D x_t)**2 to second order, and less where that is large:

    cost[layer, format] = 1/2 mean_t log(1 + (g_t . D x_t)**2)      g_t = -d log p(y) / d output_t, y drawn from p

choice = argmin sum_l cost[l, choice_l]   such that   sum_l bytes[l, choice_l] <= budget      (an integer programme)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from edgelab import assets
from edgelab.keys import key
from edgelab.model import blocks as structure
from edgelab.model.marks import fingerprint
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.quantization.rtn import check_group_size, linear_layers, quantize_affine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = (2, 3, 4, 5, 6, 8)
LARGEST_COST = 1e6  # what costs are scaled to, far above the absolute gap at which the solver stops
Format = tuple[int, int]  # bits, group_size


class AllocationError(RecipeError):
    """A budget that no choice of bits fits."""


def allocate(cost: np.ndarray, n_bytes: np.ndarray, budget: float) -> np.ndarray:
    """The format of each layer that makes the sum of costs least while the sum of bytes is at most `budget`.

    cost, n_bytes: (layers, formats); bytes are whole numbers. Returns the index of a format for each layer, (layers,).
    Exact: a multiple-choice knapsack as an integer programme with one binary variable per layer and format, solved by
    branch and bound. Raises AllocationError where even the smallest formats take more than the budget, or where a cost
    is no finite number.
    """
    layers, formats = cost.shape
    smallest = n_bytes.min(1).sum()
    if smallest > budget:
        raise AllocationError(
            f"A budget of {budget:,.0f} bytes is too small; the layers need {smallest:,.0f}."
        )
    if not np.isfinite(cost).all():
        raise AllocationError("The sensitivity of a layer is no finite number; calibrate on another text.")
    unit = np.gcd.reduce(n_bytes.astype(np.int64), axis=None)  # small numbers, for the solver's tolerances
    cost = cost - cost.min(1, keepdims=True)
    scale = LARGEST_COST / (cost.max() or 1)
    one_format_each = sparse.kron(sparse.eye_array(layers), np.ones((1, formats)))
    solution = milp(
        (cost * scale).ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_format_each, 1, np.inf),  # a second one would only cost
            LinearConstraint(n_bytes.reshape(1, -1) / unit, ub=np.floor(budget / unit)),
        ],
        options={"mip_rel_gap": 0},
    )
    if solution.x is None:
        raise AllocationError(f"No allocation was found: {solution.message}")
    return solution.x.reshape(cost.shape).argmax(1)


def stored_bytes(weights: int, bits: float, group_size: int, row: int) -> float:
    """Bytes of a matrix of `weights` in rows of `row`: integers, a float16 scale and a zero-point of `bits` per group.

    Whole where `bits` is whole. A fraction of bits stands for a mixture of whole ones.
    """
    groups = weights // (group_size or row)
    return np.ceil(weights * bits / 8) + 2 * groups + np.ceil(groups * bits / 8)


@dataclass(frozen=True)
class SensitivityTable:
    """What each format of each layer costs: nats per token and bytes.

    shapes: (out_features, in_features) of each layer. formats: (bits, group_size). cost: (layers, formats), predicted
    KL divergence per token where that layer alone is rounded. tokens: how many were looked at.
    """

    names: list[str]
    shapes: list[tuple[int, int]]
    formats: list[Format]
    cost: np.ndarray
    tokens: int

    @property
    def n_bytes(self) -> np.ndarray:
        """(layers, formats), as they are stored."""
        return np.array(
            [[stored_bytes(out * row, *how, row) for how in self.formats] for out, row in self.shapes]
        )

    def budget(self, bits: float, group_size: int) -> float:
        """Bytes of all layers in uniform quantization of so many bits, scales and zero-points included."""
        return float(sum(stored_bytes(out * row, bits, group_size, row) for out, row in self.shapes))

    def allocate(self, bits: float, group_size: int) -> np.ndarray:
        """The best format of each layer, (layers,), in the bytes of uniform quantization of so many bits."""
        return allocate(self.cost, self.n_bytes, self.budget(bits, group_size))

    def predicted(self, choice: np.ndarray) -> float:
        """Sum of the costs of a choice, (layers,): the predicted KL divergence in nats per token."""
        return float(self.cost[np.arange(len(choice)), choice].sum())

    def frame(self, choice: np.ndarray) -> pd.DataFrame:
        """A row per layer: name, block, kind, bits, group_size, bytes, cost, sensitivity.

        The cost is that of the choice, the sensitivity that of 4 bits, both in nats per token.
        """
        picked = np.arange(len(choice)), choice
        bits, group_size = np.array(self.formats)[choice].T
        return pd.DataFrame(
            {
                "name": self.names,
                "block": [
                    next(int(part) for part in name.split(".") if part.isdigit()) for name in self.names
                ],
                "kind": [name.rpartition(".")[2] for name in self.names],
                "bits": bits,
                "group_size": group_size,
                "bytes": self.n_bytes[picked],
                "cost": self.cost[picked],
                "sensitivity": self.cost[:, [width for width, _ in self.formats].index(4)],
            }
        )


# Sensitivity


@torch.no_grad()
def walk(found: list[structure.Block], hidden: Tensor) -> list[Tensor]:
    """Hidden states (samples, length, hidden) that enter each block, and those that leave the last."""
    states = [hidden]
    for block in found:
        states.append(torch.cat([block(sample[None]) for sample in states[-1]]))
    return states


@contextmanager
def _skipped(found: list[structure.Block], hidden: Tensor) -> Iterator[None]:
    """Let every block answer `hidden`, so that the model runs its norm and head over it and nothing else."""
    try:
        for block in found:
            answer = block.answer(hidden)
            block.module.forward = lambda *_, answer=answer, **__: answer
        yield
    finally:
        for block in found:
            del block.module.forward


def logits(model: PreTrainedModel, found: list[structure.Block], tokens: Tensor, hidden: Tensor) -> Tensor:
    """Float32 logits (length, vocabulary) of one sample from the states (1, length, hidden) of its last block."""
    with _skipped(found, hidden):
        return model(input_ids=tokens[None], use_cache=False).logits[0].float()


@torch.enable_grad()
def tail_gradient(
    model: PreTrainedModel, found: list[structure.Block], tokens: Tensor, hidden: Tensor, seed: int
) -> Tensor:
    """Gradient of -log p(y) in the states that leave the last block, each y drawn from the model's own distribution.

    tokens: (samples, length). hidden and the answer: (samples, length, hidden).
    """
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for ids, states in zip(tokens, hidden, strict=True):
        leaf = states[None].detach().requires_grad_()
        log_p = torch.log_softmax(logits(model, found, ids, leaf), -1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)  # (length, 1)
        gradients.append(torch.autograd.grad(-log_p.gather(1, drawn).sum(), leaf)[0])
    return torch.cat(gradients)


def block_gradients(
    block: structure.Block, hidden: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Carry the gradient (samples, length, hidden) from behind a block to before it, and keep what its layers saw.

    Returns that gradient, and for each linear layer, by name within the block, its inputs (tokens, in_features) and
    the gradient in its outputs (tokens, out_features).
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = arguments[0].detach(), output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in block.linear().items()]
    try:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            entering, *grads = torch.autograd.grad(
                block(leaf), [leaf, *outputs.values()], gradient, allow_unused=True, materialize_grads=True
            )
    finally:
        for hook in hooks:
            hook.remove()
    pairs = zip(inputs, grads, strict=True)
    return entering, {name: (inputs[name].flatten(0, -2), grad.flatten(0, -2)) for name, grad in pairs}


def fisher_cost(error: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """Half the mean over tokens of log(1 + (gradient . error input)**2): predicted KL divergence, nats per token.

    error: (out_features, in_features). inputs: (tokens, in_features). gradients: (tokens, out_features).
    Without the logarithm a few tokens, such as the first of a text with its massive activations, would decide alone
    by squares far outside the range of the second order. Errors at two tokens that add up in the prediction of a
    third are left out: values in attention (v_proj) look about half as sensitive as `kl_costs` finds them.
    """
    with structure.half_precision():
        moved = inputs @ error.T
    return torch.linalg.vecdot(moved.float(), gradients).square().log1p().mean().item() / 2


@torch.no_grad()
def fisher_costs(
    model: PreTrainedModel, tokens: Tensor, rounded: Callable[[Tensor], list[Tensor]], context: Context
) -> dict[str, list[float]]:
    """Predicted KL divergence in nats per token of every linear layer of the blocks, one for each rounding of it.

    tokens: (samples, length). rounded: weight of a layer to its dequantized roundings. One pass forward, one
    backward, block by block, and a product of the inputs with each error: for few tokens far cheaper than `kl_costs`.
    """
    found, hidden = structure.blocks(model, tokens)
    states = walk(found, hidden)
    gradient = tail_gradient(model, found, tokens, states[-1], context.seed)
    costs: dict[str, list[float]] = {}
    for done, (block, entering) in enumerate(zip(reversed(found), reversed(states[:-1]), strict=True), 1):
        gradient, seen = block_gradients(block, entering, gradient)
        for name, layer in block.linear().items():
            full, pair = f"{block.name}.{name}", seen.get(name)
            costs[full] = [
                fisher_cost(candidate - layer.weight, *pair) if pair else 0.0  # some layers never run
                for candidate in rounded(layer.weight)
            ]
        context.progress(done, len(found))
    return costs


@torch.no_grad()
def kl_costs(
    model: PreTrainedModel, tokens: Tensor, rounded: Callable[[Tensor], list[Tensor]], context: Context
) -> dict[str, list[float]]:
    """As `fisher_costs`, but measured: each layer is rounded alone and the blocks from its own on run again.

    Holds the reference's log-probabilities, samples x length x vocabulary in float32.
    """
    found, hidden = structure.blocks(model, tokens)
    states = walk(found, hidden)
    reference = [
        torch.log_softmax(logits(model, found, ids, leaving[None]), -1)
        for ids, leaving in zip(tokens, states[-1], strict=True)
    ]
    costs: dict[str, list[float]] = {}
    for first, block in enumerate(found):
        for name, layer in block.linear().items():
            weight, full = layer.weight.data, f"{block.name}.{name}"
            costs[full] = []
            for candidate in rounded(weight):
                layer.weight.data = candidate.to(weight.dtype)
                leaving = walk(found[first:], states[first])[-1]
                layer.weight.data = weight
                divergences = []
                for ids, after, log_p in zip(tokens, leaving, reference, strict=True):
                    log_q = torch.log_softmax(logits(model, found, ids, after[None]), -1)
                    divergences.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q).mean().item())
                costs[full].append(float(np.mean(divergences)))
        context.progress(first + 1, len(found))
    return costs


# The technique


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
        tokens = self.draw(context, structure.longest(model))
        file = assets.home() / "sensitivity" / f"{self._key(model, tokens, context)}.json"
        if file.is_file():
            context.record.notes.append("Sensitivities were read from an earlier run.")
            return read_table(file)
        measure = fisher_costs if self.sensitivity == "fisher" else kl_costs
        costs = measure(model, tokens, self._roundings, context)
        names = [name for name in layers if name in costs]
        shapes = [tuple(layers[name].weight.shape) for name in names]
        cost = np.array([costs[name] for name in names])
        table = SensitivityTable(names, shapes, self.formats, cost, tokens.numel())
        write_table(table, file)
        return table

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

    def _roundings(self, weight: Tensor) -> list[Tensor]:
        return [self._round(weight, how).dequantize() for how in self.formats]

    def _key(self, model: PreTrainedModel, tokens: Tensor, context: Context) -> str:
        settings = {name: value for name, value in asdict(self).items() if name != "bits"}
        made_of = context.stage or fingerprint(model)
        return key("sensitivity", self.version, settings, WIDTHS, context.seed, made_of, tokens.tolist())


def write_table(table: SensitivityTable, file: Path) -> None:
    """Keep a table as JSON; the file appears whole or not at all."""
    with assets.staged(file) as draft:
        draft.write_text(json.dumps(vars(table) | {"cost": table.cost.tolist()}))


def read_table(file: Path) -> SensitivityTable:
    """The inverse of `write_table`."""
    parts = json.loads(file.read_text())
    pairs = {key: [tuple(pair) for pair in parts[key]] for key in ("shapes", "formats")}
    return SensitivityTable(**parts | pairs | {"cost": np.array(parts["cost"])})
