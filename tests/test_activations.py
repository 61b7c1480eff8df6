"""Int8 activations: grids and ranges by hand, the integer kernel against its definition, smoothing on five layouts."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from edgelab.recipes import Context, RecipeError, parse
from edgelab.runtimes.eager import Eager, Int8ActivationLinear, Simulated, kernel_for
from edgelab.storage import variants
from edgelab.storage.layers import ActivationGrid, PackedLinear
from edgelab.techniques.calibration import CalibrationError
from edgelab.techniques.quantization.activations import (
    DynamicInt8,
    Histogram,
    StaticInt8,
    calibrated_grids,
    channel_peaks,
    expected_error,
    observe,
)
from edgelab.techniques.quantization.rtn import linear_layers, quantize_affine
from edgelab.techniques.quantization.smooth import SmoothQuant, smooth, smoothing_scale

IDS = torch.arange(2, 66)[None]
VALUES = arrays("float32", st.integers(1, 60), elements=st.floats(-1000, 1000, width=32)).map(
    torch.from_numpy
)


def windows(samples: int = 4) -> torch.Tensor:
    return torch.randint(2, 300, (samples, 48), generator=torch.Generator().manual_seed(0))


def test_static_grid_by_hand():
    grid = ActivationGrid.spanning(torch.tensor(-51.0), torch.tensor(204.0))
    assert (grid.scale, grid.zero_point) == (1.0, 51.0)
    assert grid.round(torch.tensor([-60.0, -0.6, 0.4, 203.7, 300.0])).tolist() == [-51, -1, 0, 204, 204]
    above = ActivationGrid.spanning(torch.tensor(51.0), torch.tensor(102.0))  # widened to hold zero
    assert above.zero_point == 0
    torch.testing.assert_close(above.scale, torch.tensor(0.4))


def test_dynamic_grid_by_hand():
    inputs = torch.tensor([[204.0, 0.6, -51.0], [0.0, 0.0, 0.0], [2.55, 0.014, 1.0]])
    expected = torch.tensor([[204.0, 1.0, -51.0], [0.0, 0.0, 0.0], [2.55, 0.01, 1.0]])
    torch.testing.assert_close(ActivationGrid().round(inputs), expected)


@settings(max_examples=25)
@given(VALUES)
def test_histogram_counts_bfloat16_values(values):
    histogram = Histogram()
    for piece in values.split(7):
        histogram.add(piece)
    assert (histogram.low, histogram.high) == (min(values.min(), 0), max(values.max(), 0))
    seen, counts = histogram.occupied()
    assert int(counts.sum()) == len(values)
    sorted_values = values.bfloat16().float().sort().values.clamp(histogram.low, histogram.high)
    assert torch.equal(seen.repeat_interleave(counts), sorted_values)


def test_percentile_cuts_both_tails():
    histogram = Histogram()
    histogram.add(torch.arange(-100.0, 101.0))  # 201 whole numbers, each one exact in bfloat16
    assert histogram.percentile(100) == (-100, 100)
    assert histogram.percentile(90) == (-90, 90)
    assert histogram.percentile(80) == (-80, 80)


def test_expected_error_by_hand():
    # Range -255 to 255, steps of 2: 0.5 becomes zero, 10 is off by 2**2 / 12, 257 by 2 more than that.
    values, counts = torch.tensor([0.5, 10.0, 257.0]), torch.tensor([4, 3, 1])
    error = expected_error(values, counts, torch.tensor([-255.0]), torch.tensor([255.0]))
    assert error.item() == pytest.approx(4 * 0.25 + 3 / 3 + (1 / 3 + 4))


@pytest.mark.parametrize("outlier", [1.0, 8.0, 400.0])
def test_the_range_by_squared_error_beats_the_others(outlier):
    """Measured by really rounding, against min-max and symmetric shrinking of it by every per cent."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20000, generator=generator)
    values[:5] *= outlier
    histogram = Histogram()
    histogram.add(values)

    def error(low, high) -> float:
        return float((ActivationGrid.spanning(low, high).round(values) - values).double().square().sum())

    best = min(error(histogram.low * f, histogram.high * f) for f in torch.linspace(0.01, 1, 100))
    assert error(*histogram.mse()) <= 1.05 * best
    assert error(*histogram.mse()) <= 1.0001 * error(histogram.low, histogram.high)


