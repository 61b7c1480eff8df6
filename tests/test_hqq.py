"""HQQ: the authors' formula written out with their inverse scales, tensors by hand, and tiny models of all layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab.recipes import Context, RecipeError, parse
from edgelab.storage import variants
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.quantization.hqq import (
    HalfQuadratic,
    half_quadratic_zero_point,
    quantize_half_quadratic,
    shrink,
)
from edgelab.techniques.quantization.rtn import GroupSizeError, linear_layers, quantize_affine

IDS = torch.arange(2, 40)[None]


def authors_zero_point(rows, scale, zero, bits):
    """`optimize_weights_proximal_legacy` of the hqq package, value by value; its scale is one over ours."""
    zero, beta, best_error = list(zero), 10.0, 1e4
    for _ in range(20):
        total, count, moved = 0.0, 0, []
        for row, s, z in zip(rows, scale, zero, strict=True):
            terms = []
            for w in row:
                w_q = min(max(float(torch.round(torch.tensor(w * s + z))), 0), 2**bits - 1)
                w_r = (w_q - z) / s
                gap = abs(w - w_r)
                kept = max(gap - gap ** (0.7 - 1) / beta, 0) if gap else 0
                w_e = kept if w > w_r else -kept
                terms.append(w_q - (w - w_e) * s)
                total, count = total + gap, count + 1
            moved.append(sum(terms) / len(terms))
        zero, beta = moved, beta * 1.01
        if total / count >= best_error:
            break
        best_error = total / count
    return zero


@pytest.mark.parametrize("size", [0.05, 1.0, 5.0])  # errors that shrinkage removes, some that it keeps, many
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_are_those_of_the_authors(bits, size):
    groups = torch.randn(6, 16, generator=torch.Generator().manual_seed(bits)) * size
    groups[0, 3] *= 6
    grid = quantize_affine(groups, bits, 0)
    scale, zero_point = grid.scale.float(), grid.centre()
    ours = half_quadratic_zero_point(groups, scale, zero_point, bits)
    theirs = authors_zero_point(groups.tolist(), (1 / scale)[:, 0].tolist(), zero_point[:, 0].tolist(), bits)
    torch.testing.assert_close(ours[:, 0], torch.tensor(theirs), rtol=0, atol=2e-5)
    assert not torch.equal(ours, zero_point)


def test_shrink_by_hand():
    # 1 - 1 / 10; 4 - 4**-0.3 / 10 = 4 - 0.06598; 0.1 - 0.1**-0.3 / 10 = 0.1 - 0.19953 is below zero
    errors = torch.tensor([1.0, -4.0, 0.1, 0.0])
    torch.testing.assert_close(shrink(errors, beta=10.0), torch.tensor([0.9, -3.93402, 0.0, 0.0]))


def test_zero_point_makes_the_mean_error_of_small_weights_zero():
    # Two bits, steps of 0.01 from 0: 0, 0.6, 1.2 and 3 steps are rounded to 0, 1, 1, 3. The errors (0, -0.4, 0.2, 0)
    # have the mean -0.05 steps, and all shrink to 0, so the zero-point moves by 0.05 to where their mean is 0.
    groups = torch.tensor([[0.0, 0.006, 0.012, 0.03]])
    zero_point = half_quadratic_zero_point(groups, torch.tensor([[0.01]]), torch.tensor([[0.0]]), bits=2)
    torch.testing.assert_close(zero_point, torch.tensor([[0.05]]))


@given(st.integers(2, 8), st.sampled_from([0, 8, 16]), st.integers(0, 2**16))
@settings(max_examples=50)
def test_weights_inside_the_grid_err_by_half_a_step(bits, group_size, seed):
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) / 10
    tensor = quantize_half_quadratic(weight, bits, group_size)
    assert tensor.zero_point.dtype == torch.float16 and tensor.zero_point.shape == tensor.scale.shape
    assert int(tensor.integers.max()) < 2**bits
    scale = tensor.scale.float().repeat_interleave(tensor.group_size, 1)
    inside = (tensor.integers > 0) & (tensor.integers < 2**bits - 1)
    assert ((tensor.dequantize() - weight).abs() <= scale * (0.5 + 1e-4))[inside].all()


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-7])
def test_constant_groups_stay_finite(value):
    weight = torch.full((2, 8), value)
    restored = quantize_half_quadratic(weight, 4, 4).dequantize()
    torch.testing.assert_close(restored, weight, rtol=2**-10, atol=2**-14)


def test_a_group_of_weights_errs_less_than_with_an_integer_zero_point():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) / 20 + 0.01
    error = (quantize_half_quadratic(weight, 4, 64).dequantize() - weight).square().mean()
    assert error < (quantize_affine(weight, 4, 64).dequantize() - weight).square().mean()


def test_apply_packs_every_layer_and_survives_saving(new_model, layout, tmp_path):
    model = new_model(layout)
    packed = HalfQuadratic(bits=3, group_size=32).apply(model, Context())
    for name, layer in linear_layers(model).items():
        expected = quantize_half_quadratic(layer.weight.detach(), 3, 32)
        assert isinstance(packed.get_submodule(name), PackedLinear)
        assert torch.equal(packed.get_submodule(name).tensor.dequantize(), expected.dequantize())
    variants.save(packed, tmp_path / "variant", {})
    with torch.inference_mode():
        assert torch.equal(variants.load(tmp_path / "variant")(IDS).logits, packed(IDS).logits)


def test_recipe_text_and_bad_settings(new_model):
    assert str(parse("quantize.hqq")) == "quantize.hqq:bits=4,group_size=64"
    for text, message in (("bits=9", "outside 2 to 8"), ("group_size=-1", "0 means one group per row")):
        with pytest.raises(RecipeError, match=message):
            parse(f"quantize.hqq:{text}")
    with pytest.raises(GroupSizeError, match="32, 64, 0"):
        HalfQuadratic(group_size=48).apply(new_model("llama"), Context())
