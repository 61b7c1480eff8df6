"""What a causal language model consists of: its blocks, the linear layers in them, and which of them share an input.

Found by running the model once, not from names, so that any model built from linear layers will do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgelab.recipes import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Group:
    """Linear layers of one block that read the same tensor, by name within the block, in order of execution.

    source: the module of the block whose output that tensor is (a norm, as a rule), or None.
    """

    layers: tuple[str, ...]
    source: str | None


@dataclass
class Block:
    """One transformer block with what it is called beside the hidden states (mask, rotary embedding)."""

    name: str
    module: nn.Module
    arguments: dict[str, object]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, time, hidden) after the block."""
        answer = self.module(hidden, **self.arguments)
        return answer[0] if isinstance(answer, tuple) else answer

    def linear(self) -> dict[str, nn.Linear]:
        """The float linear layers of the block by name within it."""
        return {name: layer for name, layer in self.module.named_modules() if isinstance(layer, nn.Linear)}

    @torch.no_grad()
    def groups(self, hidden: Tensor) -> list[Group]:
        """Run the block and see which layers read the same tensor. hidden: (batch, time, hidden), little will do."""
        members: dict[int, list[str]] = {}
        producers: dict[int, str] = {}
        kept: list[Tensor] = []  # tensors must live on, or another takes their identity

        def enter(name: str) -> Callable:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
                if isinstance(module, nn.Linear):
                    kept.append(inputs[0])
                    members.setdefault(id(inputs[0]), []).append(name)
                elif isinstance(output, Tensor):
                    kept.append(output)
                    producers[id(output)] = name

            return hook

        hooks = [m.register_forward_hook(enter(name)) for name, m in self.module.named_modules() if name]
        try:
            self(hidden)
        finally:
            for hook in hooks:
                hook.remove()
        return [Group(tuple(names), producers.get(tensor)) for tensor, names in members.items()]

    def on_the_way(
        self, hidden: Tensor, groups: list[Group], visit: Callable[[Group, Tensor], None]
    ) -> Tensor:
        """Run the block once and call `visit` with each group and its inputs as they arrive; returns the outputs.

        Where `visit` changes the layers of the group, later groups and the outputs see what that makes of theirs.
        """

        def arrive(group: Group) -> Callable:
            return lambda module, inputs: visit(group, inputs[0])

        first = [(self.module.get_submodule(group.layers[0]), group) for group in groups]
        hooks = [layer.register_forward_pre_hook(arrive(group)) for layer, group in first]
        try:
            return self(hidden)
        finally:
            for hook in hooks:
                hook.remove()


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks. Raises RecipeError for a model that is not a stack of blocks."""
    count = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise RecipeError(
        f"{type(model).__name__} is no stack of transformer blocks, which this technique needs."
    )


@torch.no_grad()
def blocks(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Block], Tensor]:
    """The blocks in order, and the hidden states (samples, length, hidden) that enter the first.

    tokens: (samples, length). A block's arguments are those for one sample; they hold for any number of samples.
    """
    name, modules = block_list(model)
    found: list[Block] = []
    hidden: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, object]) -> None:
        arguments = dict(arguments)
        states = inputs[0] if inputs else arguments.pop("hidden_states")
        if len(found) == len(modules):
            hidden.append(states)
            raise _Enough
        if not found:
            hidden.append(states)
        found.append(
            Block(f"{name}.{len(found)}", module, arguments | {"use_cache": False, "past_key_values": None})
        )

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    try:
        for sample in tokens:
            with suppress(_Enough):
                model.base_model(input_ids=sample[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found, torch.cat(hidden)


class _Enough(Exception):
    """The first block has been reached, and nothing after it is wanted."""


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16 or AMX)."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def half_precision() -> torch.autocast:
    """Linear layers in bfloat16, where the CPU has it in hardware; residuals and norms stay in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast())


def longest(model: PreTrainedModel) -> int:
    """Tokens that the model can see at once."""
    return getattr(model.config, "max_position_embeddings", None) or 2**31
