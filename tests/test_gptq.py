"""GPTQ, AWQ and learned rounding: by hand, against rounding, and on five layouts."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.corpora import CorpusError, tokenize
from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.storage.layers import PackedLinear
from edgelab.techniques import calibration
from edgelab.techniques.calibration import CalibrationError
from edgelab.techniques.quantization import awq
from edgelab.techniques.quantization import gptq as gptq_module
from edgelab.techniques.quantization.autoround import AutoRound, LearnedRounding
from edgelab.techniques.quantization.awq import AWQ, search_scale
from edgelab.techniques.quantization.gptq import GPTQ, gptq, input_products, inverse_factor, split_rows
from edgelab.techniques.quantization.ranges import affine_grid, find_grid, on_grid
from edgelab.techniques.quantization.rtn import linear_layers, quantize_affine


def minmax(bits: int, symmetric: bool = False):
    return lambda groups, which=None: affine_grid(groups, bits, symmetric)


def some_hessian(inputs: int, seed: int, tokens: int = 400) -> torch.Tensor:
    """Mean products of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mixing
    return x.T @ x / tokens


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    error = (rounded - weight).double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.fixture
def context(byte_tokenizer, monkeypatch, story) -> Context:
    """A context whose calibration text is the story of the tests."""
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    return Context(tokenizer=byte_tokenizer, record=Record())


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), ordered=st.booleans(), symmetric=st.booleans())
@settings(max_examples=30)
def test_gptq_with_identity_hessian_is_rounding(seed, bits, ordered, symmetric):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    tensor, damping = gptq(weight, torch.eye(64), bits, 32, minmax(bits, symmetric), activation_order=ordered)
    plain = quantize_affine(weight, bits, 32, symmetric)
    assert torch.equal(tensor.integers, plain.integers)
    assert torch.equal(tensor.scale, plain.scale)
    assert damping == 0.01


@given(seed=st.integers(0, 1000), bits=st.integers(2, 5), ordered=st.booleans(), static=st.booleans())
@settings(max_examples=30)
def test_gptq_error_is_not_above_rounding(seed, bits, ordered, static):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(seed))
    hessian = some_hessian(64, seed)
    tensor, _ = gptq(weight, hessian, bits, 32, minmax(bits), ordered, static)
    plain = quantize_affine(weight, bits, 32)
    allowed = 1.0 if ordered else 1.1  # in an unlucky order little is left to make up for the largest inputs
    assert output_error(weight, tensor.dequantize(), hessian) <= allowed * output_error(
        weight, plain.dequantize(), hessian
    )


def test_gptq_by_hand():
    """Two inputs that always come together: what the first rounds away, the second makes up for.

    The grid has step 1 (2 bits, range 0 to 3). w = (0.4, 1.4, 3, 0): 0.4 becomes 0; all of its error goes to its twin,
    1.4 + 0.4 = 1.8, which becomes 2. Plain rounding gives 0 and 1, an error of -0.8 in the output.
    """
    weight = torch.tensor([[0.4, 1.4, 3.0, 0.0]])
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 0.999
    tensor, _ = gptq(weight, hessian, 2, 4, minmax(2), activation_order=False, damping=1e-4)
    assert tensor.integers.tolist() == [[0, 2, 3, 0]]
    assert quantize_affine(weight, 2, 4).integers.tolist() == [[0, 1, 3, 0]]


def test_activation_order_rounds_the_largest_input_first():
    weight = torch.tensor([[0.4, 1.4, 3.0, 0.0]])
    hessian = torch.diag(torch.tensor([1.0, 100.0, 1.0, 1.0]))
    hessian[0, 1] = hessian[1, 0] = 9.99
    tensor, _ = gptq(weight, hessian, 2, 4, minmax(2), activation_order=True, damping=1e-5)
    # 1.4 -> 1 first: its twin of a tenth of the size would have to rise by 4, to 4.4, and stops at the end of the grid.
    assert tensor.integers.tolist() == [[3, 1, 3, 0]]


def test_inputs_never_seen_do_not_break_the_factor():
    hessian = some_hessian(32, 0)
    hessian[:, 3] = hessian[3] = 0
    weight = torch.randn(4, 32)
    tensor, damping = gptq(weight, hessian, 4, 32, minmax(4))
    assert damping == 0.01
    assert torch.equal(tensor.dequantize()[:, 3], quantize_affine(weight, 4, 32).dequantize()[:, 3])


