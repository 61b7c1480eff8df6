"""Unstructured and semi-structured pruning: by hand, exact counts, five layouts, and joint with quantization."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.storage.layers import unpacked
from edgelab.techniques import calibration
from edgelab.techniques.pruning.masks import SparsityError, keep_mask
from edgelab.techniques.pruning.owl import layer_sparsities, outlier_share
from edgelab.techniques.pruning.sparsegpt import sparsegpt
from edgelab.techniques.pruning.wanda import wanda_scores
from edgelab.techniques.quantization.rtn import linear_layers


@pytest.fixture
def context(byte_tokenizer, monkeypatch, story) -> Context:
    """A context whose calibration text is the story of the tests."""
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    return Context(tokenizer=byte_tokenizer, record=Record())


def zeros(model) -> dict[str, int]:
    return {name: int((layer.weight == 0).sum()) for name, layer in linear_layers(model).items()}


# Masks


@given(
    values=st.lists(st.integers(0, 3), min_size=48, max_size=48),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    per=st.sampled_from(["row", "layer"]),
)
def test_counts_are_exact_in_spite_of_ties(values, sparsity, per):
    scores = torch.tensor(values, dtype=torch.float32).view(4, 12)
    mask = keep_mask(scores, sparsity, per=per)
    assert int((~mask).sum()) == (4 * round(12 * sparsity) if per == "row" else round(48 * sparsity))
    if per == "row":
        assert (mask.sum(1) == 12 - round(12 * sparsity)).all()
        for row, kept in zip(scores, mask, strict=True):
            assert not kept.any() or kept.all() or row[kept].min() >= row[~kept].max()


@given(values=st.lists(st.integers(0, 3), min_size=32, max_size=32), pattern=st.sampled_from(["2:4", "4:8"]))
def test_a_pattern_holds_in_every_group(values, pattern):
    stay, of = map(int, pattern.split(":"))
    mask = keep_mask(torch.tensor(values, dtype=torch.float32).view(2, 16), 0.5, pattern)
    assert (mask.unflatten(1, (-1, of)).sum(-1) == stay).all()


@given(seed=st.integers(0, 99), less=st.floats(0, 0.9), more=st.floats(0, 0.9))
def test_what_goes_at_a_lower_sparsity_goes_at_a_higher_one(seed, less, more):
    less, more = sorted((less, more))
    scores = torch.randint(0, 5, (3, 16), generator=torch.Generator().manual_seed(seed))
    assert not (keep_mask(scores, more) & ~keep_mask(scores, less)).any()


# Scores


def test_wanda_keeps_the_small_weight_of_the_large_input():
    weight = torch.tensor([[3.0, 1.0]])
    assert keep_mask(weight.abs(), 0.5).tolist() == [[True, False]]
    assert keep_mask(wanda_scores(weight, torch.tensor([1.0, 5.0])), 0.5).tolist() == [[False, True]]


def test_the_neighbour_makes_up_for_what_goes():
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    weight = torch.tensor([[1.0, 1.0]])
    pruned = sparsegpt(weight, hessian, 0.5, damping=1e-9)
    torch.testing.assert_close(pruned, torch.tensor([[0.0, 1.5]]))
    moved = (pruned - weight)[0]
    assert float(moved @ hessian @ moved) / 2 == pytest.approx(0.75)


@given(seed=st.integers(0, 200), pattern=st.sampled_from(["unstructured", "2:4", "4:8"]))
@settings(max_examples=25)
def test_sparsegpt_has_exact_counts_and_a_smaller_error_than_its_mask_alone(seed, pattern):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 160, generator=generator)
    inputs = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    hessian = inputs.T @ inputs / len(inputs)
    pruned = sparsegpt(weight, hessian, 0.5, pattern)
    mask = pruned != 0
    assert int((~mask).sum()) == 480
    if pattern != "unstructured":
        stay, of = map(int, pattern.split(":"))
        assert (mask.unflatten(1, (-1, of)).sum(-1) == stay).all()

    def error(other):
        moved = (other - weight).double()
        return float(((moved @ hessian.double()) * moved).sum())

    assert error(pruned) < error(weight * mask)


def test_without_correlation_sparsegpt_removes_what_wanda_scores_lowest():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    squares = torch.rand(32, generator=torch.Generator().manual_seed(4)) + 0.5
    pruned = sparsegpt(weight, torch.diag(squares), 0.5, "2:4", damping=1e-9)
    torch.testing.assert_close(pruned, weight * keep_mask(wanda_scores(weight, squares.sqrt()), 0.5, "2:4"))


def test_owl_by_hand():
    assert layer_sparsities([1, 3, 2], 0.5, 0.08, [1, 1, 1]) == pytest.approx([0.58, 0.42, 0.50])
    assert layer_sparsities([2, 2], 0.5, 0.08, [5, 9]) == [0.5, 0.5]  # no division by zero
    heavier = layer_sparsities([1, 3], 0.5, 0.08, [3, 1])
    assert (3 * heavier[0] + heavier[1]) / 4 == pytest.approx(0.5)
    assert outlier_share(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, 1, 91]), 5) == pytest.approx(0.1)


# Models

METHODS = ("prune.magnitude", "prune.wanda:samples=2,length=64", "prune.sparsegpt:samples=2,length=64")


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma", "phi", "stablelm"])
@pytest.mark.parametrize("method", METHODS)
def test_half_of_every_layer_goes(layout, method, new_model, context):
    model = new_model(layout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = parse(method).apply(model, context)
    sizes = {name: layer.weight.numel() for name, layer in linear_layers(model).items()}
    assert zeros(pruned) == {name: size // 2 for name, size in sizes.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(2, 40)[None]
    assert torch.isfinite(pruned(ids).logits).all()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_removed_is_the_identity(method, new_model, context):
    model = new_model("llama")
    name, _, settings_ = method.partition(":")
    pruned = parse(f"{name}:sparsity=0,{settings_}".rstrip(",")).apply(model, context)
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_global_ranking_has_the_sparsity_of_all_layers_together(new_model, context):
    model = new_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data *= 0.01
    counts = zeros(parse("prune.magnitude:sparsity=0.3,per=global").apply(model, context))
    total = sum(layer.weight.numel() for layer in linear_layers(model).values())
    assert sum(counts.values()) == round(0.3 * total)
    small = model.model.layers[0].mlp.up_proj.weight
    assert counts["model.layers.0.mlp.up_proj"] == small.numel()


def test_owl_moves_sparsity_between_blocks_and_keeps_the_whole(new_model, context):
    model = new_model("llama")
    pruned = parse("prune.wanda:by_layer=owl,owl_lambda=0.2,owl_outlier=2,samples=2,length=64").apply(
        model, context
    )
    counts = zeros(pruned)
    by_block = [
        sum(count for name, count in counts.items() if f"layers.{place}." in name) for place in (0, 1)
    ]
    total = sum(layer.weight.numel() for layer in linear_layers(model).values())
    assert by_block[0] != by_block[1]
    rows = sum(layer.out_features for layer in linear_layers(model).values())
    assert abs(sum(by_block) - total / 2) <= rows  # each row removes a whole number of weights


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("prune.wanda:sparsity=1.5", "outside 0 to 1"),
        ("prune.magnitude:sparsity=-0.1", "outside 0 to 1"),
        ("prune.wanda:pattern=2:4,sparsity=0.6", "always removes half"),
        ("prune.magnitude:pattern=2:4,per=row", "its own groups"),
        ("prune.wanda:pattern=4:8,by_layer=owl", "needs pattern=unstructured"),
        ("prune.wanda:by_layer=owl,sparsity=0.95", "leaves 0 to 1"),
        ("prune.sparsegpt:damping=0", "outside 0 to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(recipe, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(recipe)


def test_a_pattern_that_does_not_divide_names_the_layer(new_model, context):
    with pytest.raises(SparsityError, match=r"layers.0.mlp.down_proj has 190 inputs"):
        parse("prune.wanda:pattern=4:8").apply(new_model("llama", intermediate_size=190), context)


def test_quantized_layers_are_refused(new_model, context):
    with pytest.raises(RecipeError, match="quantized already"):
        parse("quantize.rtn:bits=4 + prune.magnitude").apply(new_model("llama"), context)


# Joint with quantization

QUANTIZERS = [
    "quantize.rtn:bits=4,group_size=32",
    "quantize.rtn:bits=3,group_size=0,symmetric=true",
    "quantize.rtn:bits=4,group_size=32,range=mse",
    "quantize.rtn:bits=8,group_size=0,range=percentile",
    "quantize.awq:bits=4,group_size=32,samples=2,length=64",
    "quantize.mixed:bits=4,group_size=32,samples=2,length=64",
    "quantize.smooth:samples=2,length=64",
    "quantize.static:samples=2,length=64",
    "quantize.dynamic",
    "quantize.nf4:group_size=32",
    "quantize.ternary:group_size=32",
    "quantize.fp16",
]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_quantizes_behind_pruning_keeps_every_zero(quantizer, new_model, context):
    pruned = parse("prune.magnitude").apply(new_model("llama"), context)
    rounded = unpacked(parse(quantizer).apply(pruned, context))
    for name, layer in linear_layers(pruned).items():
        after = rounded.get_submodule(name).weight
        assert not after[layer.weight == 0].any(), name


@pytest.mark.parametrize(
    "technique",
    ["quantize.gptq", "quantize.hqq", "quantize.autoround", "quantize.codebook", "quantize.binary", "qat",
     "prune.sparsegpt", "prune.hidden", "lowrank.svd"],
)  # fmt: skip
def test_what_would_fill_zeros_in_is_refused(technique, new_model, context):
    pruned = parse("prune.magnitude").apply(new_model("llama"), context)
    with pytest.raises(RecipeError, match=rf"{technique} would fill in the zeros"):
        parse(technique).apply(pruned, context)


def test_a_variant_on_disk_still_knows_that_it_is_pruned(tiny):
    folder = variants.build(parse("prune.magnitude"), resolve(str(tiny)), 0, lambda done, total: None)
    with pytest.raises(RecipeError, match="would fill in the zeros"):
        parse("quantize.hqq").apply(variants.load(folder), Context())
