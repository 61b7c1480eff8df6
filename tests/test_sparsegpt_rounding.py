"""SparseGPT that prunes and rounds in one pass: GPTQ where nothing goes, exact zeros where half does, and packed."""

import pytest
import torch

from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.storage.layers import PackedLinear
from edgelab.techniques import calibration
from edgelab.techniques.pruning.sparsegpt import Rounding, sparsegpt
from edgelab.techniques.quantization.gptq import gptq
from edgelab.techniques.quantization.ranges import find_grid
from edgelab.techniques.quantization.rtn import GroupSizeError, quantize_affine


def problem(seed: int, rows: int = 24, inputs: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and the mean of x x^T of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator)
    tokens = torch.randn(400, inputs, generator=generator) @ mixing
    return torch.randn(rows, inputs, generator=generator), tokens.T @ tokens / len(tokens)


def minmax(bits: int, group_size: int) -> Rounding:
    return Rounding(bits, group_size, lambda groups, first: find_grid(groups, bits, False))


def error(weight: torch.Tensor, other: torch.Tensor, products: torch.Tensor) -> float:
    return float(((weight - other) @ products * (weight - other)).sum())


@pytest.mark.parametrize("group_size", [32, 64, 192])
def test_nothing_removed_is_gptq(group_size):
    """Columns in order, grids found when a group is due; a group of 192 is wider than what is settled at a time."""
    weight, products = problem(0)
    joint = sparsegpt(weight, products, 0.0, rounding=minmax(4, group_size))
    alone, _ = gptq(
        weight, products, 4, group_size, lambda groups, which=None: find_grid(groups, 4, False), False, False
    )
    assert torch.equal(joint.integers, alone.integers) and torch.equal(joint.scale, alone.scale)
    assert torch.equal(joint.zero_point, alone.zero_point)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_half_is_zero_exactly_and_the_error_is_that_of_one_pass(pattern):
    """Rounding after pruning leaves the errors of rounding to nobody."""
    weight, products = problem(1)
    joint = sparsegpt(weight, products, 0.5, pattern, rounding=minmax(4, 64))
    values = joint.dequantize()
    assert int((values == 0).sum()) >= weight.numel() // 2
    if pattern != "unstructured":
        of = int(pattern[-1])
        assert ((values == 0).unflatten(1, (-1, of)).sum(-1) >= of // 2).all()
    pruned = sparsegpt(weight, products, 0.5, pattern)
    after = quantize_affine(pruned, 4, 64).dequantize()
    assert error(weight, pruned, products) < error(weight, values, products) < error(weight, after, products)


def test_a_recipe_saves_packed_layers_and_stores_them_without_zeros(tiny, monkeypatch, story):
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    settings = "samples=2,length=64,group_size=32,bits=4"
    found = {}
    for text in (f"prune.sparsegpt:{settings}", f"prune.sparsegpt:{settings} + prune.store"):
        folder = variants.build(parse(text), resolve(str(tiny)), 0, lambda done, total: None)
        found[text] = variants.load(folder), variants.read_about(folder)["size"]["linear_bytes"]
    (joint, dense), (stored, sparse) = found.values()
    layers = [(name, layer) for name, layer in joint.named_modules() if isinstance(layer, PackedLinear)]
    assert layers and sparse < dense
    for name, layer in layers:
        weight = layer.tensor.dequantize()
        assert int((weight == 0).sum()) >= weight.numel() // 2
        assert torch.equal(weight, stored.get_submodule(name).tensor.dequantize())


def test_settings(new_model, byte_tokenizer):
    with pytest.raises(
        RecipeError, match=r"group_size=32,range=mse belong to rounding; give bits, as in bits=4"
    ):
        parse("prune.sparsegpt:group_size=32")
    with pytest.raises(RecipeError, match="bits=9"):
        parse("prune.sparsegpt:bits=9")
    context = Context(tokenizer=byte_tokenizer, record=Record())
    with pytest.raises(GroupSizeError):
        parse("prune.sparsegpt:bits=4,group_size=40").apply(new_model("llama"), context)
