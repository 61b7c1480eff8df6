"""Round-to-nearest: tensors worked by hand, the exact bound of its error, and torch's own fake quantization."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from edgelab.recipes import Context, RecipeError, parse
from edgelab.runtimes.eager import Eager
from edgelab.storage import variants
from edgelab.storage.layers import PackedEmbedding, PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.ranges import SHRINKING, find_grid, mse_grid, on_grid, quantile
from edgelab.techniques.quantization.rtn import (
    GroupSizeError,
    RoundEmbedding,
    RoundToNearest,
    linear_layers,
    quantize_affine,
)

WEIGHTS = arrays(
    "float32",
    st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 24])),
    elements=st.floats(-100, 100, width=32) | st.floats(-0.0625, 0.0625, width=32),
).map(torch.from_numpy)
BITS = st.integers(2, 8)
GROUPS = st.sampled_from([0, 4, 8])


def scales_and_centres(tensor: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and integer zero of every weight, each (out_features, in_features)."""
    return tuple(
        grid.repeat_interleave(tensor.group_size, 1) for grid in (tensor.scale.float(), tensor.centre())
    )


def test_two_bits_by_hand():
    # First group: range 2.25 in three steps of 0.75, zero at the first. Second: range widened to hold zero, steps of 1.
    weight = torch.tensor([[-0.75, -0.25, 0.5, 1.5, 0.5, 1.0, 2.0, 3.0]])
    tensor = quantize_affine(weight, bits=2, group_size=4)
    assert tensor.scale.tolist() == [[0.75, 1.0]]
    assert tensor.zero_point.tolist() == [[1, 0]]
    assert tensor.integers.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]  # 0.5 / 1 is a tie and goes to the even 0
    assert tensor.dequantize().tolist() == [[-0.75, 0.0, 0.75, 1.5, 0.0, 1.0, 2.0, 3.0]]
    assert (tensor.scale.dtype, tensor.zero_point.dtype, tensor.integers.dtype) == (
        torch.float16,
        torch.uint8,
        torch.uint8,
    )


def test_two_bits_symmetric_by_hand():
    tensor = quantize_affine(torch.tensor([[-1.0, -0.4, 0.6, 0.5]]), bits=2, group_size=0, symmetric=True)
    assert tensor.scale.tolist() == [[1.0]]
    assert tensor.zero_point is None
    assert tensor.centre().tolist() == [[2.0]]
    assert tensor.integers.tolist() == [[1, 2, 3, 2]]
    assert tensor.dequantize().tolist() == [[-1.0, 0.0, 1.0, 0.0]]


def test_each_row_has_its_own_grid():
    weight = torch.tensor([[0.0, 15.0, 3.0, 7.0], [0.0, -30.0, -2.0, -4.0]])
    tensor = quantize_affine(weight, bits=4, group_size=0)
    assert tensor.scale.tolist() == [[1.0], [2.0]]
    assert tensor.zero_point.tolist() == [[0], [15]]
    assert torch.equal(tensor.dequantize(), weight)


@given(WEIGHTS, BITS, GROUPS)
def test_error_bound_asymmetric(weight, bits, group_size):
    """At most half a scale where nothing is clipped; where clipped, what the float16 of the scale cost comes on top.

    With n = 2**bits - 1 steps, range R = n s0 and stored scale s = s0 (1 + d), |d| <= 2**-11, a weight clipped at the
    top of the grid is off by at most R - (n - z) s + low with z <= 1/2 - low / s, so by s / 2 + n (s0 - s), and
    s0 - s <= s 2**-11 / (1 - 2**-11). Rounding the zero-point therefore costs nothing beyond the half step.
    """
    tensor = quantize_affine(weight, bits, group_size)
    scale, centre = scales_and_centres(tensor)
    error = (tensor.dequantize() - weight).abs()
    clipped = torch.round(weight / scale) + centre != tensor.integers.float()
    slack = 1 + 2**-20  # float32 arithmetic of the check itself
    assert (error <= 0.5 * scale * slack)[~clipped].all()
    steps = 2**bits - 1
    assert (error <= (0.5 + steps * 2**-11 / (1 - 2**-11)) * scale * slack).all()


@given(WEIGHTS, BITS, GROUPS)
def test_error_bound_symmetric(weight, bits, group_size):
    """At most half a scale everywhere: the grid ends within 2**-11 x 127 < 1/2 step of the largest weight."""
    tensor = quantize_affine(weight, bits, group_size, symmetric=True)
    scale, _ = scales_and_centres(tensor)
    assert ((tensor.dequantize() - weight).abs() <= 0.5 * scale * (1 + 2**-20)).all()


