"""Scales beyond float16: exact powers of two, whole models whose weights are in another unit, files and engines."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelab import corpora
from edgelab.recipes import Context, parse
from edgelab.runtimes import RuntimeRefused, gguf, onnx_export, openvino
from edgelab.runtimes.eager import Eager, kernel_for
from edgelab.runtimes.onnxruntime import OnnxRuntime
from edgelab.storage import variants
from edgelab.storage.layers import ActivationGrid, packed_layers
from edgelab.storage.scales import as_stored, eleven_bits, narrowed, restored, stored
from edgelab.techniques.quantization.awq import search_scale
from edgelab.techniques.quantization.gptq import gptq
from edgelab.techniques.quantization.hqq import quantize_half_quadratic
from edgelab.techniques.quantization.nonuniform import quantize_codebook, quantize_normal_float
from edgelab.techniques.quantization.one_bit import quantize_binary, quantize_ternary
from edgelab.techniques.quantization.qat import FakeQuantLinear, convert, grid_of
from edgelab.techniques.quantization.ranges import find_grid
from edgelab.techniques.quantization.rtn import quantize_affine
from edgelab.techniques.quantization.smooth import smoothing_scale

IDS = torch.randint(2, 300, (4, 96), generator=torch.Generator().manual_seed(0))


def weights(seed=0):
    """(16, 64) with a group of zeros, and rows of very different size."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[3] *= 2**-9
    weight[5, 32:] = 0
    return weight


def trained(bits, range="minmax"):
    """What a layer of quantization-aware training stores before its first step."""
    grid = grid_of(bits, range)
    return lambda weight: FakeQuantLinear(weight, None, grid, 2).packed().tensor


def gptq_of(static):
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    hessian = inputs.T @ inputs / 200

    def find(groups, which=None):
        return find_grid(groups, 4, False, "mse")

    return lambda weight: gptq(weight, hessian, 4, 32, find, static_groups=static)[0]


GRIDS = {
    **{
        f"rtn {bits} {range} {symmetric}": lambda weight, bits=bits, range=range, symmetric=symmetric: (
            quantize_affine(weight, bits, 32, symmetric, range=range)
        )
        for bits in (2, 4, 8)
        for range in ("minmax", "percentile", "mse")
        for symmetric in (False, True)
    },
    "rtn rows": lambda weight: quantize_affine(weight, 8, 0, True),
    "rtn tensor": lambda weight: quantize_affine(weight, 8, 0, per_tensor=True),
    "gptq static": gptq_of(True),
    "gptq moving": gptq_of(False),
    "ternary": lambda weight: quantize_ternary(weight, 32),
    "binary": lambda weight: quantize_binary(weight, 32),
    "nf4": lambda weight: quantize_normal_float(weight, 32),
    "codebook": lambda weight: quantize_codebook(weight, 3, 32),
    "qat 1": trained("1"),
    "qat 1.58": trained("1.58"),
    "qat 3": trained("3"),
}


def test_eleven_bits_by_hand():
    # 1 + 2**-10 is the float16 after 1; half-way between the two goes to the even one.
    values = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 0.0, -3.0])
    assert eleven_bits(values).tolist() == [1, 1 + 2**-9, 1 + 2**-10, 0, -3]
    assert eleven_bits(values * 2.0**-60).tolist() == [
        x * 2.0**-60 for x in (1, 1 + 2**-9, 1 + 2**-10, 0, -3)
    ]


def test_within_float16_eleven_bits_are_float16():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 2**-12
    values *= 2.0 ** (torch.arange(10_000) % 12)
    assert torch.equal(eleven_bits(values), values.half().float())


def test_a_group_of_zeros_gets_a_scale_that_takes_no_more_room():
    assert as_stored(torch.tensor([0.5, 0.0])).tolist() == [0.5, 2**-14]
    assert as_stored(torch.tensor([2.0**-30, 0.0])).tolist() == [2**-30, 2**-30]
    assert as_stored(torch.zeros(2)).tolist() == [2**-14, 2**-14]
    assert as_stored(torch.tensor([torch.nan, 0.5])).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "values, dtype, exponent",
    [
        ([0.5, 2**-14], torch.float16, "absent"),
        ([1.5 * 2.0**-20, 1.25 * 2.0**-40], torch.float16, -35),  # 1.5 * 2**-20 = 1.5 * 2**15 * 2**-35
        ([3.0 * 2**40], torch.float16, 26),
        ([1025 * 2.0**-10, 1025 * 2.0**-50], torch.float32, None),  # further apart than float16 reaches
    ],
)
def test_scales_in_a_file(values, dtype, exponent):
    scale = narrowed(torch.tensor([values]))
    tensor, how = stored(scale)
    assert tensor.dtype == dtype and how.get("scale_exponent", "absent") == exponent
    assert torch.equal(restored(tensor, how), scale)