def test_gptq_makes_up_for_errors_in_float32_whatever_the_blocks_run_in():
    generator = torch.Generator().manual_seed(0)
    weight, hessian = (
        torch.randn(8, 256, generator=generator),
        some_hessian(256, 0),
    )  # two lazy batches of columns
    plain, _ = gptq(weight, hessian, 3, 64, minmax(3))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = gptq(weight, hessian, 3, 64, minmax(3))
    assert torch.equal(found.integers, plain.integers)


def test_groups_that_move_follow_the_weights_as_they_are():
    """The second group's grid comes from weights that have already made up for the first group's errors."""
    weight = torch.tensor([[0.4, 3.0, 1.4, 3.0]])
    hessian = torch.eye(4)
    hessian[0, 3] = hessian[3, 0] = 0.999  # 0.4 becomes 0, and 3 becomes 3.4
    settings = {"activation_order": False, "damping": 1e-4}
    fixed, moving = (
        gptq(weight, hessian, 2, 2, minmax(2), static_groups=static, **settings)[0]
        for static in (True, False)
    )
    assert fixed.scale.tolist() == [[1, 1]]
    assert moving.scale[0, 0] == 1 and moving.scale[0, 1] == pytest.approx(3.4 / 3, rel=2e-3)


def test_no_finite_token_is_an_error_with_a_reason():
    with pytest.raises(CalibrationError, match="No token of the calibration text gives finite activations"):
        input_products(torch.full((2, 3, 8), torch.nan))


def test_singular_hessian_is_damped_more_and_says_so():
    x = torch.randn(2, 64) * 1000
    hessian = x.T @ x
    _, damping = inverse_factor(hessian, 1e-9)
    assert 1e-9 < damping <= 1
    with pytest.raises(RecipeError, match="more or longer calibration samples"):
        inverse_factor(torch.full((4, 4), float("nan")), 0.01)


def test_products_leave_out_tokens_that_are_not_finite():
    inputs = torch.randn(3, 5, 8)
    inputs[1, 2, 3] = torch.inf
    products, lost = input_products(inputs)
    kept = inputs.flatten(0, 1)[[i for i in range(15) if i != 7]]
    assert lost == 1
    torch.testing.assert_close(products, kept.T @ kept / 14)


def test_split_rows_undoes_stacking():
    weight = torch.randn(12, 64)
    parts = split_rows(quantize_affine(weight, 4, 32), [4, 8])
    again = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(again, quantize_affine(weight, 4, 32).dequantize())


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), symmetric=st.booleans())
@settings(max_examples=30)
def test_ranges_for_the_outputs_are_no_worse(seed, bits, symmetric):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(6, 2, 32, generator=generator) ** 3
    importance = torch.rand(2, 32, generator=generator) ** 4

    def loss(grid) -> torch.Tensor:
        return ((on_grid(groups, *grid, bits) - groups).square() * importance).sum()

    searched = find_grid(groups, bits, symmetric, "mse", importance=importance)
    assert loss(searched) <= loss(find_grid(groups, bits, symmetric))


def test_awq_of_equal_inputs_is_no_scaling():
    """Inputs of one size have nothing to protect: every alpha gives ones, and rounding is plain."""
    weight = torch.randn(16, 64)
    scale, _ = search_scale(weight, torch.full((64,), 0.7), torch.eye(64), 4, 32)
    torch.testing.assert_close(scale, torch.ones(64))


def test_awq_with_unit_scales_is_rounding(new_model, context, monkeypatch):
    ones = torch.ones_like
    monkeypatch.setattr(awq, "search_scale", lambda weight, magnitude, *_: (ones(magnitude), 0.0))
    model = new_model("llama")
    changed = dataclasses.replace(TECHNIQUES["awq"], clip=False).apply(model, context)
    for name, layer in linear_layers(model).items():
        found, plain = changed.get_submodule(name).tensor, quantize_affine(layer.weight.detach(), 4, 32)
        assert torch.equal(found.integers, plain.integers) and torch.equal(found.scale, plain.scale)


