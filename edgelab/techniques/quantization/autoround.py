"""AutoRound: learn for each weight whether to round up or down, and for each group how much of its range to keep.

q = clamp(round(w / s + v) + z, 0, 2**bits - 1)           v in [-0.5, 0.5]
s = (high * a - low * b) / (2**bits - 1),  z = round(-low * b / s)       a, b in [0, 1]
v, a, b  <-  v, a, b - rate * sign(gradient)              of the squared error of the block's output

The gradient passes rounding as if it were not there. The rate falls to zero, and v travels 0.5 in all at most. Signed
steps do not settle where an error is least, they cross it again and again: the best step is kept, not the last.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call

from edgelab import assets
from edgelab.model.blocks import Block, blocks, half_precision, longest
from edgelab.model.marks import refuse_zeros
from edgelab.recipes import Context, RecipeError, register
from edgelab.storage.layers import PackedLinear
from edgelab.storage.scales import as_stored
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.calibration import Calibrated, CalibrationError
from edgelab.techniques.quantization.rtn import (
    check_group_size,
    check_settings,
    in_groups,
    linear_layers,
    round_rest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8  # samples that a block is run on at one time where nothing is learned


@dataclass
class LearnedRounding:
    """What is learned about one matrix. weight: (out_features, groups, group_size), float32.

    offset: v, of weight's shape. shares: b and a, (2, out_features, groups).
    """

    weight: Tensor
    bits: int
    offset: Tensor = field(init=False)
    shares: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.ends = torch.stack([self.weight.amin(-1).clamp(max=0), self.weight.amax(-1).clamp(min=0)])
        self.offset = torch.zeros_like(self.weight)
        self.shares = torch.ones_like(self.ends)

    def grid(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, as it is stored, and whole zero_point; both pass gradients to `shares`."""
        low, high = self.ends * shares
        scale = (high - low) / (2**self.bits - 1)
        scale = scale + (as_stored(scale) - scale).detach()
        zero_point = -low / scale
        return scale, zero_point + (zero_point.round().clamp(0, 2**self.bits - 1) - zero_point).detach()

    @torch.no_grad()
    def rounded(self) -> QuantizedTensor:
        """The matrix as it would be stored now."""
        scale, zero_point = self.grid(self.shares)
        integers = torch.div(self.weight, scale[..., None]).add_(self.offset).round_()
        integers = integers.add_(zero_point[..., None]).clamp_(0, 2**self.bits - 1).to(torch.uint8)
        return QuantizedTensor(integers.flatten(1), scale, zero_point.to(torch.uint8), self.bits)

    def step(self, gradient: Tensor, rounded: QuantizedTensor, rate: float) -> None:
        """One step of signed gradient descent. gradient: of the loss by the rounded matrix, (out, in_features)."""
        gradient = gradient.float().view_as(self.weight)
        shares = self.shares.requires_grad_()
        with torch.enable_grad():
            scale, zero_point = self.grid(shares)
        step, centre = scale.detach()[..., None], zero_point.detach()[..., None]
        integers = rounded.integers.view_as(self.weight).float() - centre
        place = self.weight / step
        inside = integers == (place + self.offset).round_()
        by_scale = (gradient * (integers - place * inside)).sum(-1)
        by_zero_point = -(gradient * ~inside).sum(-1) * step[..., 0]
        (by_shares,) = torch.autograd.grad((scale, zero_point), shares, (by_scale, by_zero_point))
        self.shares = shares.detach().sub_(by_shares.sign(), alpha=rate).clamp_(0, 1)
        self.offset.sub_(gradient.sign_().mul_(inside), alpha=rate).clamp_(-0.5, 0.5)


@register("quantize.autoround", shown=("bits", "group_size"))
@dataclass(frozen=True, kw_only=True)
class AutoRound(Calibrated):
    """Learn the rounding of every linear layer but the head, block after block, with signed gradients.

    A block learns to give, from what the rounded blocks before it hand on, what the float block would have given.
    bits: 2 to 8. group_size: inputs that share a scale, 0 for a whole row. iterations: steps for each block. batch:
    samples a step. Cheng et al. 2023, arXiv:2309.05516.
    """

    bits: int = 4
    group_size: int = 64
    iterations: int = 50
    batch: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.method, self.group_size, self.bits)
        if self.iterations < 1 or self.batch < 1:
            raise RecipeError(
                f"quantize.autoround needs at least 1 iteration of 1 sample, not iterations={self.iterations},"
                f"batch={self.batch}."
            )

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with PackedLinear in place of the rounded layers."""
        refuse_zeros(model, self.method)
        layers = linear_layers(model, context.record)
        check_group_size(self.group_size, [layer.in_features for layer in layers.values()])
        tokens = self.draw(context, longest(model))
        model = copy.deepcopy(model)
        found, exact = blocks(model, tokens)
        handed_on = exact
        generator = torch.Generator().manual_seed(context.seed)
        lost = 0
        with half_precision():
            for done, block in enumerate(found, 1):
                with torch.no_grad():
                    exact = _run(block, exact)
                finite = torch.stack([handed_on, exact]).isfinite().flatten(2).all(-1).all(0)  # (samples,)
                if (now := int((~finite).sum())) > lost:
                    lost = now
                    context.record.notes.append(f"From {block.name} on {lost} samples left out, not finite.")
                learned = self._round_block(block, handed_on[finite], exact[finite], generator)
                if not learned:
                    context.record.notes.append(
                        f"{block.name}: no finite loss, so that its layers are rounded to nearest."
                    )
                with torch.no_grad():
                    handed_on = _run(block, handed_on)
                context.progress(done, len(found))
        round_rest(model, context, self.bits, self.group_size, False)
        return model

    def _round_block(self, block: Block, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> bool:
        """Learn the rounding of one block and round it in place. inputs, targets: (samples, length, hidden), finite.

        Returns False where no loss was finite, so that there was nothing to learn from.
        """
        if not len(inputs):
            raise CalibrationError(
                "No calibration sample gives finite activations; use a model whose outputs are numbers."
            )
        layers = block.linear()
        learned = {
            name: LearnedRounding(
                in_groups(layer.weight.detach(), self.group_size),
                self.bits,
            )
            for name, layer in layers.items()
        }
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        steps = 2 if assets.fast() else self.iterations
        least, best = torch.inf, {}
        for done in range(steps):
            chosen = torch.randperm(len(inputs), generator=generator)[: self.batch]
            rounded = {name: one.rounded() for name, one in learned.items()}
            weights = {
                f"{name}.weight": tensor.dequantize(dtype).requires_grad_()
                for name, tensor in rounded.items()
            }
            best = best or rounded
            arguments = block.arguments_for(len(chosen))
            answer = block.states(functional_call(block.module, weights, (inputs[chosen],), arguments))
            loss = (answer.float() - targets[chosen]).square().mean()
            if not loss.isfinite():
                continue
            # An expert that no token of the batch goes to has no part in the loss.
            gradients = torch.autograd.grad(
                loss, list(weights.values()), allow_unused=True, materialize_grads=True
            )
            share = float(
                loss.detach() / targets[chosen].square().mean()
            )  # of the batch: samples differ in size
            if share < least:
                least, best = share, rounded
            rate = (1 - done / steps) / steps
            for (name, one), gradient in zip(learned.items(), gradients, strict=True):
                one.step(gradient, rounded[name], rate)
        for name, tensor in best.items():
            block.module.set_submodule(name, PackedLinear(tensor, layers[name].bias))
        return least < torch.inf


def _run(block: Block, hidden: Tensor) -> Tensor:
    return torch.cat([block(part) for part in hidden.split(BATCH)])
