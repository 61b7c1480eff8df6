"""The grid explorer without a browser, its picture, and the exercises that go with it."""

import re

import numpy as np
import pytest
import torch

from edgelab.exercises import EXERCISES, check
from edgelab.plots import weight_grid
from edgelab.techniques.quantization.one_bit import quantize_ternary
from edgelab.techniques.quantization.rtn import quantize_affine
from edgelab.widgets import quantization

PNG = '<img src="data:image/png;base64,'


@pytest.fixture
def weight():
    return torch.randn(6, 192, generator=torch.Generator().manual_seed(0))


def grid_parts(widget):
    names = ("row", "grid", "bits", "group_size", "answer", "picture")
    return dict(zip(names, widget.children, strict=True))


def mse(parts):
    return float(re.search(r'data-mse="([^"]+)"', parts["answer"].value)[1])


# The grid explorer


def test_every_control_changes_answer_and_picture(weight):
    parts = grid_parts(quantization.grid_explorer(weight))
    assert parts["picture"].value.startswith(PNG)
    for name, value in [
        ("row", 3),
        ("bits", 3),
        ("group_size", 96),
        ("grid", "symmetric"),
        ("grid", "ternary"),
        ("grid", "binary"),
    ]:
        before = mse(parts), parts["picture"].value
        parts[name].value = value
        assert mse(parts) != before[0], name
        assert parts["picture"].value != before[1], name


def test_the_answer_is_the_error_of_the_package_s_rounding(weight):
    parts = grid_parts(quantization.grid_explorer(weight))
    parts["row"].value, parts["bits"].value, parts["group_size"].value = 2, 3, 64
    rounded = quantize_affine(weight[2:3], bits=3, group_size=64).dequantize()
    assert mse(parts) == pytest.approx((rounded - weight[2:3]).square().mean().item(), rel=1e-5)
    assert "3.297 bits per weight" in parts["answer"].value  # 3 + (16 + 3) / 64
    parts["grid"].value = "symmetric"
    assert "3.250 bits per weight" in parts["answer"].value and "zero-points" not in parts["answer"].value


def test_a_ternary_grid_has_three_levels_and_no_bits_to_choose(weight):
    parts = grid_parts(quantization.grid_explorer(weight, "ternary"))
    parts["group_size"].value = 64
    groups = weight[0].reshape(3, 64)
    scale = groups.abs().mean(1, keepdim=True)
    by_hand = torch.where(groups.abs() < scale / 2, 0, groups.sign() * scale)
    assert mse(parts) == pytest.approx((by_hand - groups).square().mean().item(), rel=1e-3)
    assert "2.250 bits per weight" in parts["answer"].value and parts["bits"].disabled
    levels = quantization.grid_levels(quantize_ternary(weight[:1], 64), ternary=True)
    np.testing.assert_allclose(levels, (scale * torch.tensor([-1, 0, 1])).numpy(), rtol=1e-3)
    parts["grid"].value = "symmetric"
    assert not parts["bits"].disabled


def test_a_binary_grid_has_the_levels_of_a_mean_magnitude(weight):
    parts = grid_parts(quantization.grid_explorer(weight, "binary"))
    parts["group_size"].value = 0
    mean = weight[0].abs().mean()
    assert mse(parts) == pytest.approx((weight[0].sign() * mean - weight[0]).square().mean().item(), rel=1e-3)
    assert f"{1 + 16 / 192:.3f} bits per weight" in parts["answer"].value


def test_only_group_sizes_that_divide_are_offered(weight):
    sizes = [
        size for _, size in grid_parts(quantization.grid_explorer(weight[:, :128]))["group_size"].options
    ]
    assert sizes == [32, 64, 0]


def test_a_row_of_zeros_has_no_error():
    parts = grid_parts(quantization.grid_explorer(torch.zeros(1, 64)))
    assert mse(parts) == 0 and "inf dB" in parts["answer"].value


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_rounded_weight_lies_on_a_level_of_its_group(weight, symmetric):
    tensor = quantize_affine(weight[:1], bits=3, group_size=64, symmetric=symmetric)
    levels = quantization.grid_levels(tensor)
    assert levels.shape == (3, 8)
    for group, own in zip(tensor.dequantize()[0].reshape(3, 64).numpy(), levels, strict=True):
        assert set(group) <= set(own)


# The picture


def test_the_picture_shows_every_weight_and_what_became_of_it(weight):
    tensor = quantize_affine(weight[:1], bits=4, group_size=64)
    before, after = weight[0].numpy(), tensor.dequantize()[0].numpy()
    whole, detail = weight_grid(before, after, quantization.grid_levels(tensor), "a row").axes
    assert whole.get_title(loc="left") == "a row"
    rounded, original = (points.get_offsets()[:, 1] for points in whole.collections[-2:])
    np.testing.assert_allclose(rounded, after)
    np.testing.assert_allclose(original, before)
    worst = np.abs(after - before).argmax()
    assert detail.get_xlim()[0] < worst < detail.get_xlim()[1]
    assert detail.get_xlabel() == "Input of the row"


def test_a_short_row_and_a_single_group_are_drawn():
    weights = np.array([0.1, -0.2, 0.3])
    legend = weight_grid(weights, weights, np.array([[-0.2, 0.1, 0.3]])).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["weight", "rounded", "levels of the grid"]


# The exercises


@pytest.mark.parametrize("name, answer", [("group_within_budget", 96), ("levels_of_symmetric_two_bits", 3)])
def test_the_exercises_accept_the_answer_worked_by_hand_and_explain_mistakes(name, answer):
    assert check(name, answer).text.startswith("Right")
    for wrong, hint in EXERCISES[name]().mistakes:
        assert check(name, wrong).text == f"Not yet: {hint}"
