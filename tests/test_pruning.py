"""Unstructured and semi-structured pruning: by hand, exact counts, five layouts, and joint with quantization."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.storage.layers import unpacked
from edgelab.techniques import calibration
from edgelab.techniques.calibration import Calibrated
from edgelab.techniques.observing import input_sizes
from edgelab.techniques.pruning.masks import SparsityError, keep_mask
from edgelab.techniques.pruning.measured import sensitivity, sparsity_table
from edgelab.techniques.pruning.owl import layer_sparsities, outlier_share
from edgelab.techniques.pruning.sparsegpt import sparsegpt
from edgelab.techniques.pruning.wanda import wanda_scores
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.techniques.sensitivity import MEASURES


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


MEASURED = ["prune.wanda:by_layer=measured", "prune.sparsegpt:by_layer=measured"]
FEW = "samples=2,length=64"


def rows_of(model) -> int:
    """What a count may miss, where all rows of a layer lose as many: less than the rows of the narrowest layer."""
    return min(layer.out_features for layer in linear_layers(model).values())


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma", "phi", "stablelm"])
@pytest.mark.parametrize("method", MEASURED)
def test_measured_sparsity_differs_by_layer_and_keeps_the_whole(layout, method, new_model, context):
    model = new_model(layout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = parse(f"{method},{FEW}").apply(model, context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    counts, layers = zeros(pruned), linear_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    assert 0 <= sum(counts.values()) - total // 2 < rows_of(model)
    assert len({count / layers[name].weight.numel() for name, count in counts.items()}) > 1
    table = sparsity_table(model, parse(f"{method},{FEW}").techniques[0].draw(context, 64), "fisher", context)
    uniform = table.costs_at(np.array([out * row // 2 for out, row in table.shapes])).sum()
    assert 0 < context.record.numbers["predicted_kld"] <= uniform
    assert torch.isfinite(pruned(torch.arange(2, 40)[None]).logits).all()


@pytest.mark.parametrize("method", MEASURED)
def test_measured_sparsity_in_a_model_of_uneven_widths(method, new_model, context):
    uneven = "prune.channels:share=0.3,by=magnitude,by_layer=global,multiple=8"
    model = new_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 0.9  # so that more of its channels go
    narrower = parse(uneven).apply(model, context)
    widths = {block.mlp.up_proj.out_features for block in narrower.model.layers}
    assert len(widths) == 2
    counts = zeros(parse(f"{method},sparsity=0.3,sensitivity=kl,{FEW}").apply(narrower, context))
    due = sum(
        layer.out_features * round(0.3 * layer.in_features) for layer in linear_layers(narrower).values()
    )
    assert 0 <= sum(counts.values()) - due < rows_of(narrower)


@pytest.mark.parametrize("how", ["fisher", "kl"])
def test_layers_that_change_nothing_lose_most(how, new_model, context):
    model = new_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-6  # the whole MLP of this block, then
    recipe = f"prune.wanda:by_layer=measured,sensitivity={how},{FEW}"
    counts, layers = zeros(parse(recipe).apply(model, context)), linear_layers(model)
    shares = {name: count / layers[name].weight.numel() for name, count in counts.items()}
    idle = [share for name, share in shares.items() if "layers.1.mlp" in name]
    busy = [share for name, share in shares.items() if "layers.1.mlp" not in name]
    assert min(idle) > 0.89 > max(busy)


@pytest.mark.parametrize("method", MEASURED)
def test_nothing_removed_where_it_is_measured_is_the_identity(method, new_model, context):
    model = new_model("llama")
    pruned = parse(f"{method},sparsity=0,{FEW}").apply(model, context)
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert context.record.numbers["predicted_kld"] == 0


def test_candidates_of_a_layer_are_what_the_masks_of_wanda_leave(new_model, context):
    model, tokens = new_model("llama"), torch.arange(2, 66).view(2, 32)
    table = sparsity_table(model, tokens, "activation", context, (0.0, 0.3, 0.7))
    sizes = input_sizes(model, table.names, tokens, lambda done, total: None)
    for name, cost in zip(table.names, table.cost, strict=True):
        scores = wanda_scores(model.get_submodule(name).weight.detach(), sizes[name])
        gone = [~keep_mask(scores, sparsity) for sparsity in table.sparsities]
        assert cost == pytest.approx([float(scores[mask].square().sum()) for mask in gone], rel=1e-3)
        kept = [int((~mask).sum()) for mask in gone]
        assert table.amounts[table.names.index(name)].tolist() == kept


def test_what_is_predicted_for_a_small_sparsity_is_what_is_measured(new_model, context):
    model = new_model("llama")
    tokens = torch.randint(2, 300, (24, 48), generator=torch.Generator().manual_seed(1))
    fisher, kl = (sparsity_table(model, tokens, each, context, (0.1, 0.2)).cost for each in ("fisher", "kl"))
    assert 0.6 < np.median(fisher / kl) < 1.5
    assert np.corrcoef(np.log(fisher).flatten(), np.log(kl).flatten())[0, 1] > 0.8


def test_a_second_sparsity_reads_the_table(new_model, context, monkeypatch):
    model = new_model("llama")
    parse(f"prune.wanda:by_layer=measured,{FEW}").apply(model, context)
    monkeypatch.setitem(MEASURES, "fisher", lambda *_: pytest.fail("measured again"))
    context.record.notes.clear()
    parse(f"prune.sparsegpt:sparsity=0.6,by_layer=measured,{FEW}").apply(model, context)
    assert context.record.notes[0] == "Sensitivities were read from an earlier run."
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        parse("prune.wanda:by_layer=measured,samples=1,length=64").apply(model, context)


def test_sensitivities_of_every_layer_beside_their_predictors(new_model, context, monkeypatch):
    model = new_model("llama")
    options = {"sparsities": (0.3, 0.6), "samples": 2, "length": 64}
    frame = sensitivity(model, context, **options)
    assert len(frame) == 2 * len(linear_layers(model)) and set(frame["sparsity"]) == {0.3, 0.6}
    assert (frame.loc[frame["sparsity"] == 0.3, list(MEASURES)].to_numpy() > 0).all()
    row = frame[(frame["name"] == "model.layers.1.mlp.down_proj") & (frame["sparsity"] == 0.6)].iloc[0]
    assert (row["block"], row["kind"]) == (1, "down_proj")
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    tokens = Calibrated(samples=2, length=64).draw(context, 64)
    sizes = input_sizes(model, [row["name"]], tokens, lambda done, total: None)[row["name"]]
    gone = ~keep_mask(wanda_scores(weight, sizes), 0.6)
    assert row["magnitude"] == pytest.approx(float(weight[gone].square().sum()), rel=1e-5)
    for each in MEASURES:
        monkeypatch.setitem(MEASURES, each, lambda *_: pytest.fail("measured again"))
    pd.testing.assert_frame_equal(sensitivity(model, context, **options), frame)
    with pytest.raises(RecipeError, match="quantized already"):
        sensitivity(parse("quantize.rtn:bits=4").apply(model, context), context, **options)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("prune.wanda:sparsity=1.5", "outside 0 to 1"),
        ("prune.magnitude:sparsity=-0.1", "outside 0 to 1"),
        ("prune.wanda:pattern=2:4,sparsity=0.6", "always removes half"),
        ("prune.magnitude:pattern=2:4,per=row", "its own groups"),
        ("prune.wanda:pattern=4:8,by_layer=owl", "needs pattern=unstructured"),
        ("prune.wanda:by_layer=owl,sparsity=0.95", "leaves 0 to 1"),
        (
            "prune.wanda:by_layer=owl,sparsity=0.1",
            "leaves 0 to 1",
        ),  # a block may be twice owl_lambda from the mean
        ("prune.sparsegpt:pattern=2:4,by_layer=measured", "by_layer=measured needs pattern=unstructured"),
        ("prune.wanda:by_layer=measured,sparsity=0.95", "above 0.9"),
        ("prune.sparsegpt:damping=0", "outside 0 to 1"),
        ("prune.wanda:owl_lambda=0.04", "belong to by_layer=owl"),
        ("prune.wanda:by_layer=owl,sensitivity=kl", "belongs to by_layer=measured"),
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


@pytest.mark.parametrize("text", ["wanda:", "sparsegpt:", "sparsegpt:bits=4,group_size=32,"])
def test_a_layer_that_no_text_reaches_loses_its_smallest_weights(text, new_model, context):
    """As an expert that is never chosen does."""
    model = new_model("llama")
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(8))
    model.model.unused = torch.nn.Linear(64, 48, bias=False)
    with torch.no_grad():
        model.model.unused.weight.copy_(weight)
    layer = parse(f"prune.{text}samples=2,length=64").apply(model, context).model.unused
    pruned = layer.tensor.dequantize() if "bits" in text else layer.weight
    assert int((pruned == 0).sum()) >= weight.numel() // 2
    assert weight[pruned == 0].abs().mean() < 0.6 * weight[pruned != 0].abs().mean()
    assert context.record.notes[-1].endswith("does not reach lose their smallest weights: model.unused.")