@given(WEIGHTS, BITS, GROUPS, st.booleans())
def test_zero_stays_zero_and_integers_stay_on_the_grid(weight, bits, group_size, symmetric):
    weight[:, ::3] = 0
    tensor = quantize_affine(weight, bits, group_size, symmetric)
    assert (tensor.dequantize()[:, ::3] == 0).all()
    assert int(tensor.integers.max()) < 2**bits
    assert tensor.scale.isfinite().all()
    assert tensor.scale.shape == (len(weight), weight.shape[1] // (group_size or weight.shape[1]))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_constant_and_zero_groups(bits, symmetric):
    weight = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 3.0), torch.full((1, 4), -3.0)], 1)
    tensor = quantize_affine(weight, bits, 4, symmetric)
    assert tensor.scale[0, 0] == 2**-14 and tensor.scale.dtype == torch.float16
    restored = tensor.dequantize()
    assert (restored[:, :4] == 0).all()
    torch.testing.assert_close(restored, weight, rtol=2**-11, atol=0)  # only the float16 of the scale is left


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_fake_quantization_of_torch(bits, group_size, symmetric):
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(bits))
    tensor = quantize_affine(weight, bits, group_size, symmetric)
    groups = weight.reshape(-1, group_size or 192)
    theirs = torch.fake_quantize_per_channel_affine(
        groups, tensor.scale.float().flatten(), tensor.centre().int().flatten(), 0, 0, 2**bits - 1
    )
    torch.testing.assert_close(tensor.dequantize().reshape(groups.shape), theirs, rtol=1e-6, atol=0)


def test_rows_equal_the_rows_of_the_whole():
    tensor = quantize_affine(torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), 5, 32)
    ids = torch.tensor([[3, 3, 9], [0, 1, 2]])
    assert torch.equal(tensor.rows(ids), tensor.dequantize()[ids])
    symmetric = quantize_affine(
        torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), 5, 0, symmetric=True
    )
    assert torch.equal(symmetric.rows(ids), symmetric.dequantize()[ids])


@pytest.mark.parametrize("in_features", [576, 1536])
def test_group_size_that_does_not_divide(in_features):
    fitting = {576: "32, 64, 96, 192, 288, 576, 0", 1536: "32, 64, 96, 128, 192, 256, 384, 512, 768, 1536, 0"}
    with pytest.raises(
        GroupSizeError, match=f"^group_size=100 does not divide the {in_features} inputs"
    ) as caught:
        quantize_affine(torch.zeros(1, in_features), 4, 100)
    assert f"use {fitting[in_features]} (one group per row)." in str(caught.value)


def test_group_size_names_what_fits_all_layers(new_model):
    # The widths of the embedded model, 576 and 1536, in one layer and without its other numbers.
    model = new_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=1,
    )
    with pytest.raises(GroupSizeError, match="32, 64, 96, 192, 0") as caught:
        RoundToNearest(bits=4, group_size=128).apply(model, Context())
    assert "group_size=128 does not divide the 576 and 1536 inputs" in str(caught.value)
    assert all(isinstance(layer, nn.Linear) for layer in linear_layers(model).values())  # nothing was changed


