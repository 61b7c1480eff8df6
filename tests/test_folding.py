"""Folding scales: layers worked by hand, and outputs that stay what they were, whatever else reads a norm."""

import copy
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgelab.model.blocks import Block, Group, blocks
from edgelab.recipes import RecipeError
from edgelab.techniques.folding import Source, find_source, fold_scale, norm_offset

IDS = torch.arange(2, 40)[None]
FOLDED = {  # of two blocks: groups behind a norm, and down_proj behind up_proj; heads are grouped, so no o_proj
    "llama": 6,
    "qwen3": 6,
    "gemma": 6,
    "phi": 2,
    "stablelm": 6,
}


class Gated(nn.Module):
    """down(f(gate(x)) * up(x)), hidden 2 -> 3 -> 2."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 2)
        self.activation = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(inputs)) * self.up(inputs))


class Plain(nn.Module):
    """second(f(first(x))), hidden 2 -> 3 -> 2."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.second = nn.Linear(2, 3), activation, nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(inputs)))


def block_of(module: nn.Module, width: int = 2) -> Block:
    """A module as a block, with random states to try it on."""
    return Block("block", module, probe=torch.randn(2, 8, width, generator=torch.Generator().manual_seed(0)))


def normed() -> Block:
    """layer(norm(x)), hidden 2."""
    parts = OrderedDict(norm=nn.LayerNorm(2), layer=nn.Linear(2, 2, bias=False))
    return block_of(nn.Sequential(parts))


def fold_all(model, draw) -> list[bool]:
    """Fold a scale from `draw(length)` into every group of a model, in place."""
    answers = []
    found, hidden = blocks(model, IDS)
    for block in found:
        for group in block.groups(hidden):
            width = block.module.get_submodule(group.layers[0]).in_features
            answers.append(fold_scale(block, group, draw(width)))
        hidden = block(hidden)
    return answers


def test_a_norm_by_hand():
    block = normed()
    norm, layer = block.module.norm, block.module.layer
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([1.0, -1.0]))
        layer.weight.copy_(torch.tensor([[5.0, 7.0], [1.0, -2.0]]))
    assert fold_scale(block, Group(("layer",), "norm"), torch.tensor([2.0, 0.5]))
    assert norm.weight.tolist() == [1.0, 6.0]
    assert norm.bias.tolist() == [0.5, -2.0]
    assert layer.weight.tolist() == [[10.0, 3.5], [2.0, -1.0]]


def test_a_gated_mlp_by_hand():
    mlp = Gated(nn.SiLU())
    before = copy.deepcopy(mlp.state_dict())
    scale = torch.tensor([2.0, 4.0, 0.5])
    assert fold_scale(block_of(mlp), Group(("down",), None), scale)
    after = mlp.state_dict()
    assert torch.equal(after["up.weight"], before["up.weight"] / scale[:, None])
    assert torch.equal(after["up.bias"], before["up.bias"] / scale)
    assert torch.equal(after["down.weight"], before["down.weight"] * scale)
    for name in ("gate.weight", "gate.bias", "down.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize(("activation", "known"), [(nn.ReLU(), True), (nn.GELU(), False), (nn.Tanh(), False)])
def test_only_what_passes_a_scale_on_is_a_source(activation, known):
    block = block_of(Plain(activation))
    before = copy.deepcopy(block.module.state_dict())
    inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    outputs = block.module(inputs)
    group = Group(("second",), "activation")
    assert fold_scale(block, group, torch.tensor([2.0, 3.0, 0.25])) is known
    torch.testing.assert_close(block.module(inputs), outputs)
    same = all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())
    assert same is not known


def test_the_offset_of_a_norm(new_model):
    assert norm_offset(nn.LayerNorm(8)) == 0
    assert norm_offset(nn.RMSNorm(8)) == 0
    assert norm_offset(new_model("gemma").model.layers[0].input_layernorm) == 1
    assert norm_offset(nn.PReLU(8)) is None
    assert norm_offset(nn.GELU()) is None
    assert norm_offset(nn.Linear(8, 8)) is None
    assert norm_offset(Gate(8)) is None


class Gate(nn.RMSNorm):
    """A norm that is given a gate as well."""

    def forward(self, inputs: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * gate


@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_logits_stay(new_model, layout, seed):
    """Random scales over more than two orders of magnitude change no logit by 1e-4; they lie within 10."""
    model = new_model(layout)
    generator = torch.Generator().manual_seed(seed)
    before = model(IDS).logits.detach()
    answers = fold_all(model, lambda width: torch.exp(5 * torch.rand(width, generator=generator) - 2.5))
    assert sum(answers) == FOLDED[layout]
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-4)


def test_values_are_a_source_where_heads_are_not_grouped(new_model, layout):
    model = new_model(layout, num_key_value_heads=4)
    generator = torch.Generator().manual_seed(0)
    before = model(IDS).logits.detach()
    answers = fold_all(model, lambda width: 0.2 + 5 * torch.rand(width, generator=generator))
    assert sum(answers) == FOLDED[layout] + 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-4)
    found, hidden = blocks(model, IDS)
    group = next(group for group in found[0].groups(hidden) if group.layers[0].endswith(("o_proj", "dense")))
    assert find_source(found[0], group) == Source(found[0].module.self_attn.v_proj)


