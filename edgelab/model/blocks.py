"""What a causal language model consists of: its blocks, the linear layers in them, and which of them share an input.

Found by running the model, not from names, so that any model built from linear layers will do. What cannot be run
block by block, because a block reads more than the states that the one before it hands on, is found out and refused.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from edgelab.recipes import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8
Arguments = dict[str, object]


@dataclass(frozen=True)
class Group:
    """Linear layers of one block that read the same tensor, by name within the block, in order of execution.

    source: the module of the block whose output that tensor is (a norm, as a rule), or None.
    """

    layers: tuple[str, ...]
    source: str | None


@dataclass
class Block:
    """One transformer block with what it is called with besides the hidden states (mask, rotary embedding).

    arguments: those for one sample. by_sample: which of their tensors, in the order of `tree_flatten`, have rows for
    each sample, as alibi does; all others serve any number. in_tuple: whether the module answers with a tuple.
    probe: hidden states (samples, PROBE_TOKENS, hidden) to try the block on. probe_arguments: for one sample of them.
    shared: ids of parameters that are used outside of the block as well.
    """

    name: str
    module: nn.Module
    arguments: Arguments = field(default_factory=dict)
    by_sample: tuple[bool, ...] = ()
    in_tuple: bool = False
    probe: Tensor | None = None
    probe_arguments: Arguments = field(default_factory=dict)
    shared: frozenset[int] = frozenset()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states (batch, time, hidden) after the block."""
        return self.states(self.module(hidden, **self.arguments_for(len(hidden))))

    @torch.no_grad()
    def on_probe(self) -> Tensor:
        """Hidden states (samples, PROBE_TOKENS, hidden) behind the block as it is now, of the probe."""
        arguments = _for_samples(self.probe_arguments, self.by_sample, len(self.probe))
        return self.states(self.module(self.probe, **arguments))

    def arguments_for(self, samples: int) -> Arguments:
        """The arguments for so many samples."""
        return _for_samples(self.arguments, self.by_sample, samples)

    def states(self, answer: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The hidden states in what the module answers."""
        return answer[0] if self.in_tuple else answer

    def answer(self, states: Tensor) -> Tensor | tuple[Tensor]:
        """Hidden states as the module would answer them."""
        return (states,) if self.in_tuple else states

    def linear(self) -> dict[str, nn.Linear]:
        """The float linear layers of the block by name within it."""
        return float_linear(self.module)

    @torch.no_grad()
    def groups(self, hidden: Tensor) -> list[Group]:
        """Run the block and see which layers read the same tensor. hidden: (batch, time, hidden), little will do."""
        members: dict[int, list[str]] = {}
        producers: dict[int, str] = {}
        kept: list[Tensor] = []  # tensors must live on, or another takes their identity
        linear = self.linear()

        def enter(name: str) -> Callable:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
                if name in linear:
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


def float_linear(module: nn.Module) -> dict[str, nn.Linear]:
    """The float linear layers within a module by name, but for those whose weight the module around them looks at."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if is_linear(layer) and not looks_at_weight(module, name)
    }


def looks_at_weight(module: nn.Module, name: str) -> bool:
    """Whether what owns a layer of a module asks where its weight is or of which type, which a packed layer lacks."""
    owner, _, last = name.rpartition(".")
    source = _forward(type(module.get_submodule(owner)))
    return any(f"self.{last}.weight.{what}" in source for what in ("dtype", "device"))


@cache
def _forward(kind: type[nn.Module]) -> str:
    """The source of a module's forward; empty where there is none."""
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a float layer that computes x W^T + b; a router may be one by class, and pick experts.

    Of a model without memory the shape of the answer decides.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    with torch.no_grad():
        inputs = torch.linspace(-1, 1, module.in_features).to(module.weight)[None]
        answer = module(inputs)
        expected = functional.linear(inputs, module.weight, module.bias)
    if not isinstance(answer, Tensor) or answer.shape != expected.shape:
        return False
    return answer.is_meta or torch.allclose(answer, expected)


def _for_samples(arguments: Arguments, by_sample: tuple[bool, ...], samples: int) -> Arguments:
    if samples == 1 or not any(by_sample):
        return arguments
    leaves, structure = tree_flatten(arguments)
    leaves = [
        leaf.repeat(samples, *[1] * (leaf.dim() - 1)) if grows else leaf
        for leaf, grows in zip(leaves, by_sample, strict=True)
    ]
    return tree_unflatten(leaves, structure)


# Finding them


def block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks. Raises RecipeError for a model that is not a stack of blocks."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise RecipeError(
            f"{type(model).__name__} is no stack of transformer blocks, which this technique needs."
        )
    return max(lists, key=lambda pair: sum(1 for _ in pair[1].modules()))  # the first of several as large


@dataclass
class _Call:
    """One call of a block: what it was given and what it answered."""

    module: nn.Module
    states: Tensor
    arguments: Arguments
    answer: Tensor | tuple[Tensor, ...] | None = None


