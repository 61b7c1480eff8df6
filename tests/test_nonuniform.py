"""NF4 and k-means: published levels, tensors by hand, scipy and brute force, and tiny models of all layouts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from edgelab.recipes import Context, RecipeError, parse
from edgelab.runtimes.eager import Eager
from edgelab.storage import variants
from edgelab.storage.codebook import CodebookTensor
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.quantization.nonuniform import (
    Codebook,
    NormalFloat4,
    k_means,
    midpoints,
    normal_float,
    quantize_codebook,
    quantize_normal_float,
)
from edgelab.techniques.quantization.rtn import GroupSizeError, linear_layers, quantize_affine

IDS = torch.arange(2, 40)[None]
# As bitsandbytes publishes them (and the QLoRA paper in appendix E).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]


def test_levels_are_the_published_ones():
    torch.testing.assert_close(normal_float(), torch.tensor(NF4), rtol=0, atol=2e-7)


def test_nf4_by_hand():
    # Scales 2 and 0.5. 0.35 / 2 = 0.175 is nearest to 0.1609, 1.5 / 2 to 0.7230; -0.18 / 0.5 = -0.36 to -0.3949.
    weight = torch.tensor([[-2.0, 0.0, 0.35, 1.5, 0.5, -0.18, 0.0, 0.001]])
    tensor = quantize_normal_float(weight, group_size=4)
    assert tensor.scale.tolist() == [[2.0, 0.5]]
    assert tensor.integers.tolist() == [[0, 7, 9, 14, 15, 3, 7, 7]]
    assert tensor.codebook.shape == (1, 16)
    expected = [[-2.0, 0.0, 0.16093 * 2, 0.72296 * 2, 0.5, -0.39492 / 2, 0.0, 0.0]]
    torch.testing.assert_close(tensor.dequantize(), torch.tensor(expected), rtol=2**-10, atol=0)


@given(st.integers(0, 2**16), st.sampled_from([0, 4, 8]), st.integers(2, 8))
@settings(max_examples=50)
def test_every_weight_takes_its_nearest_level(seed, group_size, bits):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) ** 3
    for tensor in (quantize_normal_float(weight, group_size), quantize_codebook(weight, bits, group_size)):
        scale = tensor.scale.float().repeat_interleave(tensor.group_size, 1)
        levels = tensor.codebook.float()[0] * scale[..., None]  # (out, in, levels)
        least = (levels - weight[..., None]).abs().amin(-1)
        torch.testing.assert_close((tensor.dequantize() - weight).abs(), least, rtol=1e-5, atol=1e-6)
        assert (tensor.codebook.diff() >= 0).all()


def test_k_means_by_hand():
    # Quantiles 1 and 10 are the start. 4 counts three times: 1, 2 and 4 four times over 5 parts give 3.
    points = torch.tensor([10.0, 2.0, 4.0, 1.0, 11.0])
    importance = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0])
    torch.testing.assert_close(k_means(points, importance, 2), torch.tensor([3.0, 10.5]))


def test_k_means_with_fewer_values_than_levels():
    points = torch.tensor([1.0, 1.0, 1.0, 2.0])
    centres = k_means(points, torch.ones(4), 4)
    assert centres.isfinite().all() and (centres.diff() >= 0).all()
    assert {1.0, 2.0} <= set(centres.tolist())


def test_k_means_stands_still_where_scipy_does():
    points = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    centres = k_means(points, torch.ones(3000), 8)
    again, _ = kmeans2(points.double().numpy(), centres.double().numpy(), iter=1, minit="matrix")
    torch.testing.assert_close(centres, torch.from_numpy(again).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_is_near_the_best_of_all_intervals(seed):
    points = torch.randn(14, generator=torch.Generator().manual_seed(seed)).sort().values

    def loss(parts: list[torch.Tensor]) -> float:
        return sum(float((part - part.mean()).square().sum()) for part in parts)

    best = min(loss(points.tensor_split(cuts)) for cuts in itertools.combinations(range(1, 14), 3))
    found = torch.searchsorted(points, midpoints(k_means(points, torch.ones(14), 4)))
    assert loss([part for part in points.tensor_split(found) if len(part)]) <= 1.5 * best


@pytest.mark.parametrize("bits", [3, 4])
def test_levels_of_its_own_err_less_than_others(bits):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    own, others = quantize_codebook(weight, bits, 64), [quantize_affine(weight, bits, 64)]
    if bits == 4:
        others.append(quantize_normal_float(weight, 64))  # quantiles are not where squared errors are least
    error, *least = ((tensor.dequantize() - weight).square().mean() for tensor in (own, *others))
    assert all(error < 0.95 * other for other in least)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_groups(value):
    weight = torch.full((2, 8), value)
    for tensor in (quantize_normal_float(weight, 4), quantize_codebook(weight, 4, 4)):
        assert torch.equal(tensor.dequantize(), weight)


@pytest.mark.parametrize(
    "technique", [NormalFloat4(group_size=32), Codebook(bits=3, group_size=0)], ids=["nf4", "codebook"]
)
def test_apply_packs_every_layer_and_survives_saving(technique, new_model, layout, tmp_path):
    model = new_model(layout)
    packed = technique.apply(model, Context())
    for name in linear_layers(model):
        assert isinstance(packed.get_submodule(name), PackedLinear)
        assert isinstance(packed.get_submodule(name).tensor, CodebookTensor)
    variants.save(packed, tmp_path / "variant", {})
    with torch.inference_mode():
        assert torch.equal(variants.load(tmp_path / "variant")(IDS).logits, packed(IDS).logits)


def test_bytes_and_kernel_of_a_codebook(tiny_reference, tmp_path):
    packed = Codebook(bits=3, group_size=32).apply(tiny_reference.model, Context())
    variants.save(packed, tmp_path / "variant", {})
    size = variants.read_about(tmp_path / "variant")["size"]
    weights = sum(layer.weight.numel() for layer in linear_layers(tiny_reference.model).values())
    assert size["linear_bytes"] == weights * 3 / 8
    assert (
        size["scales_bytes"] == weights / 32 * 2 + 14 * 8 * 2
    )  # scales, and 8 levels for each of 14 matrices
    assert Eager(tmp_path / "variant").kernel == "unpacked when used, float32"


def test_recipe_texts_and_bad_settings(new_model):
    assert str(parse("quantize.nf4")) == "quantize.nf4:group_size=64"
    assert str(parse("quantize.codebook")) == "quantize.codebook:bits=4,group_size=64"
    for text, message in (
        ("quantize.codebook:bits=1", "outside 2 to 8"),
        ("quantize.codebook:group_size=-1", "0 means one group per row"),
        ("quantize.nf4:group_size=-1", "0 means one group per row"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse(text)
    with pytest.raises(GroupSizeError, match="32, 64, 0"):
        NormalFloat4(group_size=48).apply(new_model("llama"), Context())
