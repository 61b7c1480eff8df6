"""Mixed precision: allocations worked by hand and by trying all, sensitivities against measured divergence."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from edgelab.model import blocks as structure
from edgelab.recipes import Context, RecipeError, parse
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.quantization import mixed
from edgelab.techniques.quantization.mixed import (
    AllocationError,
    Mixed,
    SensitivityTable,
    allocate,
    fisher_cost,
    fisher_costs,
    kl_costs,
    stored_bytes,
)
from edgelab.techniques.quantization.rtn import GroupSizeError, RoundToNearest, linear_layers, quantize_affine


@pytest.fixture
def tokens():
    return torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calibrated(monkeypatch, tokens):
    """Calibration text is `tokens`, whatever the settings."""

    def draw(self, context, longest):
        context.record.calibration_tokens = tokens.numel()
        return tokens

    monkeypatch.setattr(Mixed, "draw", draw)


# The allocation


def test_allocation_by_hand():
    # Equal layers of 2 or 4 bytes. With 8 bytes one layer may have 4: the one that gains 9, not 5 or 1.
    cost = np.array([[5.0, 0.0], [10.0, 1.0], [2.0, 1.0]])
    n_bytes = np.array([[2, 4]] * 3)
    assert allocate(cost, n_bytes, 8).tolist() == [0, 1, 0]
    assert allocate(cost, n_bytes, 7.9).tolist() == [0, 0, 0]
    assert allocate(cost, n_bytes, 10).tolist() == [1, 1, 0]
    assert allocate(cost, n_bytes, 100).tolist() == [1, 1, 1]


def test_greedy_choice_would_be_wrong():
    # Best gain per byte first takes layer 0 (3 for 1 byte), and then nothing fits; 4 for 3 bytes is better.
    cost, n_bytes = np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([[1, 2], [1, 4]])
    assert allocate(cost, n_bytes, 5).tolist() == [0, 1]


@settings(max_examples=40)
@given(st.data())
def test_allocation_equals_trying_all(data):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    cost = data.draw(arrays(float, shape, elements=st.floats(-1, 1).map(lambda value: round(value, 6))))
    n_bytes = data.draw(arrays(np.int64, shape, elements=st.integers(1, 12).map(lambda value: value * 1000)))
    budget = data.draw(st.integers(int(n_bytes.min(1).sum()), int(n_bytes.max(1).sum())))
    rows = np.arange(shape[0])
    every = [np.array(choice) for choice in itertools.product(range(shape[1]), repeat=shape[0])]
    best = min(cost[rows, choice].sum() for choice in every if n_bytes[rows, choice].sum() <= budget)
    choice = allocate(cost, n_bytes, budget)
    assert n_bytes[rows, choice].sum() <= budget
    assert cost[rows, choice].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("budget", [2.6, 3, 4, 5.5])
def test_two_hundred_layers_are_within_a_thousandth_of_the_relaxed_bound(budget):
    random = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8])
    weights = random.choice([110_592, 331_776, 884_736], 210)
    cost = random.lognormal(-6, 1.5, (210, 1)) * 4.0 ** -(bits - 2) * random.lognormal(0, 0.2, (210, 6))
    n_bytes = weights[:, None] * bits // 8
    choice = allocate(cost, n_bytes, weights.sum() * budget / 8)
    rows = np.arange(210)
    total, spent = cost[rows, choice].sum(), n_bytes[rows, choice].sum()
    # Lagrange: for any price of a byte, min over choices of cost + price * (bytes - budget) bounds the optimum below.
    bound = max(
        (cost + price * n_bytes).min(1).sum() - price * weights.sum() * budget / 8
        for price in np.logspace(-12, -5, 2000)
    )
    assert spent <= weights.sum() * budget / 8
    assert bound <= total * (1 + 1e-9) and total <= bound * 1.001


def test_a_budget_that_nothing_fits_is_answered_with_what_is_needed():
    with pytest.raises(AllocationError, match=r"^A budget of 3 bytes is too small; the layers need 4\.$"):
        allocate(np.ones((2, 2)), np.array([[2, 4]] * 2), 3)
    with pytest.raises(AllocationError, match="no finite number"):
        allocate(np.array([[np.nan, 1.0]]), np.array([[2, 4]]), 3)


@pytest.mark.parametrize("how", [(2, 32), (3, 64), (4, 64), (5, 0), (8, 0), (6, 96)])
def test_bytes_are_those_that_are_stored(how):
    tensor = quantize_affine(torch.randn(10, 192), *how)
    parts, _ = tensor.stored()
    assert stored_bytes(10 * 192, *how, row=192) == sum(part.nbytes for part in parts.values())


# Sensitivity


def test_fisher_cost_by_hand():
    error = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    inputs = torch.tensor([[1.0, 1.0], [0.0, 3.0]])  # outputs move by (1, 2) and (0, 6)
    gradients = torch.tensor([[1.0, -1.0], [5.0, 0.5]])  # by 1 - 2 = -1 and 0 + 3 = 3 along the gradient
    assert fisher_cost(error, inputs, gradients) == pytest.approx((np.log(1 + 1) + np.log(1 + 9)) / 2 / 2)


def test_skipped_blocks_give_the_logits_of_the_model(new_model, layout, tokens):
    model = new_model(layout)
    found, hidden = structure.blocks(model, tokens)
    leaving = mixed.walk(found, hidden)[-1]
    with torch.inference_mode():
        expected = model(tokens[1:2]).logits[0]
        torch.testing.assert_close(mixed.logits(model, found, tokens[1], leaving[1:2]), expected)
        torch.testing.assert_close(model(tokens[1:2]).logits[0], expected)  # and leave no trace


def test_gradients_block_by_block_equal_those_of_the_whole(new_model, layout, tokens):
    model = new_model(layout)
    found, hidden = structure.blocks(model, tokens)
    states = mixed.walk(found, hidden)
    gradient = mixed.tail_gradient(model, found, tokens, states[-1], seed=0)
    sums = {}
    for block, entering in zip(reversed(found), reversed(states[:-1]), strict=True):
        gradient, seen = mixed.block_gradients(block, entering, gradient)
        sums |= {f"{block.name}.{name}": grad.T @ inputs for name, (inputs, grad) in seen.items()}
    assert set(sums) == set(linear_layers(model))
    # The gradient in a weight is the sum over tokens of output gradient times input.
    generator = torch.Generator().manual_seed(0)
    loss = 0
    for ids in tokens:
        log_p = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
        loss = loss - log_p.gather(1, torch.multinomial(log_p.detach().exp(), 1, generator=generator)).sum()
    loss.backward()
    for name, expected in sums.items():
        actual = model.get_submodule(name).weight.grad
        torch.testing.assert_close(expected, actual, rtol=1e-3, atol=1e-4 * float(actual.abs().max()))


def test_measured_divergence_by_hand(new_model, tokens):
    model = new_model("llama")
    name = "model.layers.0.mlp.up_proj"
    costs = kl_costs(
        model, tokens[:2], lambda weight: [quantize_affine(weight, 3, 0).dequantize()], Context()
    )
    changed = copy.deepcopy(model)
    weight = changed.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(quantize_affine(weight, 3, 0).dequantize())
        log_p, log_q = (torch.log_softmax(each(tokens[:2]).logits, -1) for each in (model, changed))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert costs[name] == [pytest.approx(expected, rel=1e-3)]


def test_prediction_from_gradients_agrees_with_measured_divergence(new_model, tokens):
    """Second order: for small errors the mean over many tokens is right within the noise of the draws."""
    model = new_model("llama")
    many = torch.randint(2, 300, (24, 48), generator=torch.Generator().manual_seed(1))

    def rounded(weight):
        return [quantize_affine(weight, 6, 0).dequantize()]

    fisher, measured = (each(model, many, rounded, Context()) for each in (fisher_costs, kl_costs))
    assert fisher.keys() == measured.keys() and len(fisher) == 14
    ratios = [fisher[name][0] / measured[name][0] for name in fisher]
    assert 0.7 < np.median(ratios) < 1.4
    assert (
        np.corrcoef(*(np.log([costs[name][0] for name in fisher]) for costs in (fisher, measured)))[0, 1]
        > 0.8
    )


# The technique


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_apply_stays_within_the_bytes_and_beats_uniform_in_what_it_predicts(
    new_model, calibrated, sensitivity
):
    model = new_model("llama")
    before = copy.deepcopy(model.state_dict())
    technique, context = Mixed(bits=3.5, group_size=32, sensitivity=sensitivity), Context()
    packed = technique.apply(model, context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(type(m) is nn.Linear for m in linear_layers(model).values())
    table = technique.table(model, Context())
    layers = {name: packed.get_submodule(name) for name in table.names}
    assert set(layers) == set(linear_layers(model)) and all(
        isinstance(m, PackedLinear) for m in layers.values()
    )
    stored = sum(part.nbytes for layer in layers.values() for part in layer.tensor.stored()[0].values())
    assert stored <= table.budget(3.5, 32)
    assert {layer.tensor.bits for layer in layers.values()} > {3} or len(
        {x.tensor.bits for x in layers.values()}
    ) > 1
    # Uniform 3 bits take fewer bytes, and so are one of the choices.
    assert table.predicted(table.allocate(3.5, 32)) <= table.predicted(np.full(14, 1))
    assert type(packed.get_output_embeddings()) is nn.Linear
    assert context.record.numbers == {"predicted_kld": table.predicted(table.allocate(3.5, 32))}
    assert context.record.calibration_tokens == 96


def test_wide_layers_have_one_scale_per_row_or_groups(new_model, calibrated):
    model = new_model("llama")
    by_row = Mixed(bits=6, group_size=32)
    assert by_row.formats == [(2, 32), (3, 32), (4, 32), (5, 0), (6, 0), (8, 0)]
    widths = [
        (m.tensor.bits, m.tensor.scale.shape[1])
        for m in by_row.apply(model, Context()).modules()
        if isinstance(m, PackedLinear)
    ]
    assert all((bits >= 5) == (groups == 1) for bits, groups in widths) and max(widths)[0] >= 5
    assert {size for _, size in Mixed(wide="groups", group_size=32).formats} == {32}


def test_at_the_ends_of_the_range_it_is_uniform(new_model, calibrated):
    model = new_model("llama")
    ids = torch.arange(2, 40)[None]
    for bits, group_size in ((2, 64), (8, 0)):
        technique = Mixed(bits=bits, group_size=group_size)
        ours, theirs = (
            each.apply(model, Context())
            for each in (technique, RoundToNearest(bits=bits, group_size=group_size))
        )
        if bits == 2:  # at 8 bits a narrower format that costs nothing may be as good
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert all(m.tensor.bits <= bits for m in ours.modules() if isinstance(m, PackedLinear))


def test_the_range_is_that_of_the_layers(new_model, calibrated):
    model = new_model("llama")
    changed = Mixed(bits=2, group_size=32, range="mse").apply(model, Context())
    for name, layer in linear_layers(model).items():
        plain = quantize_affine(layer.weight.detach(), 2, 32, range="mse")
        assert torch.equal(changed.get_submodule(name).tensor.scale, plain.scale)


def test_every_layout_can_be_mixed(new_model, layout, calibrated):
    mixture = Mixed(bits=4, group_size=32).apply(new_model(layout), Context())
    assert sum(isinstance(module, PackedLinear) for module in mixture.modules()) >= 12
    assert mixture(torch.arange(2, 20)[None]).logits.isfinite().all()


def test_a_second_budget_reads_the_table(new_model, calibrated, monkeypatch, home):
    model = new_model("llama")
    first = Mixed(bits=4, group_size=32).table(model, Context())
    monkeypatch.setattr(mixed, "fisher_costs", lambda *_: pytest.fail("computed again"))
    context = Context()
    again = Mixed(bits=3, group_size=32).table(model, context)
    assert (again.names, again.shapes, again.formats, again.tokens) == (
        first.names,
        first.shapes,
        first.formats,
        96,
    )
    assert np.array_equal(again.cost, first.cost)
    assert context.record.notes == ["Sensitivities were read from an earlier run."]
    assert len(list((home / "sensitivity").glob("*.json"))) == 1
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    with pytest.raises(pytest.fail.Exception, match="computed again"):  # another model is another table
        Mixed(bits=3, group_size=32).table(model, Context())


def test_the_frame_says_what_each_layer_got():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]
    cost = np.array([[4.0, 1.0], [2.0, 0.5]])
    table = SensitivityTable(names, [(4, 8), (8, 16)], [(2, 8), (4, 8)], cost, 10)
    frame = table.frame(np.array([0, 1]))
    assert frame[["block", "kind", "bits", "group_size"]].to_numpy().tolist() == [
        [0, "q_proj", 2, 8],
        [11, "down_proj", 4, 8],
    ]
    # 32 weights at 2 bits, 4 scales of 2 bytes, 4 zero-points at 2 bits; 128 at 4 bits, 16 scales, 16 zero-points.
    assert frame["bytes"].tolist() == [8 + 8 + 1, 64 + 32 + 8]
    assert frame["cost"].tolist() == [4.0, 0.5] and frame["sensitivity"].tolist() == [1.0, 0.5]
    assert table.predicted(np.array([0, 1])) == 4.5


def test_recipes_round_trip():
    assert str(parse("quantize.mixed:bits=4.0")) == "quantize.mixed:bits=4,group_size=64"
    text = "quantize.mixed:bits=3.5,group_size=32,wide=groups,sensitivity=kl"
    assert str(parse(str(parse(text)))) == str(parse(text)) and parse(text).techniques[0].bits == 3.5
    assert parse("quantize.mixed").techniques[0].samples == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ("bits=1.5", "bits=1.5 is outside 2 to 8"),
        ("bits=nan", "bits=nan is outside 2 to 8"),
        ("group_size=-1", "group_size=-1 is negative"),
        ("sensitivity=hessian", "is one of fisher, kl, not 'hessian'"),
        ("samples=0", "at least 1 sample"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(RecipeError, match=message):
        parse(f"quantize.mixed:{settings}")


def test_bad_models_and_groups(new_model, calibrated):
    with pytest.raises(GroupSizeError, match="group_size=40"):
        Mixed(group_size=40).apply(new_model("llama"), Context())
    rounded = RoundToNearest().apply(new_model("llama"), Context())
    with pytest.raises(RecipeError, match="quantized already"):
        Mixed().apply(rounded, Context())