def test_awq_protects_the_channel_that_carries_most():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    magnitude = torch.ones(64)
    magnitude[10] = 50.0
    hessian = torch.diag(magnitude.square())
    scale, alpha = search_scale(weight, magnitude, hessian, 3, 32)
    assert alpha > 0
    assert scale.argmax() == 10
    plain = quantize_affine(weight, 3, 32).dequantize()
    scaled = quantize_affine(weight * scale, 3, 32).dequantize() / scale
    assert output_error(weight, scaled, hessian) < output_error(weight, plain, hessian)


def test_learned_rounding_starts_as_rounding():
    weight = torch.randn(6, 2, 32)
    plain = quantize_affine(weight.flatten(1), 4, 32)
    start = LearnedRounding(weight, 4).rounded()
    assert torch.equal(start.integers, plain.integers)
    assert torch.equal(start.scale, plain.scale)
    assert torch.equal(start.zero_point, plain.zero_point)


def test_learned_rounding_lowers_the_error_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 1, 64, generator=generator)
    x = torch.randn(400, 64, generator=generator) + torch.randn(400, 1, generator=generator)  # correlated
    hessian, exact = x.T @ x / 400, weight.flatten(1)
    learned = LearnedRounding(weight, 3)
    first = output_error(exact, learned.rounded().dequantize(), hessian)
    for step in range(200):
        rounded = learned.rounded()
        learned.step((rounded.dequantize() - exact) @ hessian, rounded, (1 - step / 200) / 200)
    assert output_error(exact, learned.rounded().dequantize(), hessian) < 0.8 * first
    assert learned.offset.abs().max() <= 0.5
    moved = (learned.rounded().integers.int() - quantize_affine(exact, 3, 64).integers.int()).abs()
    assert 0 < moved.max() <= 3


def test_learned_rounding_keeps_the_best_step(new_model, context, monkeypatch):
    """Every step is a bad one here, so what each block started from is kept: rounding to nearest."""
    monkeypatch.setattr(LearnedRounding, "step", lambda self, *_: self.offset.fill_(0.5))
    model = new_model("llama")
    changed = TECHNIQUES["autoround"].apply(model, context)
    for name, layer in linear_layers(model).items():
        plain = quantize_affine(layer.weight.detach(), 4, 32)
        assert torch.equal(changed.get_submodule(name).tensor.integers, plain.integers)


TECHNIQUES = {
    "gptq": GPTQ(bits=4, group_size=32, samples=4, length=64),
    "gptq-other": GPTQ(
        bits=3,
        group_size=0,
        samples=4,
        length=64,
        symmetric=True,
        range="mse",
        static_groups=False,
        true_sequential=False,
    ),
    "awq": AWQ(bits=4, group_size=32, samples=4, length=64),
    "autoround": AutoRound(bits=4, group_size=32, samples=4, length=64, iterations=3, batch=2),
}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_layout(name, layout, new_model, context, story):
    model, technique = new_model(layout), TECHNIQUES[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    changed = technique.apply(model, context)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    layers = [module for module in changed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) >= 12
    assert {layer.tensor.bits for layer in layers} == {technique.bits}
    assert context.record.calibration_tokens == 4 * 64
    with torch.no_grad():
        exact = model(story.ids[None, :96]).logits
        found = changed(story.ids[None, :96]).logits
    agreement = torch.cosine_similarity(exact, found, -1).mean()
    assert agreement > 0.7


def test_scales_only_leaves_the_function_unchanged(layout, new_model, context, story):
    model = new_model(layout)
    scaled = dataclasses.replace(TECHNIQUES["awq"], scales_only=True).apply(model, context)
    assert not any(isinstance(module, PackedLinear) for module in scaled.modules())
    with torch.no_grad():
        exact, found = (one(story.ids[None, :96]).logits for one in (model, scaled))
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=2e-3 * float(exact.abs().max()))
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), scaled.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gptq", "autoround"])
def test_scales_of_awq_under_another_technique(name, new_model, context, story):
    """What is rounded behind the scales is another matrix, and as good a one."""
    model, technique = new_model("llama"), TECHNIQUES[name]
    scaled = dataclasses.replace(TECHNIQUES["awq"], scales_only=True).apply(model, context)
    both, alone = technique.apply(scaled, context), technique.apply(model, context)
    layer = "model.layers.0.mlp.down_proj"
    assert not torch.equal(*(one.get_submodule(layer).tensor.integers for one in (both, alone)))
    with torch.no_grad():
        exact, found = (one(story.ids[None, :96]).logits for one in (model, both))
    assert torch.cosine_similarity(exact, found, -1).mean() > 0.7