def test_layers_that_read_the_residual_have_no_source(new_model):
    """OLMo2 norms what attention and MLP put out, not what they read; of its groups down_proj alone has a source."""
    model = new_model("olmo2")
    before = model(IDS).logits.detach()
    answers = fold_all(model, lambda width: torch.linspace(0.2, 5, width))
    assert answers == [False, False, False, True] * 2
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-4)


def test_nothing_changes_without_a_source(new_model):
    model = new_model("phi")
    before = copy.deepcopy(model.state_dict())
    group = Group(("mlp.fc2",), "mlp.activation_fn")
    assert not fold_scale(blocks(model, IDS)[0][0], group, torch.full((192,), 3.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Forked(nn.Module):
    """x + layer(norm(x)) + other(norm(x)), hidden 4, where `other` reads the norm in a way of its own."""

    def __init__(self, other) -> None:
        super().__init__()
        self.norm, self.layer, self.other = nn.LayerNorm(4), nn.Linear(4, 4), other
        self.table = nn.Parameter(torch.eye(4) + 0.1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        normed = self.norm(inputs)
        return inputs + self.layer(normed) + self.other(self, normed)


OTHER_READERS = {
    "residual": lambda block, normed: normed,
    "router": lambda block, normed: (normed @ block.table).softmax(-1),
    "view": lambda block, normed: (normed.view(-1, 4) @ block.table).view_as(normed),
    "one channel": lambda block, normed: torch.nn.functional.pad(normed[..., 2:3], (0, 3)),
}


@pytest.mark.parametrize("other", OTHER_READERS)
def test_a_norm_that_something_else_reads_is_left_alone(other):
    block = block_of(Forked(OTHER_READERS[other]), width=4)
    before = copy.deepcopy(block.module.state_dict())
    group = Group(("layer",), "norm")
    assert block.groups(block.probe) == [group]
    assert find_source(block, group) is None
    assert not fold_scale(block, group, torch.full((4,), 2.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())


def test_a_norm_that_nothing_else_reads_is_folded():
    block = block_of(Forked(lambda block, normed: 0 * normed), width=4)
    assert fold_scale(block, Group(("layer",), "norm"), torch.full((4,), 2.0))


def test_a_scale_that_would_move_the_outputs_is_taken_back():
    """Values are clamped at 100, far from any on the probe, until the scale makes them a million times larger."""

    class Clamped(Gated):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.down(self.activation(self.gate(inputs)) * self.up(inputs).clamp(-100, 100))

    block, group = block_of(Clamped(nn.SiLU())), Group(("down",), None)
    before = copy.deepcopy(block.module.state_dict())
    assert find_source(block, group) == Source(block.module.up)
    assert not fold_scale(block, group, torch.full((3,), 1e-6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.module.state_dict().items())
    assert fold_scale(block, group, torch.full((3,), 4.0))


MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": None,
}
OTHER_LAYOUTS = {
    "glm4_moe": MIXTURE | {"head_dim": 16},
    "dots1": MIXTURE | {"head_dim": 16},
    "qwen2_moe": MIXTURE,
    "qwen3_moe": MIXTURE | {"head_dim": 16},
    "mixtral": MIXTURE,
    "olmoe": MIXTURE,
    "granitemoe": MIXTURE,
    "granitemoeshared": MIXTURE | {"shared_intermediate_size": 64},
    "deepseek_v3": MIXTURE
    | {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "phimoe": MIXTURE,
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "gpt_neox": {},
    "falcon": {"parallel_attn": True},
    "cohere": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "doge": {},
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_doubling_every_scale_moves_no_logit(name, new_model):
    model = new_model(name, **OTHER_LAYOUTS[name])
    before = model(IDS).logits.detach()
    answers = fold_all(model, lambda width: torch.full((width,), 2.0))
    assert any(answers) or name == "doge"
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-4 * float(before.abs().max()))


def test_what_two_blocks_share_is_left_alone(new_model):
    model = new_model("llama")
    first, second = model.model.layers
    second.input_layernorm = first.input_layernorm
    before = model(IDS).logits.detach()
    answers = fold_all(model, lambda width: torch.linspace(0.2, 5, width))
    assert answers == [False, False, True, True] * 2  # queries, keys and values; o_proj; gate and up; down
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (torch.ones(3), r"2 positive finite numbers.*shape \(3,\)"),
        (torch.tensor([1.0, 0.0]), "smallest value of 0"),
        (torch.tensor([1.0, torch.nan]), "positive finite"),
    ],
)
def test_scales_that_cannot_be(scale, told):
    block = normed()
    with pytest.raises(RecipeError, match=told):
        fold_scale(block, Group(("layer",), "norm"), scale)
    assert block.module.norm.weight.tolist() == [1.0, 1.0]
