"""Student's interval by hand and against scipy; pairs of windows, of items, and what is no pair."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgelab.measure.intervals import Interval, PairingError, accuracy, mean_interval, paired


@given(st.lists(st.tuples(st.floats(100, 2000), st.floats(100, 2000)), min_size=2, max_size=20))
def test_interval_is_that_of_student_for_windows_of_equal_length(pairs):
    nll, baseline = (list(column) for column in zip(*pairs, strict=True))
    found = paired(nll, baseline, [511] * len(pairs))
    difference = (np.array(nll) - np.array(baseline)) / 511
    if np.ptp(difference) == 0:  # scipy warns where nothing varies
        assert found.low == pytest.approx(found.high)
        return
    theirs = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(difference.mean(), abs=1e-9)
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, abs=1e-6),
        pytest.approx(theirs.high, abs=1e-6),
    )


def test_interval_by_hand():
    # Differences per token 1, 2, 3: mean 2, standard error 1 / sqrt(3), and 4.302653 is Student's t of two degrees.
    found = paired([20, 30, 40], [10, 10, 10], [10, 10, 10])
    reach = 4.302653 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - reach, 2 + reach), rel=1e-6)


def test_windows_weigh_by_their_tokens():
    found = paired([20.0, 3.0], [10.0, 4.0], [30, 10])
    assert found.mean == pytest.approx((23 - 14) / 40)
    # shares 3/4 and 1/4, differences 1/3 and -1/10: variance of the weighted mean, n / (n - 1) times
    deviations = (0.75 * (1 / 3 - 0.225), 0.25 * (-0.1 - 0.225))
    reach = 12.706205 * math.sqrt(2 * sum(part**2 for part in deviations))
    assert found.high - found.mean == pytest.approx(reach, rel=1e-6)


def test_one_window_has_no_interval():
    found = paired([12.0], [10.0], [4])
    assert found.mean == 0.5
    assert math.isnan(found.low) and math.isnan(found.high)


def test_a_constant_difference_is_certain():
    found = paired([11, 12, 13], [10, 11, 12], [4, 4, 4])
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_mean_interval_is_that_of_scipy(values):
    found = mean_interval(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    if np.ptp(values) > 1e-6:
        theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


@pytest.mark.parametrize(("nll", "baseline", "tokens"), [([1], [1, 2], [5, 5]), ([1, 2], [1, 2], [5])])
def test_other_windows_are_refused(nll, baseline, tokens):
    with pytest.raises(PairingError, match="measure both alike"):
        paired(nll, baseline, tokens)


def test_fields_of_a_row_hold_no_nan():
    assert mean_interval([2.0]).fields("delta") == {"delta": 2.0, "delta_low": None, "delta_high": None}
    assert Interval(1.0, 0.5, 1.5).fields("x") == {"x": 1.0, "x_low": 0.5, "x_high": 1.5}


def test_accuracy_of_a_baseline_by_hand():
    assert accuracy("word", [[True, False], [], [True]], None) == {
        "word": pytest.approx(2 / 3),
        "word_items": 3,
        "word_right": "10  1",
    }


def test_accuracy_beside_a_baseline_by_hand():
    found = accuracy("word", [[True, False], [], [True, True, False]], "11  000")
    assert (found["word_lost"], found["word_won"]) == (1, 2)
    # Clusters of 2 and 3 items differ by -1 and +2: mean 1/5, deviations -1 - 2/5 and 2 - 3/5, over 5 items.
    reach = 12.706205 * math.sqrt(2 * (1.4**2 + 1.4**2)) / 5
    assert found["delta_word"] == pytest.approx(0.2)
    assert found["delta_word_high"] - 0.2 == pytest.approx(reach, rel=1e-6)


@given(st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=6))
def test_answers_are_the_same_after_being_written_and_read(right):
    alone = accuracy("word", right, None)
    beside = accuracy("word", right, alone["word_right"])
    if alone["word_items"]:
        assert (beside["delta_word"], beside["word_lost"], beside["word_won"]) == (0, 0, 0)
    else:
        assert beside == alone and alone["word"] is None


def test_answers_to_other_items_are_refused():
    with pytest.raises(PairingError, match="baseline's 3 items of word are not these 2; measure both alike"):
        accuracy("word", [[True, False]], "1 01")
