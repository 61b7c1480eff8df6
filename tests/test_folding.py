"""Folding scales: layers worked by hand, and logits that stay what they were on all five layouts."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgelab.model.blocks import Group, blocks
from edgelab.recipes import RecipeError
from edgelab.techniques.folding import find_source, fold_scale, norm_offset

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


def whole(module: nn.Module) -> nn.Module:
    """A block of which `module` is the MLP."""
    block = nn.Module()
    block.mlp = module
    return block


def fold_all(model, draw) -> list[bool]:
    """Fold a scale from `draw(length)` into every group of a model, in place."""
    answers = []
    found, hidden = blocks(model, IDS)
    for block in found:
        for group in block.groups(hidden):
            width = block.module.get_submodule(group.layers[0]).in_features
            answers.append(fold_scale(block.module, group, draw(width)))
        hidden = block(hidden)
    return answers


def test_a_norm_by_hand():
    block = nn.Module()
    block.norm, block.layer = nn.LayerNorm(2), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        block.norm.weight.copy_(torch.tensor([2.0, 3.0]))
        block.norm.bias.copy_(torch.tensor([1.0, -1.0]))
        block.layer.weight.copy_(torch.tensor([[5.0, 7.0]]))
    assert fold_scale(block, Group(("layer",), "norm"), torch.tensor([2.0, 0.5]))
    assert block.norm.weight.tolist() == [1.0, 6.0]
    assert block.norm.bias.tolist() == [0.5, -2.0]
    assert block.layer.weight.tolist() == [[10.0, 3.5]]


def test_a_gated_mlp_by_hand():
    mlp = Gated(nn.SiLU())
    before = copy.deepcopy(mlp.state_dict())
    scale = torch.tensor([2.0, 4.0, 0.5])
    assert fold_scale(whole(mlp), Group(("mlp.down",), None), scale)
    after = mlp.state_dict()
    assert torch.equal(after["up.weight"], before["up.weight"] / scale[:, None])
    assert torch.equal(after["up.bias"], before["up.bias"] / scale)
    assert torch.equal(after["down.weight"], before["down.weight"] * scale)
    for name in ("gate.weight", "gate.bias", "down.bias"):
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize(("activation", "known"), [(nn.ReLU(), True), (nn.GELU(), False), (nn.Tanh(), False)])
def test_only_what_passes_a_scale_on_is_a_source(activation, known):
    block = whole(Plain(activation))
    before = copy.deepcopy(block.state_dict())
    inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    outputs = block.mlp(inputs)
    group = Group(("mlp.second",), "mlp.activation")
    assert fold_scale(block, group, torch.tensor([2.0, 3.0, 0.25])) is known
    torch.testing.assert_close(block.mlp(inputs), outputs)
    same = all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert same is not known


def test_the_offset_of_a_norm(new_model):
    assert norm_offset(nn.LayerNorm(8)) == 0
    assert norm_offset(nn.RMSNorm(8)) == 0
    assert norm_offset(new_model("gemma").model.layers[0].input_layernorm) == 1
    assert norm_offset(nn.PReLU(8)) is None
    assert norm_offset(nn.GELU()) is None
    assert norm_offset(nn.Linear(8, 8)) is None


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
    assert find_source(found[0].module, group) == (found[0].module.self_attn.v_proj, 0.0)


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
    assert not fold_scale(model.model.layers[0], group, torch.full((192,), 3.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("scale", "told"),
    [
        (torch.ones(3), r"2 positive finite numbers.*shape \(3,\)"),
        (torch.tensor([1.0, 0.0]), "smallest value of 0"),
        (torch.tensor([1.0, torch.nan]), "positive finite"),
    ],
)
def test_scales_that_cannot_be(scale, told):
    block = nn.Module()
    block.norm, block.layer = nn.LayerNorm(2), nn.Linear(2, 1)
    with pytest.raises(RecipeError, match=told):
        fold_scale(block, Group(("layer",), "norm"), scale)
    assert block.norm.weight.tolist() == [1.0, 1.0]
