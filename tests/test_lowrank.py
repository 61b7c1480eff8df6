"""Low rank: the error is what was left out, whitened beats plain where inputs lean, factors go through the disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab import runtimes
from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.techniques import calibration
from edgelab.techniques.lowrank import break_even, factorize

IDS = torch.arange(2, 66)[None]


@pytest.fixture
def context(byte_tokenizer, monkeypatch, story) -> Context:
    """A context whose calibration text is the story of the tests."""
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    return Context(tokenizer=byte_tokenizer, record=Record())


def leaning(tokens: int, inputs: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    return torch.randn(tokens, inputs, generator=generator) @ mixing


def output_error(weight, pair, inputs) -> float:
    moved = inputs.double() @ (weight.double() - pair.left @ pair.right).T
    return float(moved.square().sum() / len(inputs))


def test_break_even_by_hand():
    assert break_even(576, 576) == 287
    assert break_even(192, 576) == 143
    assert break_even(1536, 576) == 418


@given(seed=st.integers(0, 50), rank=st.integers(1, 12), plain=st.booleans())
@settings(max_examples=30)
def test_the_error_of_a_layer_is_the_sum_of_the_singular_values_left_out(seed, rank, plain):
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(seed))
    inputs = leaning(500, 24, seed)
    products = inputs.double().T @ inputs.double() / len(inputs)
    pair = factorize(weight, rank, None if plain else products)
    assert pair.left.shape == (20, rank) and pair.right.shape == (rank, 24)
    if plain:
        error = float((weight.double() - pair.left @ pair.right).square().sum())
        sizes = torch.linalg.svdvals(weight.double())
        assert error == pytest.approx(float(sizes[rank:].square().sum()), rel=1e-4)
    else:
        error = output_error(weight, pair, inputs)
        assert error <= output_error(weight, factorize(weight, rank), inputs) * (1 + 1e-6)
    assert error == pytest.approx(pair.left_out, rel=1e-4)


def test_inputs_of_too_few_tokens_are_no_obstacle():
    weight, inputs = torch.randn(16, 24), leaning(5, 24, 1)  # X X^T has rank 5
    pair = factorize(weight, 5, inputs.T @ inputs / 5)
    assert output_error(weight, pair, inputs) < 1e-6 * float((inputs @ weight.T).square().sum())


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma", "phi", "stablelm"])
@pytest.mark.parametrize("whitened", ["true", "false"])
def test_full_rank_is_the_identity_and_is_merged_back(layout, whitened, new_model, context):
    model = new_model(layout)
    recipe = f"lowrank.svd:share=4,whitened={whitened},samples=2,length=64"
    same = parse(recipe).apply(model, context)
    assert "merged back" in context.record.notes[0]
    assert not any(isinstance(module, torch.nn.Sequential) for module in same.modules())
    torch.testing.assert_close(same(IDS).logits, model(IDS).logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", ["llama", "phi"])
def test_factors_hold_the_share_that_was_asked_for(layout, new_model, context):
    model = new_model(layout)
    small = parse("lowrank.svd:share=0.5,samples=2,length=64").apply(model, context)
    for name, layer in small.named_modules():
        if isinstance(layer, torch.nn.Sequential):
            first, second = layer
            whole = model.get_submodule(name).weight.numel()
            held = first.weight.numel() + second.weight.numel()
            assert held <= 0.5 * whole < held + first.in_features + second.out_features
            assert (second.bias is None) == (model.get_submodule(name).bias is None) and first.bias is None


def numbers(model) -> int:
    """What the linear layers and factors of the blocks hold."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    )


ALLOCATED = "lowrank.svd:by_layer=allocated,samples=2,length=64"


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma", "phi", "stablelm"])
@pytest.mark.parametrize("whitened", ["true", "false"])
def test_allocated_ranks_hold_as_many_numbers_as_uniform_ones(layout, whitened, new_model, context):
    model = new_model(layout)
    uniform = parse(f"lowrank.svd:whitened={whitened},samples=2,length=64").apply(model, context)
    other = parse(f"{ALLOCATED},whitened={whitened}").apply(model, context)
    assert numbers(uniform) - 384 < numbers(other) <= numbers(uniform)  # 64 + 192 numbers in the largest rank
    ranks = {
        name: module.out_features for name, module in other.named_modules() if name.endswith("proj.0")
    } | {name: module.out_features for name, module in other.named_modules() if name.endswith("fc1.0")}
    assert len(set(ranks.values())) > 1
    assert context.record.numbers["predicted_kld"] > 0
    assert other(IDS).logits.isfinite().all()