@torch.no_grad()
def blocks(model: PreTrainedModel, tokens: Tensor) -> tuple[list[Block], Tensor]:
    """The blocks in order, and the hidden states (samples, length, hidden) that enter the first.

    tokens: (samples, length). Raises RecipeError for a model whose blocks cannot be run one after the other.
    """
    name, modules = block_list(model)
    vocabulary = model.config.get_text_config().vocab_size
    probe = torch.arange(2, 2 + 2 * PROBE_TOKENS, device=tokens.device) % vocabulary
    pair = probe.view(2, PROBE_TOKENS)  # two samples that differ
    calls = [_calls(model, modules, ids) for ids in (tokens[:1], pair[:1], pair)]
    if any([call.module for call in calls_] != list(modules) for calls_ in calls):
        raise _entangled(model, "they do not run once each, in their order")
    uses = _uses(model)
    found = []
    for place, (full, one, two) in enumerate(zip(*calls, strict=True)):
        inside = _uses(full.module)
        block = Block(
            f"{name}.{place}",
            full.module,
            full.arguments,
            _by_sample(model, one.arguments, two.arguments),
            isinstance(two.answer, tuple),
            two.states,
            one.arguments,
            frozenset(which for which, count in inside.items() if uses[which] > count),
        )
        _check(model, block, two, calls[2][place + 1 : place + 2])
        found.append(block)
    return found, torch.cat([calls[0][0].states, *(_entering(model, modules[0], ids) for ids in tokens[1:])])


def _uses(module: nn.Module) -> Counter[int]:
    """How often each parameter, by id, is used in a module."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _calls(model: PreTrainedModel, modules: nn.ModuleList, ids: Tensor) -> list[_Call]:
    """The calls of the blocks while the model reads ids (samples, length)."""
    calls: list[_Call] = []

    def enter(module: nn.Module, inputs: tuple, arguments: Arguments) -> None:
        calls.append(_Call(module, *_split(module, inputs, arguments)))

    def leave(module: nn.Module, inputs: tuple, answer: Tensor | tuple[Tensor, ...]) -> None:
        calls[-1].answer = answer

    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(leave) for module in modules]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _split(module: nn.Module, inputs: tuple, arguments: Arguments) -> tuple[Tensor, Arguments]:
    """What a block is called with: its hidden states, which come first, and all else by name, without a cache."""
    first, *others = inspect.signature(module.forward).parameters
    arguments = dict(zip((first, *others), inputs, strict=False)) | arguments
    if "past_key_values" in arguments:
        arguments["past_key_values"] = None
    return arguments.pop(first), arguments


def _entering(model: PreTrainedModel, first: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states (1, length, hidden) that enter the first block for ids (length,); the blocks do not run."""
    states: list[Tensor] = []

    def enter(module: nn.Module, inputs: tuple, arguments: Arguments) -> None:
        states.append(_split(module, inputs, arguments)[0])
        raise _Enough

    hook = first.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with suppress(_Enough):
            model.base_model(input_ids=ids[None], use_cache=False)
    finally:
        hook.remove()
    return states[0]


class _Enough(Exception):
    """The first block has been reached, and nothing after it is wanted."""


def _by_sample(model: PreTrainedModel, one: Arguments, two: Arguments) -> tuple[bool, ...]:
    """Which tensors among the arguments have rows for each sample. one, two: for so many samples."""
    (leaves, _), (pairs, _) = tree_flatten(one), tree_flatten(two)
    if len(leaves) != len(pairs):
        raise _entangled(model, "their arguments depend on the number of samples")
    by_sample = []
    for leaf, pair in zip(leaves, pairs, strict=True):
        grows = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(pair) == 2 * len(leaf)
        if grows and not torch.equal(*pair.chunk(2)):
            raise _entangled(model, "they read more of the text than the states that they hand on")
        by_sample.append(grows)
    return tuple(by_sample)


def _check(model: PreTrainedModel, block: Block, call: _Call, following: list[_Call]) -> None:
    """Run a block as techniques will, and compare with what it answered in the model and what the next one was given.

    States that are no numbers are left for techniques to say so.
    """
    answered = block.states(call.answer)
    if not answered.isfinite().all():
        return
    if following and not torch.equal(answered, following[0].states):
        raise _entangled(model, f"the states behind {block.name} are not those that enter the next")
    try:
        alone = block.on_probe()
    except Exception as error:  # of any block of transformers
        raise _entangled(model, f"{block.name} does not run alone ({type(error).__name__})") from error
    if not (alone - answered).norm() <= 1e-3 * answered.norm():
        raise _entangled(model, f"{block.name} answers otherwise when it runs alone")


def _entangled(model: PreTrainedModel, how: str) -> RecipeError:
    return RecipeError(
        f"The blocks of {type(model).__name__} cannot be changed one after the other: {how}; use a technique that "
        "looks at layers alone, such as quantize.rtn."
    )


# How they are run


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16 or AMX)."""
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def half_precision() -> torch.autocast:
    """Linear layers in bfloat16, where the CPU has it in hardware; residuals and norms stay in float32.

    Without autocast's cache of weights in bfloat16, which would not see that a technique has changed one.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast(), cache_enabled=False)


def longest(model: PreTrainedModel) -> int:
    """Tokens that the model can see at once."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")
    return next((limit for name in names if (limit := getattr(config, name, None))), 2**31)