def test_apply_changes_a_copy_and_leaves_the_head(tiny_reference):
    model = tiny_reference.model
    before = copy.deepcopy(model.state_dict())
    seen = []
    rounded = RoundToNearest(bits=4, group_size=32).apply(
        model, Context(progress=lambda *pair: seen.append(pair))
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    packed = [name for name, module in rounded.named_modules() if isinstance(module, PackedLinear)]
    assert packed == list(linear_layers(model)) and len(packed) == 2 * 7
    assert seen == [(done, 14) for done in range(1, 15)]
    assert type(rounded.get_output_embeddings()) is nn.Linear
    assert rounded.get_output_embeddings().weight is rounded.get_input_embeddings().weight
    name = packed[3]
    expected = quantize_affine(model.get_submodule(name).weight, 4, 32).dequantize()
    assert torch.equal(rounded.get_submodule(name).tensor.dequantize(), expected)


def test_embedding_and_head_of_a_tied_model_share_the_integers(tiny_reference):
    rounded = RoundEmbedding().apply(tiny_reference.model, Context())
    embedding, head = rounded.get_input_embeddings(), rounded.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert embedding.tensor is head.tensor
    assert embedding.tensor.scale.shape == (300, 1)


def test_embedding_and_head_of_an_untied_model_are_rounded_both(new_model):
    model = new_model("phi")
    rounded = RoundEmbedding(bits=6, symmetric=False).apply(model, Context())
    embedding, head = rounded.get_input_embeddings(), rounded.get_output_embeddings()
    assert torch.equal(
        embedding.tensor.dequantize(), quantize_affine(model.model.embed_tokens.weight, 6, 0).dequantize()
    )
    assert torch.equal(head.tensor.dequantize(), quantize_affine(model.lm_head.weight, 6, 0).dequantize())
    assert torch.equal(head.bias, model.lm_head.bias)


@pytest.mark.parametrize("embedding_bits", [0, 8])
def test_rounding_equals_a_model_with_rounded_weights(new_model, layout, embedding_bits):
    """A plain model whose float weights are replaced by their rounded values gives the same logits."""
    model = new_model(layout)
    rounded = RoundToNearest(bits=3, group_size=64).apply(model, Context())
    if embedding_bits:
        rounded = RoundEmbedding(embedding_bits, symmetric=False).apply(rounded, Context())
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for layer in linear_layers(plain).values():
            layer.weight.copy_(quantize_affine(layer.weight, 3, 64).dequantize())
        if embedding_bits:
            for end in {plain.get_input_embeddings().weight, plain.get_output_embeddings().weight}:
                end.copy_(quantize_affine(end, 8, 0).dequantize())
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(rounded(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_quantized_model_is_not_quantized_again(tiny_reference):
    rounded = RoundToNearest().apply(tiny_reference.model, Context())
    with pytest.raises(RecipeError, match="quantized already"):
        RoundToNearest().apply(rounded, Context())


def test_one_scale_for_the_matrix_by_hand():
    weight = torch.tensor([[-5.0, 0.0, 1.2], [10.0, 2.6, -1.0]])  # range 15, one step for each
    tensor = quantize_affine(weight, bits=4, group_size=0, per_tensor=True)
    assert (tensor.scale.tolist(), tensor.zero_point.tolist()) == ([[1.0]], [[5]])
    assert tensor.integers.tolist() == [[0, 5, 6], [15, 8, 4]]
    assert tensor.dequantize().tolist() == [[-5.0, 0.0, 1.0], [10.0, 3.0, -1.0]]


@pytest.mark.parametrize(("bits", "kernel"), [(4, "int4pack_mm bf16"), (8, "int8pack_mm bf16")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_scale_for_the_matrix_saves_loads_and_runs_on_kernels(
    bits, kernel, symmetric, new_model, tmp_path
):
    rounded = RoundToNearest(bits, 0, symmetric, per_tensor=True).apply(new_model("llama"), Context())
    variants.save(rounded, tmp_path / "variant", {})
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        expected = rounded(ids).logits
        assert torch.equal(variants.load(tmp_path / "variant")(ids).logits, expected)
        runtime = Eager(tmp_path / "variant")
        difference = runtime.model(ids).logits - expected
    assert runtime.kernel == kernel
    assert difference.square().mean() < 0.01 * expected.square().mean()  # bfloat16 activations


def test_percentile_by_hand():
    # 101 weights from 0 to 100: percentiles 10 and 90 are 10 and 90; the grid begins at zero all the same.
    groups = torch.arange(101.0)[None]
    scale, zero_point = find_grid(groups, 4, False, "percentile", percentile=90)
    assert (scale.tolist(), zero_point.tolist()) == ([6.0], [0])
    scale, _ = find_grid(groups - 50, 4, True, "percentile", percentile=50)  # |w| up to 50: half are up to 25
    assert scale.item() == pytest.approx(25 / 7, rel=2**-10)


@given(WEIGHTS, st.floats(0, 1))
def test_quantile_is_that_of_torch(weight, share):
    expected = torch.quantile(weight, share, dim=-1)
    torch.testing.assert_close(quantile(weight.sort(-1).values, share), expected, rtol=1e-4, atol=1e-4)


def test_percentile_of_100_is_the_whole_range():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (False, True):
        whole = quantize_affine(weight, 4, 32, symmetric)
        cut = quantize_affine(weight, 4, 32, symmetric, range="percentile", percentile=100)
        assert torch.equal(whole.dequantize(), cut.dequantize())


def test_range_of_least_squares_by_hand():
    # Two bits, symmetric: s (-2, -1, 0, 1). Weights 1, 1, 1, 1, 0 need no shrinking. With 1.5 for the last, all five
    # become s, and 4 (1 - s)**2 + (1.5 - s)**2 is least at their mean 1.1: among 1.5, 1.47, ... at 1.11.
    exact = mse_grid(torch.tensor([1.0, 1, 1, 1, 0]), 2, True)
    outlier = mse_grid(torch.tensor([1.0, 1, 1, 1, 1.5]), 2, True)
    assert exact[0].item() == 1.0
    assert outlier[0].item() == pytest.approx(1.11, rel=2**-11)


def test_importance_decides_which_errors_count():
    group = torch.tensor([1.0, 1, 1, 1, 1.5])
    scale, _ = find_grid(group, 2, True, "mse", importance=torch.tensor([0.0, 0, 0, 0, 1]))
    assert scale.item() == 1.5
    scale, _ = find_grid(group, 2, True, "mse", importance=torch.tensor([1.0, 1, 1, 1, 0]))
    assert scale.item() == pytest.approx(1.0, abs=0.02)


@given(WEIGHTS, BITS, st.booleans(), st.booleans())
@settings(max_examples=30)
def test_range_of_least_squares_is_the_best_of_all_it_tries(weight, bits, symmetric, weighted):
    groups = weight.unflatten(-1, (-1, 8))  # (out, groups, 8)
    importance = torch.arange(1.0, 9.0) if weighted else torch.ones(8)

    def loss(scale, zero_point):
        return ((on_grid(groups, scale, zero_point, bits) - groups).square() * importance).sum(-1)

    found = loss(*mse_grid(groups, bits, symmetric, importance if weighted else None))
    assert (found <= loss(*find_grid(groups, bits, symmetric))).all()
    for factor in SHRINKING[::7]:
        shrunken = groups * factor  # the min-max grid of shrunken weights covers the shrunken range
        assert (found <= loss(*find_grid(shrunken, bits, symmetric)) * (1 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("quantize.rtn", "quantize.rtn:bits=4,group_size=64"),
        ("quantize.rtn:range=minmax,per_tensor=false", "quantize.rtn:bits=4,group_size=64"),
        ("quantize.rtn:range=mse", "quantize.rtn:bits=4,group_size=64,range=mse"),
        (
            "quantize.rtn:percentile=99,range=percentile",
            "quantize.rtn:bits=4,group_size=64,range=percentile,percentile=99.0",
        ),
        (
            "quantize.rtn:bits=8,group_size=0,per_tensor=true",
            "quantize.rtn:bits=8,group_size=0,per_tensor=true",
        ),
    ],
)
def test_canonical_text(text, canonical):
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("per_tensor=true", "per_tensor=true has no groups of 64; write group_size=0 beside it"),
        ("range=percentile,percentile=50", "percentile=50.0 is outside"),
        ("range=percentile,percentile=101", "percentile=101.0 is outside"),
        ("range=mse,percentile=99", "no effect with range=mse; write range=percentile"),
        ("range=best", "one of minmax, percentile, mse, not 'best'"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(RecipeError, match=message):
        parse(f"quantize.rtn:{settings}")


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_apply_uses_the_range(kind, new_model, layout):
    model = new_model(layout)
    rounded = RoundToNearest(bits=2, group_size=32, range=kind).apply(model, Context())
    name, layer = next(iter(linear_layers(model).items()))
    expected = quantize_affine(layer.weight.detach(), 2, 32, range=kind)
    assert torch.equal(rounded.get_submodule(name).tensor.dequantize(), expected.dequantize())
    assert not torch.equal(expected.dequantize(), quantize_affine(layer.weight.detach(), 2, 32).dequantize())


def test_the_embedding_is_rounded_behind_any_technique(new_model, layout):
    model = new_model(layout)
    linear = parse("quantize.hqq:bits=4,group_size=32").techniques[0].apply(model, Context())
    both = RoundEmbedding().apply(linear, Context())
    assert type(linear.get_input_embeddings()) is type(
        model.get_input_embeddings()
    )  # the argument is left alone
    embedding, head = both.get_input_embeddings(), both.get_output_embeddings()
    assert embedding.tensor.zero_point is None and embedding.tensor.scale.shape == (300, 1)
    assert (embedding.tensor is head.tensor) == model.config.tie_word_embeddings
    weight = linear.get_input_embeddings().weight
    half_a_step = embedding.tensor.scale.float() * 0.501  # float16 scales are rounded themselves
    assert ((embedding.tensor.dequantize() - weight).abs() <= half_a_step).all()


def test_an_embedding_is_not_rounded_twice(tiny_reference):
    rounded = RoundEmbedding().apply(tiny_reference.model, Context())
    with pytest.raises(RecipeError, match=r"write quantize\.embedding once"):
        RoundEmbedding().apply(rounded, Context())
    with pytest.raises(RecipeError, match="bits=9 is outside 2 to 8"):
        RoundEmbedding(bits=9)