def test_layers_that_read_one_tensor_share_a_range(new_model, layout):
    model = new_model(layout)
    seen: dict[str, int] = {}
    first = observe(model, windows(), lambda name, inputs: seen.update({name: seen.get(name, 0) + 1}))
    assert set(first) == set(linear_layers(model))
    assert set(seen) == set(first.values()) and set(seen.values()) == {4}
    grids = calibrated_grids(model, windows(), "mse", 99.9)
    prefix = "model.layers.1.self_attn."
    assert first[prefix + "k_proj"] == first[prefix + "v_proj"] == prefix + "q_proj"
    assert torch.equal(grids[prefix + "q_proj"].scale, grids[prefix + "v_proj"].scale)
    if layout == "phi":  # one norm for attention and MLP
        assert first["model.layers.1.mlp.fc1"] == prefix + "q_proj"
    assert len(seen) == (6 if layout == "phi" else 8)


def test_minmax_and_peaks_are_those_of_the_inputs(new_model):
    model = new_model("llama")
    name, kept = "model.layers.1.mlp.down_proj", []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda layer, inputs: kept.append(inputs[0]))
    with torch.inference_mode():
        for window in windows():
            model(window[None])
    hook.remove()
    inputs = torch.cat(kept).flatten(0, 1)
    grid, peaks = calibrated_grids(model, windows(), "minmax", 0)[name], channel_peaks(model, windows())[name]
    torch.testing.assert_close(grid.scale, (inputs.max() - inputs.min()) / 255)
    torch.testing.assert_close(peaks, inputs.abs().amax(0))


def test_inputs_that_are_not_finite_are_named(new_model):
    model = new_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"inputs of model.layers.1.mlp.down_proj are not finite"):
        calibrated_grids(model, windows(), "minmax", 0)


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("static", [False, True])
def test_the_kernel_equals_the_definition(static, bits, bias, tokens):
    """To float32: the integers are the same, sums in int32 are exact, and only the products with the scales round."""
    generator = torch.Generator().manual_seed(tokens)
    tensor = quantize_affine(0.05 * torch.randn(48, 576, generator=generator), bits, 0, symmetric=True)
    inputs = 3 * torch.randn(tokens, 576, generator=generator) + 1
    offset = nn.Parameter(torch.randn(48, generator=generator)) if bias else None
    grid = ActivationGrid.spanning(inputs.min(), 0.6 * inputs.max()) if static else ActivationGrid()
    assert kernel_for(tensor, grid) is Int8ActivationLinear
    definition, kernel = PackedLinear(tensor, offset, grid), Int8ActivationLinear(tensor, offset, grid)
    expected = definition(inputs).detach()
    torch.testing.assert_close(kernel(inputs), expected, rtol=0, atol=2e-6 * expected.abs().max().item())
    nested = kernel(inputs[None].bfloat16())
    assert nested.dtype == torch.bfloat16 and nested.shape == (1, tokens, 48)


def test_the_kernel_does_not_saturate():
    """The largest integers of one sign: 127 * 127 * 4096 needs all 32 bits of the sum."""
    tensor = quantize_affine(torch.full((16, 4096), 127.0), 8, 0, symmetric=True)
    inputs = torch.full((3, 4096), 127.0)
    for grid in (ActivationGrid(), ActivationGrid.spanning(torch.tensor(0.0), torch.tensor(255.0))):
        outputs = Int8ActivationLinear(tensor, None, grid)(inputs)
        torch.testing.assert_close(outputs, torch.full((3, 16), 127.0 * 127 * 4096), rtol=1e-6, atol=0)


