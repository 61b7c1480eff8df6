"""Covering and seeking: students worked by hand, the picture, and the slider."""

import re

import numpy as np
import pytest

from edgelab.plots.distilling import covering_and_seeking, even_students, learned_over_seconds
from edgelab.plots.style import NothingToDraw
from edgelab.widgets.distilling import softened, temperature_slider


def test_even_students_by_hand():
    """Teacher (0.5, 0.5, 0, 0)-like: two tokens are covered exactly, one or three are not."""
    p = np.array([0.49, 0.49, 0.01, 0.01])
    found = even_students(p, [1, 2, 3], rest=0.02)
    assert found.loc[2].abs().max() == pytest.approx(0, abs=1e-12)
    q = np.array([0.98, 0.02 / 3, 0.02 / 3, 0.02 / 3])
    assert found.loc[1, "kl"] == pytest.approx((p * np.log(p / q)).sum())
    assert found.loc[1, "reverse_kl"] == pytest.approx((q * np.log(q / p)).sum())


def test_the_order_of_the_vocabulary_does_not_matter():
    p = softened(np.random.default_rng(0).normal(size=300), 1.0)
    one, other = even_students(p, [1, 5, 50]), even_students(p[::-1], [1, 5, 50])
    np.testing.assert_allclose(one, other)


def test_two_peaks_are_covered_by_one_and_sought_by_the_other():
    """One token of 0.6 and sixty that share 0.4: forward covers them all, reverse takes the peak."""
    p = np.array([0.6, *[0.4 / 60] * 60, *[1e-9] * 5000])
    figure = covering_and_seeking(p, ["a", "b"])
    covers, seeks = map(int, re.findall(r"[\d,]+", figure.axes[1].get_title(loc="left").replace(",", "")))
    assert seeks == 1 and 50 < covers < 70
    with pytest.raises(NothingToDraw, match="nothing to cover"):
        covering_and_seeking(np.ones(1), ["a"])


def test_softening_by_hand():
    np.testing.assert_allclose(softened(np.log([0.8, 0.2]), 1.0), [0.8, 0.2])
    np.testing.assert_allclose(softened(np.log([0.8, 0.2]), 2.0), [2 / 3, 1 / 3])


def test_a_hotter_teacher_is_covered_by_more_tokens():
    box = temperature_slider(np.random.default_rng(0).normal(size=500) * 3, [f"t{n}" for n in range(500)])
    slider, answer, image = box.children

    def covered():
        return int(re.search(r'data-kl="(\d+)"', answer.value)[1])

    before, picture = covered(), image.value
    slider.value = 10**0.2
    assert covered() > before and image.value != picture


def test_students_are_judged_by_the_text_over_seconds():
    """The one that learns from a teacher has two losses on held-out text; the cross-entropy is drawn."""
    taught = [{"seconds": 2.0, "loss": 1.0}, {"seconds": 4.0, "validation_loss": 0.5, "validation_nll": 3.5}]
    alone = [{"seconds": 3.0, "validation_loss": 4.0}]
    axes = learned_over_seconds({"taught": taught, "blind": taught[:1], "alone": alone}).axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [[[4.0, 3.5]], [[3.0, 4.0]]]
    with pytest.raises(NothingToDraw, match="validate=10"):
        learned_over_seconds({"blind": taught[:1]})