def test_everything_allocated_is_the_model_itself(new_model, context):
    model = new_model("llama")
    same = parse(f"{ALLOCATED},share=1").apply(model, context)
    assert torch.equal(same(IDS).logits, model(IDS).logits)
    assert context.record.numbers["predicted_kld"] == 0


def test_layers_that_change_nothing_get_the_least_rank(new_model, context):
    model = new_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e-6
    small = parse(ALLOCATED).apply(model, context)
    for name, layer in model.model.layers[0].mlp.named_modules():
        if isinstance(layer, torch.nn.Linear):
            pair = small.get_submodule(f"model.layers.0.mlp.{name}")
            assert pair[0].out_features == int(0.05 * 64 * 192 / 256)


def test_uneven_widths_are_allocated(new_model, context):
    uneven = "prune.channels:share=0.3,by=magnitude,by_layer=global,multiple=8"
    model = new_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 0.9  # so that more of its channels go
    model = parse(uneven).apply(model, context)
    assert len({block.mlp.up_proj.out_features for block in model.model.layers}) == 2
    uniform, other = (
        parse(each).apply(model, context) for each in ("lowrank.svd:samples=2,length=64", ALLOCATED)
    )
    assert numbers(uniform) - 384 < numbers(other) <= numbers(uniform)


def test_whole_layers_and_factors_are_saved_and_loaded(tiny, context):
    recipe = parse(f"{ALLOCATED},share=0.8")
    folder = variants.build(recipe, resolve(str(tiny)), 0, lambda done, total: None)
    loaded = variants.load(folder)
    kinds = {type(loaded.get_submodule(f"model.layers.{place}.mlp.{name}_proj")) for place in (0, 1)
             for name in ("gate", "up", "down")}  # fmt: skip
    assert torch.nn.Sequential in kinds and loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize("tail", ["", " + quantize.rtn:bits=8,group_size=0"])
def test_factors_are_saved_loaded_and_quantized(tail, tiny):
    source = resolve(str(tiny))
    recipe = parse("lowrank.svd:share=0.5,whitened=false" + tail)
    folder = variants.build(recipe, source, 0, lambda done, total: None)
    loaded = variants.load(folder)
    from edgelab.reference import load

    made = recipe.apply(load(str(tiny)).model, Context())
    torch.testing.assert_close(loaded(IDS).logits, made(IDS).logits, atol=1e-5, rtol=1e-5)
    about = variants.read_description(folder)
    assert about.shapes["model.layers.0.mlp.up_proj.0"] == [24, 64]  # 0.5 * 64 * 192 / 256
    assert about.shapes["model.layers.0.mlp.up_proj.1"] == [192, 24]


def test_shares_that_mean_nothing_are_refused(new_model, context):
    with pytest.raises(RecipeError, match="above 0"):
        parse("lowrank.svd:share=0")
    with pytest.raises(RecipeError, match="at most 1"):
        parse("lowrank.svd:share=2,by_layer=allocated")
    with pytest.raises(RecipeError, match=r"leaves a layer of .* no rank"):
        parse("lowrank.svd:share=0.001,whitened=false").apply(new_model("llama"), context)


def test_engines_that_multiply_by_one_matrix_refuse_two(new_model):
    about = variants.describe(parse("lowrank.svd:whitened=false").apply(new_model("llama"), Context()))
    for engine in ("llamacpp", "onnxruntime", "openvino", "executorch", "litert"):
        assert "self_attn.q_proj" in runtimes.find(engine).refusal(about), engine


def test_a_layer_that_no_text_reaches_is_factorized_by_its_weights(new_model, context):
    """Whitened or not, a share holds for the whole model."""
    model = new_model("llama")
    model.model.unused = torch.nn.Linear(64, 48, bias=False)
    made = parse("lowrank.svd:share=0.5,samples=2,length=64").apply(model, context).model.unused
    rank = made[0].out_features
    pair = factorize(model.model.unused.weight, rank)
    torch.testing.assert_close(made[1].weight @ made[0].weight, (pair.left @ pair.right).float())
    assert rank == 13 and context.record.notes[-1].endswith("not their outputs: model.unused.")