@pytest.mark.parametrize("name", GRIDS)
@given(power=st.integers(-40, 40), seed=st.integers(0, 20))
@settings(max_examples=25)
def test_a_power_of_two_moves_nothing_but_the_scales(name, power, seed):
    weight, factor = weights(seed), 2.0**power
    if "gptq" in name:  # which moves a group of zeros a little, on a grid of no particular unit
        weight[5, 32:] = weight[4, 32:]
    plain, scaled = GRIDS[name](weight), GRIDS[name](weight * factor)
    assert torch.equal(scaled.integers, plain.integers)
    found = scaled.dequantize()
    if name == "qat 1":  # two levels of a layer in training are never the same
        found[5, 32:] = plain.dequantize()[5, 32:] * factor
    else:
        assert (found[weight == 0] == 0).all()
    assert torch.equal(found, plain.dequantize() * factor)
    tensors, how = scaled.stored()
    again = type(scaled).restored(tensors, how)
    assert torch.equal(again.scale, scaled.scale) and torch.equal(again.dequantize(), scaled.dequantize())
    plain_bytes, scaled_bytes = (
        sum(part.nbytes for part in one.stored()[0].values()) for one in (plain, scaled)
    )
    assert scaled_bytes == plain_bytes


@given(power=st.integers(-40, 0))
def test_hqq_keeps_its_integers_below_its_own_unit(power):
    """Above it, errors count by a power below 1, as in the authors' code, and small ones otherwise than large ones."""
    plain, scaled = (quantize_half_quadratic(weights() * by, 4, 32) for by in (1.0, 2.0**power))
    assert torch.equal(scaled.integers, plain.integers) and torch.equal(scaled.zero_point, plain.zero_point)
    assert torch.equal(scaled.dequantize(), plain.dequantize() * 2.0**power)


def test_rows_of_any_size_lie_in_one_matrix():
    """A row of a linear layer can be in any unit, if what reads its output is."""
    factors = 10.0 ** torch.arange(-24, 24, 3)[:, None]
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    tensor = quantize_affine(weight * factors, 8, 0)
    error = (tensor.dequantize() / factors - weight).abs().amax(1)
    assert (error <= 0.51 * (weight.amax(1) - weight.amin(1)) / 255 * 1.002).all()
    assert tensor.scale.dtype == torch.float32


@pytest.mark.parametrize("power", [-40, 40])
def test_activation_grids_have_no_unit(power):
    values = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    values[2] = 0
    assert torch.equal(
        ActivationGrid().round(values * 2.0**power), ActivationGrid().round(values) * 2.0**power
    )
    static = ActivationGrid.spanning(values.min() * 2.0**power, values.max() * 2.0**power)
    plain = ActivationGrid.spanning(values.min(), values.max())
    assert torch.equal(static.round(values * 2.0**power), plain.round(values) * 2.0**power)


@pytest.mark.parametrize("power", [-30, 30])
def test_searched_scales_have_no_unit(power):
    """Of the inputs, by AWQ and SmoothQuant, one of which is always zero."""
    weight, factor = weights(), 2.0**power
    magnitude = torch.linspace(0.01, 2, 64)
    magnitude[7] = 0
    hessian = torch.diag(magnitude**2 + 1e-3)
    plain, _ = search_scale(weight, magnitude, hessian, 4, 32)
    scaled, _ = search_scale(weight / factor, magnitude * factor, hessian * factor**2, 4, 32)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=0)
    peaks = weight.abs().amax(0)
    smoothed = smoothing_scale(magnitude * factor, peaks / factor, 0.75)
    torch.testing.assert_close(smoothed, smoothing_scale(magnitude, peaks, 0.75) * factor, rtol=1e-4, atol=0)


# Whole models


@torch.no_grad()
def in_another_unit(model, factor):
    """A copy with all weights divided by `factor` and norms multiplied by it: the same function of tokens.

    The residual stream is in the other unit as well, and so is the epsilon of the norms.
    """
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.copy_(parameter / factor if parameter.dim() == 2 else parameter * factor)
    model.config.rms_norm_eps /= factor**2
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = model.config.rms_norm_eps
    return model


def kl_of(text, model, context):
    """KL divergence of what a recipe makes of a model from the model, nats per token."""
    changed = model
    for technique in parse(text).techniques:
        changed = technique.apply(changed, context)
    p, q = (torch.log_softmax(one(IDS).logits.double(), -1) for one in (model, changed))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture
def context(byte_tokenizer, monkeypatch, story):
    monkeypatch.setattr(corpora, "tokenize", lambda corpus, tokenizer, split: story)
    return Context(tokenizer=byte_tokenizer)


CALIBRATED = "samples=4,length=64"
RECIPES = [
    "quantize.rtn:bits=8",
    "quantize.rtn:bits=4,range=mse,symmetric=true",
    "quantize.rtn:bits=8,group_size=0,per_tensor=true",
    "quantize.rtn:bits=8 + quantize.embedding",
    "quantize.hqq:bits=4",
    "quantize.nf4",
    "quantize.codebook:bits=4",
    "quantize.ternary",
    "quantize.binary",
    "quantize.dynamic",
    f"quantize.static:{CALIBRATED}",
    f"quantize.static:{CALIBRATED},range=mse",
    f"quantize.smooth:{CALIBRATED}",
    f"quantize.smooth:{CALIBRATED},activations=dynamic",
    f"quantize.gptq:bits=4,{CALIBRATED}",
    f"quantize.gptq:bits=4,range=mse,static_groups=false,{CALIBRATED}",
    f"quantize.awq:bits=4,{CALIBRATED}",
    f"quantize.autoround:bits=4,iterations=5,{CALIBRATED}",
    f"quantize.mixed:bits=4,{CALIBRATED}",
]