def test_which_matrix_has_no_integer_kernel():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    assert kernel_for(quantize_affine(weight, 8, 32, symmetric=True), ActivationGrid()) is None
    assert kernel_for(quantize_affine(weight, 8, 0), ActivationGrid()) is None


def test_a_token_is_rounded_as_torch_does_it():
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for rounded, token in zip(ActivationGrid().round(inputs), inputs, strict=True):
        scale = (token.max() - token.min()).item() / 255
        zero_point = round(-token.min().item() / scale)
        torch.testing.assert_close(
            rounded, torch.fake_quantize_per_tensor_affine(token, scale, zero_point, 0, 255)
        )


def test_dynamic_int8(new_model, layout):
    model = new_model(layout)
    before = copy.deepcopy(model.state_dict())
    changed = DynamicInt8().apply(model, Context())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers = [layer for layer in changed.modules() if isinstance(layer, PackedLinear)]
    assert len(layers) == len(linear_layers(model))
    assert all(layer.activation == ActivationGrid() and layer.tensor.bits == 8 for layer in layers)
    plain = copy.deepcopy(model)
    for layer in linear_layers(plain).values():
        layer.weight.data = quantize_affine(layer.weight.data, 8, 0, symmetric=True).dequantize()
        layer.register_forward_pre_hook(lambda module, inputs: ActivationGrid().round(inputs[0]))
    torch.testing.assert_close(changed(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-4)


def test_one_scale_per_token(new_model):
    """A token's answer does not depend on what stands in other rows of the batch."""
    changed = DynamicInt8().apply(new_model("llama"), Context())
    both = torch.cat([IDS, IDS.flip(1)])
    torch.testing.assert_close(changed(both).logits[:1], changed(IDS).logits)


@pytest.mark.parametrize("keys", ["", "range=percentile,percentile=99.9", "range=mse"])
@pytest.mark.parametrize("method", ["static", "smooth"])
def test_static_recipes(tiny_reference, monkeypatch, method, keys):
    monkeypatch.setattr(StaticInt8, "draw", lambda self, context, longest: windows(self.samples))
    monkeypatch.setattr(SmoothQuant, "draw", lambda self, context, longest: windows(self.samples))
    text = f"quantize.{method}:samples=4" + ("," + keys if keys else "")
    technique = parse(text).techniques[0]
    progress = []
    context = Context(progress=lambda *pair: progress.append(pair))
    changed = technique.apply(tiny_reference.model, context)
    logits = tiny_reference.model(IDS).logits
    assert (
        0 < (changed(IDS).logits - logits).norm() < 0.3 * logits.norm()
    )  # of random weights, which forgive nothing
    total = 8 if method == "smooth" else 4
    assert progress == [(done, total) for done in range(1, total + 1)]
    assert (context.record.notes == ["6 of 8 inputs smoothed"]) == (method == "smooth")


@pytest.mark.parametrize(
    "technique", [StaticInt8(samples=4), SmoothQuant(samples=4)], ids=["static", "smooth"]
)
def test_static_on_every_layout(technique, new_model, layout, monkeypatch):
    monkeypatch.setattr(type(technique), "draw", lambda self, context, longest: windows(self.samples))
    model = new_model(layout)
    changed, logits = technique.apply(model, Context()), model(IDS).logits
    layers = [module for module in changed.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == len(linear_layers(model)) and all(
        layer.activation.scale is not None for layer in layers
    )
    assert torch.cosine_similarity(changed(IDS).logits, logits, -1).mean() > 0.7


def test_smoothing_scale_by_hand():
    peaks, weights = torch.tensor([16.0, 4.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])
    assert smoothing_scale(peaks, weights, 0.5)[:2].tolist() == [4.0, 1.0]  # equation 4
    assert smoothing_scale(peaks, weights, 1.0)[:2].tolist() == [16.0, 4.0]
    assert smoothing_scale(peaks, weights, 0.0)[:2].tolist() == [1.0, 0.25]
    dead = smoothing_scale(peaks, weights, 0.5)[2]  # both peaks count as 1e-5 of the largest
    assert dead.item() == pytest.approx(math.sqrt(16 / 4))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_smoothing_changes_peaks_and_not_logits(new_model, layout, alpha):
    model = new_model(layout)
    with torch.no_grad():  # an outlier channel
        model.model.layers[1].input_layernorm.weight[5] *= 10
    logits, peaks = model(IDS).logits.detach(), channel_peaks(model, windows())
    smoothed = copy.deepcopy(model)
    assert smooth(smoothed, peaks, alpha, windows()[:1]) == ((2, 6) if layout == "phi" else (6, 8))
    torch.testing.assert_close(smoothed(IDS).logits, logits, rtol=0, atol=1e-4)
    name = "model.layers.1.self_attn.q_proj"
    after = channel_peaks(smoothed, windows())[name]
    weights = torch.stack(
        [
            model.get_submodule(other).weight.abs().amax(0)
            for other in observe(model, windows(1), lambda *_: None)
            if peaks[other].shape == peaks[name].shape and torch.equal(peaks[other], peaks[name])
        ]
    ).amax(0)
    expected = peaks[name] ** (1 - alpha) * weights ** (1 - alpha)  # |X| / s
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_both_runtimes_run_the_saved_variant(tiny_reference, tmp_path):
    model = tiny_reference.model
    grids = calibrated_grids(model, windows(), "minmax", 0)
    for technique in ("dynamic", "static"):
        changed = DynamicInt8().apply(model, Context())
        for name, grid in grids.items() if technique == "static" else ():
            changed.get_submodule(name).activation = grid
        variants.save(changed, tmp_path / technique, {"recipe": f"quantize.{technique}"})
        expected = changed(IDS).logits
        packed, simulated = Eager(tmp_path / technique), Simulated(tmp_path / technique)
        assert packed.kernel == "int8 x int8 int_mm"
        for runtime in (packed, simulated):
            difference = (runtime.model(IDS).logits - expected).norm() / expected.norm()
            assert difference < 0.01  # a float32 rounding may tip an activation to the next integer


def test_without_a_kernel_the_definition_runs_and_says_so(tiny_reference, tmp_path):
    changed = DynamicInt8().apply(tiny_reference.model, Context())
    for layer in changed.modules():
        if isinstance(layer, PackedLinear):
            layer.tensor = quantize_affine(layer.tensor.dequantize(), 8, 32)
    variants.save(changed, tmp_path / "grouped", {"recipe": "quantize.dynamic"})
    runtime = Eager(tmp_path / "grouped")
    assert runtime.kernel == "unpacked when used, float32 after rounding the inputs"
    assert runtime.badge == "simulated" and Eager.badge == "packed"
    torch.testing.assert_close(runtime.model(IDS).logits, changed(IDS).logits)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("quantize.smooth:alpha=1.5", "alpha=1.5 is outside 0 to 1"),
        ("quantize.static:range=percentile,percentile=0.999", "percentile=0.999 is outside 50 to 100"),
        ("quantize.static:percentile=99.9", "percentile=99.9 has no effect with range=minmax"),
        ("quantize.smooth:activations=dynamic,range=mse", "range=mse has no effect with activations=dynamic"),
        ("quantize.static:range=entropy", "one of minmax, percentile, mse, not 'entropy'"),
        ("quantize.smooth:activations=none", "one of static, dynamic, not 'none'"),
    ],
)
def test_settings_that_cannot_be(text, told):
    with pytest.raises(RecipeError, match=told):
        parse(text)


def test_a_quantized_model_is_not_quantized_again(tiny_reference):
    changed = DynamicInt8().apply(tiny_reference.model, Context())
    with pytest.raises(RecipeError, match="quantized already"):
        DynamicInt8().apply(changed, Context())