def test_true_sequential_sees_what_rounded_layers_give(new_model, context):
    """Query, key and value read what no layer of the block has touched; the output projection reads them."""
    technique = dataclasses.replace(TECHNIQUES["gptq"], bits=2)
    changed = [
        dataclasses.replace(technique, true_sequential=one).apply(new_model("llama"), context)
        for one in (True, False)
    ]
    for kind, same in (("q_proj", True), ("o_proj", False)):
        pair = [one.get_submodule(f"model.layers.0.self_attn.{kind}").tensor.integers for one in changed]
        assert torch.equal(*pair) == same


@pytest.mark.parametrize("name", ["gptq", "awq", "autoround"])
def test_activations_that_are_not_finite_are_left_out_and_said(name, new_model, context, story, monkeypatch):
    """One token of the second sample is infinite: the others decide, and the row says so."""
    model, technique = new_model("llama"), TECHNIQUES[name]
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[255] = torch.inf
    ids = story.ids.clone()
    ids[64 + 5] = 255
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda *_: dataclasses.replace(story, ids=ids))
    changed = technique.apply(model, context)
    assert any("left out" in note for note in context.record.notes)
    layers = [module for module in changed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == len(linear_layers(model))
    with torch.no_grad():
        exact, found = (one.base_model(story.ids[None, :96]).last_hidden_state for one in (model, changed))
    assert torch.cosine_similarity(exact, found, -1).mean() > 0.7
    monkeypatch.setattr(
        calibration.corpora, "tokenize", lambda *_: dataclasses.replace(story, ids=torch.full_like(ids, 255))
    )
    with pytest.raises(CalibrationError, match="finite activations; use a model whose outputs are numbers"):
        technique.apply(model, context)


def test_damping_that_was_raised_is_said(new_model, context, monkeypatch):
    monkeypatch.setattr(
        gptq_module, "inverse_factor", lambda hessian, damping: (torch.eye(len(hessian)), 0.1)
    )
    TECHNIQUES["gptq"].apply(new_model("llama"), context)
    assert "model.layers.0.self_attn.q_proj: damping raised to 0.1." in context.record.notes


def test_the_seed_chooses_the_samples(new_model, context):
    chosen = [TECHNIQUES["gptq"].draw(dataclasses.replace(context, seed=seed), 4096) for seed in (0, 0, 1)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_calibration_that_does_not_fit(new_model, context):
    with pytest.raises(
        CalibrationError, match=r"tokens for calibration, enough for \d+ samples of 512, not 64"
    ):
        GPTQ(group_size=32).apply(new_model("llama"), context)
    with pytest.raises(
        CalibrationError, match="length=5000 is longer than the 4096 tokens the model can see"
    ):
        GPTQ(group_size=32, length=5000).apply(new_model("llama"), context)
    with pytest.raises(RecipeError, match="does not divide"):
        GPTQ(group_size=48).apply(new_model("llama"), context)


def test_calibrating_on_the_evaluation_text_is_asked_for_by_name(byte_tokenizer):
    context = Context(tokenizer=byte_tokenizer, record=Record())
    with pytest.raises(CorpusError, match="not for calibration"):
        GPTQ(corpus="wiki").draw(context, 4096)
    drawn = GPTQ(corpus="wiki.evaluation", samples=2, length=64).draw(context, 4096)
    assert torch.equal(drawn.flatten(), tokenize("wiki", byte_tokenizer).ids[:128])


@pytest.mark.parametrize(
    "text",
    [
        "quantize.gptq:bits=9",
        "quantize.gptq:damping=0",
        "quantize.gptq:samples=0",
        "quantize.gptq:range=best",
        "quantize.awq:bits=1",
        "quantize.autoround:iterations=0",
    ],
)
def test_settings_out_of_range(text):
    with pytest.raises(RecipeError):
        parse(text)


def test_recipes_name_bits_and_group_first():
    text = "quantize.gptq:bits=3,group_size=64,samples=32,range=mse"
    assert str(parse(text)) == text
    assert str(parse("quantize.awq")) == "quantize.awq:bits=4,group_size=64"