@pytest.mark.parametrize("text", RECIPES)
def test_a_model_in_another_unit_loses_as_much(text, new_model, context):
    model = new_model("llama")
    plain = kl_of(text, model, context)
    units = [2.0**10, 2.0**20] if "hqq" in text else [2.0**-10, 2.0**10, 2.0**20]
    searched = (
        "awq" in text or "smooth" in text
    )  # scales that are powers of magnitudes, rounded in another place
    for factor in units:
        scaled = in_another_unit(model, factor)
        torch.testing.assert_close(scaled(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
        assert kl_of(text, scaled, context) == pytest.approx(plain, rel=0.03 if searched else 1e-3)
    assert kl_of(text, in_another_unit(model, 1000), context) == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**20])
@pytest.mark.parametrize(
    "settings", ["bits=1", "bits=1.58", "bits=3,learned_step=true", "bits=4,range=minmax"]
)
def test_training_starts_from_the_same_function(settings, factor, new_model):
    (technique,) = parse(f"qat:{settings},activation_bits=8").techniques
    plain, scaled = (technique.prepare(in_another_unit(new_model("llama"), unit)) for unit in (1, factor))
    with torch.no_grad():
        torch.testing.assert_close(scaled(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
        packed = convert(scaled)
        torch.testing.assert_close(packed(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


# Files and engines


@pytest.mark.parametrize(
    "text", ["quantize.rtn:bits=8,group_size=0", "quantize.rtn:bits=4,group_size=32", "quantize.dynamic"]
)
def test_a_variant_in_another_unit_comes_back_and_runs_on_kernels(text, new_model, tmp_path):
    """The same logits as the model in its own unit has: a power of two is exact in every float on the way."""
    logits, bytes_ = [], []
    for unit in (1, 2.0**20):
        model = in_another_unit(new_model("llama"), unit)
        for technique in parse(f"{text} + quantize.embedding").techniques:
            model = technique.apply(model, Context())
        assert all(
            kernel_for(layer.tensor, layer.activation) for layer in packed_layers(model.model.layers).values()
        )
        folder = tmp_path / f"{unit:g}"
        variants.save(model, folder, {})
        scales = {name: layer.tensor.scale for name, layer in packed_layers(model).items()}
        for name, layer in packed_layers(variants.load(folder)).items():
            assert torch.equal(layer.tensor.scale, scales[name])
        logits.append(Eager(folder).model(IDS).logits)
        bytes_.append(variants.read_about(folder)["size"])
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    assert bytes_[0] == bytes_[1]


def test_gguf_refuses_scales_that_float16_does_not_hold(new_model):
    model = (
        parse("quantize.rtn:bits=4,group_size=32")
        .techniques[0]
        .apply(in_another_unit(new_model("llama"), 2.0**20), Context())
    )
    assert gguf.refusal(variants.describe(model)) == (
        "GGUF keeps scales in float16, whose range does not hold those of model.layers.0.self_attn.q_proj; run it on "
        "torch or onnxruntime."
    )


@pytest.mark.parametrize("factor", [2.0**20, 2.0**-24])
def test_openvino_refuses_weights_that_float16_does_not_hold(factor, new_model):
    assert openvino.halved(new_model("llama")).dtype == torch.float16
    with pytest.raises(
        RuntimeRefused, match=r"float16 here, whose range does not hold model\.embed_tokens\.weight"
    ):
        openvino.halved(in_another_unit(new_model("llama"), factor))


def test_matmulnbits_takes_scales_in_float32():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    plain, small = (onnx_export.blocks(quantize_affine(weight * by, 4, 32)) for by in (1, 2.0**-40))
    assert (small["scales"] == plain["scales"] * 2.0**-40).all() and small["scales"].dtype == "float32"
    assert (small["qweight"] == plain["qweight"]).all()


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**20])
def test_onnxruntime_runs_a_model_in_another_unit(factor, new_model, byte_tokenizer, tmp_path):
    model = in_another_unit(new_model("llama"), factor)
    for technique in parse("quantize.rtn:bits=4,group_size=32 + quantize.embedding").techniques:
        model = technique.apply(model, Context())
    variants.save(model, tmp_path / "variant", {}, byte_tokenizer)
    (tmp_path / "export").mkdir()
    OnnxRuntime.export(tmp_path / "variant", tmp_path / "export")
    found = OnnxRuntime(tmp_path / "export", 1).logits(IDS[0].tolist())
    expected = model(IDS[:1]).logits[0]
    assert torch.nn.functional.cosine_similarity(found, expected, -1).min() > 0.99  # activations in int8
