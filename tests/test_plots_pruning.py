"""Pictures of single weights that go: masks, perplexity over sparsity, and where zeros pay, from numbers by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from edgelab.plots import NothingToDraw, break_even, kept_weights, sparsity_lines, what_zeros_buy

PNG = b"\x89PNG\r\n\x1a\n"


def words(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def note(figure):
    return figure.get_supxlabel()


# Which weights stay


def test_every_weight_is_drawn_where_its_size_and_its_input_put_it():
    weight, norm = np.array([3.0, -1.0, 2.0, 0.5]), np.array([1.0, 5.0, 4.0, 0.1])
    magnitude, wanda = np.array([1, 0, 1, 0], bool), np.array([0, 1, 1, 0], bool)
    figure = kept_weights(weight, norm, magnitude, wanda)
    axes = figure.axes[0]
    drawn = [points.get_offsets().tolist() for points in axes.collections]
    assert drawn == [[[4, 2]], [[5, 1]], [[1, 3]], [[0.1, 0.5]]]  # both, only Wanda, only magnitude, neither
    assert words(axes) == [
        "both keep it: 1",
        "only Wanda keeps it: 1",
        "only magnitude keeps it: 1",
        "both remove it: 1",
    ]
    assert (axes.get_xscale(), axes.get_yscale(), note(figure)) == ("log", "log", "")
    assert figure._repr_png_()[0].startswith(PNG)


def test_a_weight_of_zero_is_counted_and_not_drawn():
    weight, norm, kept = np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 2.0]), np.ones(3, bool)
    figure = kept_weights(weight, norm, kept, kept, ("one", "other"))
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[2, 2]]
    assert note(figure) == "Not drawn, because zero: 2."
    assert figure.axes[0].get_title(loc="left") == "Where one and other disagree"


# Perplexity over sparsity


@pytest.fixture
def points():
    return pd.DataFrame(
        {
            "method": ["prune.wanda", "prune.magnitude", "prune.wanda", "prune.magnitude"],
            "sparsity": [0.5, 0.5, 0.3, 0.7],
            "ppl": [40.0, 300.0, 25.0, 1234.5],
            "fast": False,
        }
    )


def test_lines_begin_at_the_baseline_and_end_where_sense_does(points):
    figure = sparsity_lines(points, baseline=20.0)
    axes = figure.axes[0]
    wanda, magnitude, level = (line.get_xydata().tolist() for line in axes.lines)
    assert wanda == [[0, 20], [30, 25], [50, 40]]
    assert magnitude == [[0, 20], [50, 300]]
    assert level == [[0, 20], [1, 20]]
    assert {text.get_text() for text in axes.texts} == {"wanda", "magnitude", "baseline"}
    assert note(figure) == "Above 20 times the baseline: magnitude at 70 %: 1,234."
    assert axes.get_ylim()[1] < 1000 and axes.get_yscale() == "log"


def test_without_a_perplexity_there_is_nothing_to_draw(points):
    with pytest.raises(NothingToDraw, match=r"measure prune\.wanda first"):
        sparsity_lines(points.assign(ppl=math.nan), 20.0)


# What zeros buy


def two(dense, sparse, at=(0.5, 0.7, 0.9)):
    return pd.DataFrame({"dense": dense, "sparse": sparse}, index=list(at))


def test_break_even_by_hand():
    # The gap goes from 2 at 70 % to -6 at 90 %: zero at 75 %
    assert break_even(two([4.0, 4, 10], [8.0, 6, 4])) == pytest.approx(0.75)
    assert break_even(two([9.0, 9, 9], [8.0, 6, 4])) == 0.5
    assert math.isnan(break_even(two([1.0, 1, 1], [3.0, 2, 1])))  # as fast is not faster
    # Ahead, 2 behind, 2 ahead: only the last time counts
    assert break_even(two([5.0, 5, 5], [4.0, 7, 3])) == pytest.approx(0.8)


def test_each_panel_says_where_sparse_wins():
    bits = pd.DataFrame({"float32": [32.0, 32.0], "bitmap": [33.0, 1.0]}, index=[0.0, 1.0])
    figure = what_zeros_buy(
        bits, {"1 token": two([4.0, 4, 10], [8.0, 6, 4]), "9 tokens": two([1] * 3, [3] * 3)}
    )
    storage, one, many = figure.axes
    assert [line.get_xydata().tolist() for line in storage.lines] == [
        [[0, 32], [100, 32]],
        [[0, 33], [100, 1]],
    ]
    assert words(storage) == ["float32", "bitmap"] and words(one) == ["dense", "sparse"]
    assert one.get_title(loc="left").split("\n") == ["1 token:", "faster from 75 % zeros"]
    assert many.get_title(loc="left").split("\n") == ["9 tokens:", "faster not up to 90 %"]
    assert one.get_ylim()[0] == 0
    assert figure._repr_png_()[0].startswith(PNG)


@pytest.mark.parametrize(("setting", "stamped"), [("1", True), ("", False)])
def test_fast_mode_is_stamped(monkeypatch, setting, stamped):
    monkeypatch.setenv("EDGELAB_FAST", setting)
    figure = what_zeros_buy(two([1] * 3, [3] * 3), {})
    assert ("FAST" in figure.get_suptitle()) is stamped
