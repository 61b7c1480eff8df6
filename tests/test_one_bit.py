"""Ternary and binary weights: tensors and sizes by hand, the least squares that they claim, kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelab.recipes import Context, RecipeError, parse
from edgelab.runtimes import load
from edgelab.runtimes.eager import Int4Linear, kernel_for
from edgelab.storage import sizes, variants
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.quantization.one_bit import Binary, Ternary, quantize_binary, quantize_ternary
from edgelab.techniques.quantization.rtn import GroupSizeError, linear_layers

ROUNDED = {"ternary": quantize_ternary, "binary": quantize_binary}
WEIGHTS = arrays(
    "float32", st.tuples(st.integers(1, 4), st.sampled_from([8, 16])), elements=st.floats(-64, 64, width=16)
).map(torch.from_numpy)


def test_ternary_by_hand():
    # Mean magnitudes 1 and 2; half of that is the edge between 0 and 1, and a tie goes to the even 0.
    tensor = quantize_ternary(torch.tensor([[0.25, -0.5, 0.75, -2.5, 0.0, 0.0, 4.0, -4.0]]), group_size=4)
    assert tensor.scale.tolist() == [[1.0, 2.0]]
    assert tensor.integers.tolist() == [[2, 2, 3, 1, 2, 2, 3, 1]]
    assert tensor.dequantize().tolist() == [[0.0, 0.0, 1.0, -1.0, 0.0, 0.0, 2.0, -2.0]]
    assert (tensor.bits, tensor.zero_point, tensor.scale.dtype) == (2, None, torch.float16)


def test_binary_by_hand():
    tensor = quantize_binary(torch.tensor([[0.25, -0.5, 0.75, -2.5], [0.0, 0.0, 4.0, -4.0]]), group_size=0)
    assert tensor.scale.tolist() == [[2.0], [4.0]]
    assert tensor.integers.tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]
    assert tensor.dequantize().tolist() == [[1.0, -1.0, 1.0, -1.0], [2.0, 2.0, 2.0, -2.0]]
    assert (tensor.bits, tensor.zero_point, tensor.scale.dtype) == (1, None, torch.float16)


@given(WEIGHTS, st.sampled_from([0, 4, 8]))
def test_the_scale_of_signs_is_the_least_squares_one(weight, group_size):
    """sum (w - a sign(w))^2 as a function of a has its minimum where the stored scale says, but for float16."""
    tensor = quantize_binary(weight, group_size)
    groups = weight.double().unflatten(-1, (tensor.scale.shape[1], -1))
    signs = torch.where(groups >= 0, 1.0, -1.0).double()
    best = torch.linalg.vecdot(groups, signs) / signs.square().sum(-1)
    stored = tensor.scale.double() / 2
    assert ((stored - best).abs() <= best * 2**-10).all()


@given(WEIGHTS, st.sampled_from([0, 4, 8]), st.sampled_from(["ternary", "binary"]))
def test_levels_and_symmetry(weight, group_size, kind):
    """Only the levels that are there; the negative matrix has the negative levels, where no weight is zero."""
    tensor = ROUNDED[kind](weight, group_size)
    assert set(tensor.integers.flatten().tolist()) <= ({1, 2, 3} if kind == "ternary" else {0, 1})
    opposite = ROUNDED[kind](-weight, group_size).dequantize()
    decided = weight != 0
    assert torch.equal(opposite[decided], -tensor.dequantize()[decided])


@pytest.mark.parametrize("kind", ROUNDED)
def test_groups_of_zeros_stay_zero(kind):
    weight = torch.zeros(2, 8)
    weight[1, 4:] = torch.tensor([0.5, -0.5, 0.5, 0.5])
    tensor = ROUNDED[kind](weight, 4)
    assert torch.equal(tensor.dequantize(), weight)
    assert not ROUNDED[kind](torch.zeros(2, 8), 4).dequantize().any()


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_a_variant_comes_back_and_has_the_size_counted_by_hand(tiny_reference, tmp_path, kind, group_size):
    model = tiny_reference.model
    rounded = parse(f"quantize.{kind}:group_size={group_size}").techniques[0].apply(model, Context())
    variants.save(rounded, tmp_path / "variant", {"recipe": "", "model": "", "model_sha": ""})
    back = variants.load(tmp_path / "variant")
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.equal(back(ids).logits, rounded(ids).logits)
    size = sizes.measure_size(rounded, *variants.stored_tensors(rounded))
    # Two blocks: q and o 64 x 64, k and v 32 x 64, gate and up 192 x 64, down 64 x 192.
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64)
    bits = {"ternary": 2, "binary": 1}[kind]
    groups = (
        weights // 64 if group_size else 2 * (64 + 64 + 32 + 32 + 192 + 192 + 64)
    )  # down has three in a row
    assert size.linear_bytes == weights * bits // 8
    assert size.scales_bytes == 2 * groups


@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("kind", ROUNDED)
def test_the_int4_kernel_takes_them(kind, group_size):
    """bfloat16 roundings of inputs, scales, offsets and outputs: below 0.5 % in 2-norm, as `test_kernels` derives."""
    generator = torch.Generator().manual_seed(3)
    tensor = ROUNDED[kind](torch.randn(64, 576, generator=generator), group_size)
    assert kernel_for(tensor) is Int4Linear
    inputs = torch.randn(16, 576, generator=generator)
    twin = inputs @ tensor.dequantize().T
    outputs = Int4Linear(tensor, None)(inputs)
    assert 0 < (outputs - twin).norm() <= 0.005 * twin.norm()


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_the_runtime_names_the_kernel(tiny_reference, tmp_path, kind):
    rounded = parse(f"quantize.{kind}").techniques[0].apply(tiny_reference.model, Context())
    variants.save(rounded, tmp_path / "variant", {"recipe": "", "model": "", "model_sha": ""})
    bits = {"ternary": 2, "binary": 1}[kind]
    assert f"int4pack_mm bf16 ({bits} bits unpacked to 4)" in load("torch", tmp_path / "variant").kernel


@pytest.mark.parametrize("technique", [Ternary(group_size=32), Binary(group_size=32)])
def test_every_linear_layer_of_every_layout(new_model, layout, technique):
    model, seen = new_model(layout), []
    rounded = technique.apply(model, Context(progress=lambda *pair: seen.append(pair)))
    names = list(linear_layers(model))
    assert [name for name, m in rounded.named_modules() if isinstance(m, PackedLinear)] == names
    assert seen == [(done, len(names)) for done in range(1, len(names) + 1)]
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in names)
    name, quantize = names[-1], quantize_ternary if isinstance(technique, Ternary) else quantize_binary
    expected = quantize(model.get_submodule(name).weight.detach(), 32).dequantize()
    assert torch.equal(rounded.get_submodule(name).tensor.dequantize(), expected)
    with torch.inference_mode():
        assert rounded(torch.arange(2, 40)[None]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["ternary", "binary"])
def test_bad_settings(tiny_reference, kind):
    with pytest.raises(RecipeError, match=rf"^quantize\.{kind}:group_size=-1 is negative; 0 means one group"):
        parse(f"quantize.{kind}:group_size=-1")
    with pytest.raises(
        GroupSizeError, match=r"group_size=48 does not divide the 64 and 192 inputs .*; use 32, 64, 0"
    ):
        parse(f"quantize.{kind}:group_size=48").techniques[0].apply(tiny_reference.model, Context())
    rounded = parse(f"quantize.{kind}").techniques[0].apply(tiny_reference.model, Context())
    with pytest.raises(RecipeError, match="quantized already"):
        parse(f"quantize.{kind}").techniques[0].apply(rounded, Context())
