"""Pictures of mixed precision and of methods, from tables written by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from edgelab.plots import (
    NothingToDraw,
    bit_allocation,
    largest_factor,
    method_lines,
    predicted_measured,
    predictions,
    predictors_measured,
    rank_correlations,
    sparsity_allocation,
)

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def layers():
    """Three blocks of two kinds."""
    return pd.DataFrame(
        {
            "block": [0, 0, 1, 1, 2, 2],
            "kind": ["q_proj", "down_proj"] * 3,
            "bits": [4, 2, 3, 8, 4, 6],
            "sensitivity": [1e-3, 1e-4, 0.0, 1e-1, 1e-2, 1e-3],
        }
    )


def test_every_layer_has_its_bits_at_its_place(layers):
    figure = bit_allocation(layers, "a title")
    upper, lower = figure.axes[:2]
    places = {tuple(text.get_position()): text.get_text() for text in upper.texts}
    expected = {(0, 0): "4", (0, 1): "2", (1, 0): "3", (1, 1): "8", (2, 0): "4", (2, 1): "6"}
    assert places == expected
    assert [tick.get_text() for tick in upper.get_yticklabels()] == ["q_proj", "down_proj"]
    assert upper.get_ylim() == (1.5, -0.5)  # the first kind on top
    assert upper.get_title(loc="left") == "a title" and lower.get_xlabel() == "Block"
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        f"{bits} bits" for bits in (2, 3, 4, 6, 8)
    ]
    assert figure._repr_png_()[0].startswith(PNG)


def test_colours_follow_bits_and_sensitivity(layers):
    figure = bit_allocation(layers)
    figure.draw_without_rendering()
    bits, minds = (axes.collections[0] for axes in figure.axes[:2])
    faces = bits.get_facecolors().reshape(2, 3, 4)  # kinds, blocks, colour
    assert (faces[0, 0] == faces[0, 2]).all() and (faces[0, 0] != faces[1, 0]).any()
    legend = {p.get_label(): to_hex(p.get_facecolor()) for p in figure.axes[0].get_legend().get_patches()}
    assert to_hex(faces[1, 1]) == legend["8 bits"] and to_hex(faces[1, 0]) == legend["2 bits"]
    drawn = np.asarray(minds.get_array()).reshape(2, 3)
    np.testing.assert_allclose(
        drawn, [[1e-3, 1e-6, 1e-2], [1e-4, 1e-1, 1e-3]]
    )  # nothing is drawn as a millionth
    assert minds.norm.vmin == 1e-6 and minds.norm.vmax == 0.1


def test_equal_layers_and_a_missing_one_are_drawn(layers):
    assert len(bit_allocation(layers.assign(sensitivity=0.0).iloc[:5]).axes[0].texts) == 5
    with pytest.raises(NothingToDraw, match="compute sensitivities first"):
        bit_allocation(layers.iloc[:0])


def test_sparsities_are_percent_at_their_place(layers):
    shares = layers.assign(sparsity=[0.5, 0.2, 0.35, 0.8, 0.0, 0.9])
    upper, lower = sparsity_allocation(shares, "a title").axes[:2]
    places = {tuple(text.get_position()): text.get_text() for text in upper.texts}
    assert places == {(0, 0): "50", (0, 1): "20", (1, 0): "35", (1, 1): "80", (2, 0): "0", (2, 1): "90"}
    assert {text.get_text(): text.get_color() for text in upper.texts}["90"] == "black"
    assert "half of this layer" in lower.get_title(loc="left")
    with pytest.raises(NothingToDraw, match="compute sensitivities first"):
        sparsity_allocation(shares.iloc[:0])


@pytest.fixture
def measured():
    """Four layers at two sparsities: at 0.5 Fisher has the order of the measurement, magnitude the opposite."""
    at_half = {"kl": [1e-4, 1e-3, 1e-2, 1e-1], "fisher": [1, 2, 3, 4], "gradient": [1, 2, 4, 3],
               "activation": [2, 1, 4, 3], "magnitude": [4, 3, 2, 0.0]}  # fmt: skip
    half = pd.DataFrame(at_half).assign(sparsity=0.5)
    return pd.concat([half.iloc[::-1].assign(sparsity=0.3), half], ignore_index=True)


def test_predictors_are_ordered_by_spearman(measured):
    half = measured[measured["sparsity"] == 0.5]
    found = rank_correlations(half)
    # Sum of squared rank differences d: 1 - 6 d / (n (n * n - 1)) with n = 4, so d = 0, 2, 4, 20.
    assert found.to_dict() == pytest.approx(
        {"fisher": 1, "gradient": 0.8, "activation": 0.6, "magnitude": -1}
    )
    figure = predictors_measured(measured, 0.5)
    assert figure.get_suptitle() == "Fisher orders layers most as the measurement does"
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "fisher: Spearman 1.00", "gradient: Spearman 0.80", "activation: Spearman 0.60", "magnitude: Spearman -1.00"
    ]  # fmt: skip
    np.testing.assert_allclose(
        figure.axes[0].collections[0].get_offsets(), [[1, 1e-4], [2, 1e-3], [3, 1e-2], [4, 0.1]]
    )
    assert len(figure.axes[3].collections[0].get_offsets()) == 3  # nothing has no place on a logarithmic axis
    assert figure._repr_png_()[0].startswith(PNG)
    with pytest.raises(NothingToDraw, match=r"at sparsity 0.4, only at 0.3, 0.5"):
        predictors_measured(measured, 0.4)


def row(recipe, predicted, kld, **changes):
    same = {"model": "tiny", "protocol": "edgelab-512", "corpus": "wiki", "n_tokens": 10, "fast": False}
    return {"recipe": recipe, "predicted_kld": predicted, "kld_mean": kld, "status": "ok", **same, **changes}


def test_the_newest_row_that_was_predicted_and_measured_counts():
    rows = [
        row("quantize.mixed:bits=4,group_size=64", 0.25, 0.2, started_at="1"),
        row("quantize.mixed:bits=4,group_size=64", 0.25, 0.3, started_at="2"),
        row("quantize.mixed:bits=3,group_size=64", 1.5, 1.25),
        row("quantize.rtn:bits=3,group_size=64", None, 1.0),
        row("quantize.mixed:bits=2,group_size=64", 6, 5.0, status="oom"),
        row("quantize.mixed:bits=5,group_size=64", 6, None),
    ]  # fmt: skip
    points = predictions(rows)
    assert sorted(points["measured"]) == [0.3, 1.25] and sorted(points["predicted"]) == [0.25, 1.5]
    assert "mixed 3-bit g64" in set(points["name"])
    with pytest.raises(NothingToDraw, match="measure the quality of a recipe"):
        predictions(rows[3:])
    with pytest.raises(NothingToDraw):
        predictions([{"recipe": "none"}])


def test_the_title_says_the_worst_factor_and_points_lie_in_the_band():
    points = pd.DataFrame(
        {"name": ["a", "b", "c"], "predicted": [0.1, 1.0, -0.1], "measured": [0.2, 0.8, 0.1]}
    )
    assert largest_factor(points) == pytest.approx(2)
    figure = predicted_measured(points, "Losses")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Losses: within a factor of 2.00"
    assert {text.get_text() for text in axes.texts} >= {"a", "b"} and "c" not in {
        t.get_text() for t in axes.texts
    }
    assert figure.get_supxlabel() == "Not drawn, because not above zero: 1."
    offsets = axes.collections[-1].get_offsets()
    np.testing.assert_allclose(offsets, [[0.1, 0.2], [1.0, 0.8]])
    assert math.isnan(largest_factor(points.iloc[2:]))
    with pytest.raises(NothingToDraw):
        predicted_measured(points.iloc[2:])


def test_many_points_without_names():
    values = np.geomspace(1e-4, 1, 60)
    figure = predicted_measured(pd.DataFrame({"predicted": values, "measured": values}))
    assert figure.axes[0].get_title(loc="left").endswith("factor of 1.00")
    assert figure.axes[0].get_xscale() == "log" and figure._repr_png_()[0].startswith(PNG)


def test_fast_points_are_stamped():
    points = pd.DataFrame({"name": ["a"], "predicted": [0.1], "measured": [0.1], "fast": [True]})
    assert "FAST" in predicted_measured(points).get_suptitle()


# Methods


@pytest.fixture
def points():
    cases = [("quantize.rtn", 4, 64, 28.0), ("quantize.rtn", 3, 64, 70.0), ("quantize.rtn", 4, 32, 27.0),
             ("quantize.mixed", 3, 64, 55.0), ("quantize.mixed", 4, 0, 25.0)]  # fmt: skip
    return pd.DataFrame(
        [
            {
                "recipe": f"{method}{bits}{size}",
                "method": method,
                "bits": bits,
                "group_size": size,
                "ppl": ppl,
                "fast": False,
            }
            for method, bits, size, ppl in cases
        ]
    )


def test_a_line_for_each_method_and_group_size(points):
    figure = method_lines(points, baseline=21.7, highlight="quantize.rtn464")
    axes = figure.axes[0]
    lines = [line for line in axes.lines if line.get_marker() == "o"]
    corners = [line.get_xydata().tolist() for line in lines]
    assert [[3, 70], [4, 28]] in corners and [[4, 27]] in corners and len(lines) == 4
    by_corner = {str(line.get_xydata().tolist()): line for line in lines}
    coarse, fine = by_corner["[[3.0, 70.0], [4.0, 28.0]]"], by_corner["[[4.0, 27.0]]"]
    assert coarse.get_color() == fine.get_color() != by_corner["[[3.0, 55.0]]"].get_color()
    assert coarse.get_linestyle() != fine.get_linestyle()
    written = {text.get_text() for text in axes.texts}
    assert {"rtn, g64", "rtn, g32", "mixed, g64", "mixed, per row", "baseline"} <= written
    assert axes.collections[0].get_offsets().tolist() == [[4, 28]]  # the ring
    with pytest.raises(NothingToDraw):
        method_lines(points.iloc[:0])
