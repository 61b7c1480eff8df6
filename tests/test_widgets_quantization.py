"""The quantization widgets without a browser, the picture of a grid, and the exercises that go with them."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from edgelab import ledger
from edgelab.exercises import EXERCISES, check
from edgelab.lab import MeasureError
from edgelab.ledger import Row
from edgelab.plots import weight_grid
from edgelab.reference import Source
from edgelab.techniques.quantization.packed import pack
from edgelab.techniques.quantization.rtn import quantize_affine
from edgelab.widgets import quantization

PNG = b"\x89PNG\r\n\x1a\n"
RTN4 = "quantize.rtn:bits=4,group_size=64"


@pytest.fixture
def weight():
    return torch.randn(6, 192, generator=torch.Generator().manual_seed(0))


def by_name(widget, *names):
    return dict(zip(names, widget.children, strict=True))


def grid_parts(widget):
    return by_name(widget, "row", "bits", "group_size", "symmetric", "answer", "picture")


def mse(parts):
    return float(re.search(r'data-mse="([^"]+)"', parts["answer"].value)[1])


# The grid explorer


def test_every_control_changes_answer_and_picture(weight):
    parts = grid_parts(quantization.grid_explorer(weight))
    assert bytes(parts["picture"].value).startswith(PNG)
    for name, value in [("row", 3), ("bits", 3), ("group_size", 96), ("symmetric", True)]:
        before = mse(parts), bytes(parts["picture"].value)
        parts[name].value = value
        assert mse(parts) != before[0], name
        assert bytes(parts["picture"].value) != before[1], name


def test_the_answer_is_the_error_of_the_package_s_rounding(weight):
    parts = grid_parts(quantization.grid_explorer(weight))
    parts["row"].value, parts["bits"].value, parts["group_size"].value = 2, 3, 64
    rounded = quantize_affine(weight[2:3], bits=3, group_size=64).dequantize()
    assert mse(parts) == pytest.approx((rounded - weight[2:3]).square().mean().item(), rel=1e-5)
    assert "3.297 bits per weight" in parts["answer"].value  # 3 + (16 + 3) / 64
    parts["symmetric"].value = True
    assert "3.250 bits per weight" in parts["answer"].value and "zero-points" not in parts["answer"].value


def test_only_group_sizes_that_divide_are_offered(weight):
    sizes = [
        size for _, size in grid_parts(quantization.grid_explorer(weight[:, :128]))["group_size"].options
    ]
    assert sizes == [32, 64, 0]


def test_a_row_of_zeros_has_no_error():
    parts = grid_parts(quantization.grid_explorer(torch.zeros(1, 64)))
    assert mse(parts) == 0 and "inf dB" in parts["answer"].value


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 192), (8, 96)])
def test_effective_bits_are_the_bytes_that_packing_stores(bits, group_size, symmetric):
    tensor = quantize_affine(torch.randn(64, 192), bits, group_size, symmetric)
    parts = [pack(tensor.integers, bits), tensor.scale]
    parts += [] if symmetric else [pack(tensor.zero_point, bits)]
    stored = 8 * sum(part.nbytes for part in parts) / tensor.integers.numel()
    assert quantization.effective_bits(bits, group_size, symmetric) == pytest.approx(stored)


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


# The trade-off explorer


def row(recipe, window_nll, **changes):
    n_tokens = 511 * len(window_nll)
    values = {
        "family": "baseline" if recipe == "none" else "quantize",
        "model": "tiny",
        "protocol": "edgelab-512",
        "corpus": "wiki",
        "badge": "packed",
        "windows": len(window_nll),
        "n_tokens": n_tokens,
        "nll_sum": 511 * sum(window_nll),
        "ppl": float(np.exp(np.mean(window_nll))),
        "weights_mb": 100.0 if recipe == "none" else 40.0,
        "bits_per_weight": 32.0 if recipe == "none" else 10.0,
        "window_nll": window_nll,
    }
    return Row(recipe, **values | changes)


@pytest.fixture(autouse=True)
def tiny_source(monkeypatch):
    monkeypatch.setattr(quantization, "resolve", lambda name: Source("tiny", "nowhere", "0"))


def explorer_parts(rows, windows=2):
    widget = quantization.tradeoff_explorer(rows, windows)
    return by_name(widget, "bits", "group_size", "symmetric", "embedding", "button", "answer", "picture")


def test_longer_rows_answer_for_their_first_windows():
    rows = ledger.frame(
        [
            row("none", [2.0, 3.0, 4.0]),
            row(RTN4, [2.5, 3.1, 9.0]),
            row(RTN4, [2.5]),
            row(RTN4, [1.0, 1.0], corpus="stories"),
            row(RTN4, [1.0, 1.0], protocol="gptq-2048"),
            row(RTN4, [1.0, 1.0], model="other"),
            row(RTN4, [1.0, 1.0], fast=True),
            Row(RTN4, status="oom", model="tiny"),
        ]
    )
    cut = quantization.same_windows(rows, 2)
    assert list(cut["ppl"]) == pytest.approx([np.exp(2.5), np.exp(2.8)])
    assert list(cut["n_tokens"]) == [1022, 1022]
    assert cut["delta_nll"].iloc[1] == pytest.approx(0.3)
    assert cut["delta_nll_low"].iloc[1] < 0.3 < cut["delta_nll_high"].iloc[1]
    assert list(rows["n_tokens"][:2]) == [1533, 1533]  # the rows given are left alone


def test_the_chosen_point_is_named_and_an_unmeasured_one_too():
    parts = explorer_parts(ledger.frame([row("none", [2.0, 3.0]), row(RTN4, [2.5, 3.1])]))
    assert bytes(parts["picture"].value).startswith(PNG)
    assert 'data-ppl="16.44' in parts["answer"].value and "(packed)" in parts["answer"].value
    before = bytes(parts["picture"].value)
    parts["bits"].value, parts["symmetric"].value, parts["embedding"].value = 3, True, 8
    assert parts["answer"].value == (
        "quantize.rtn:bits=3,group_size=64,symmetric=true,embedding_bits=8 has not been measured yet."
    )
    assert bytes(parts["picture"].value) != before


def test_measuring_live_shows_that_it_runs_and_then_the_point(monkeypatch):
    said = []

    def measure(recipe, **settings):
        said.append((parts["answer"].value, parts["button"].disabled, settings))
        return row(recipe, [2.0, 3.0] if recipe == "none" else [2.5, 3.5])

    monkeypatch.setattr(quantization, "measure", measure)
    parts = explorer_parts(ledger.frame([]))
    assert "button measures it" in parts["answer"].value and not parts["picture"].value
    parts["button"].click()
    assert [
        f"Measuring <b>{recipe}</b>" in text for recipe, (text, *_) in zip(["none", RTN4], said, strict=True)
    ]
    assert all(disabled for _, disabled, _ in said) and not parts["button"].disabled
    assert said[0][2] == {"only": "quality", "windows": 2}
    assert "rtn 4-bit g64" in parts["answer"].value and bytes(parts["picture"].value).startswith(PNG)


def test_an_error_is_one_sentence(monkeypatch):
    def measure(recipe, **settings):
        raise MeasureError("none: The process was killed, most likely because <memory> ran out.")

    monkeypatch.setattr(quantization, "measure", measure)
    parts = explorer_parts(pd.DataFrame(ledger.frame([row("none", [2.0, 3.0])])))
    parts["button"].click()
    assert parts["answer"].value.endswith("because &lt;memory&gt; ran out.")
    assert not parts["button"].disabled


@pytest.mark.parametrize(
    "settings, recipe",
    [
        ((4, 64, False, 0), "quantize.rtn:bits=4,group_size=64"),
        ((2, 0, True, 8), "quantize.rtn:bits=2,group_size=0,symmetric=true,embedding_bits=8"),
    ],
)
def test_controls_become_a_canonical_recipe(settings, recipe):
    assert quantization.rtn_recipe(*settings) == recipe


# The exercises


@pytest.mark.parametrize("name, answer", [("group_within_budget", 96), ("levels_of_symmetric_two_bits", 3)])
def test_the_exercises_accept_the_answer_worked_by_hand_and_explain_mistakes(name, answer):
    assert check(name, answer).startswith("Right")
    for wrong, hint in EXERCISES[name]().mistakes:
        assert check(name, wrong) == f"Not yet: {hint}"
