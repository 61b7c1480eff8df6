"""The outlier plot: what it says about its channels, and what it cannot draw."""

import io

import numpy as np
import pytest

from edgelab import plots
from edgelab.plots.style import NothingToDraw

BEFORE = np.array([1.0, 2.0, 508.0, 1.0, 3.0])
AFTER = np.array([4.0, 5.0, 8.0, 4.0, 0.0])
STEPS = 4.0, 8 / 255  # of the grids


def test_ratio_and_lost_channels_are_in_the_headings():
    figure = plots.activation_outliers(BEFORE, AFTER, STEPS, "layer 3")
    above, below = (axes.get_title(loc="left") for axes in figure.axes)
    assert above == "layer 3\nBefore smoothing: largest channel 254 x the median, 2 of 5 lost"
    assert below == "After smoothing: largest channel 2 x the median, 1 of 5 lost"


def test_a_line_for_each_channel_and_numbers_at_the_largest():
    figure = plots.activation_outliers(BEFORE, AFTER, STEPS)
    for axes, peaks in zip(figure.axes, (BEFORE, AFTER), strict=True):
        lines = axes.collections[0].get_segments()
        tops = [line[1][1] for line in lines]
        assert np.allclose([top for top, peak in zip(tops, peaks, strict=True) if peak], peaks[peaks > 0])
        assert {text.get_text() for text in axes.texts} == {str(i) for i in np.argsort(peaks)[-3:]}
        assert axes.get_ylim()[0] > 0
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.ones(3), np.ones(4)),
        (np.array([]), np.array([])),
        (np.zeros(3), np.ones(3)),
        (np.ones((2, 2)),) * 2,
    ],
)
def test_nothing_to_draw(before, after):
    with pytest.raises(NothingToDraw, match="as many channels, not all zero; these are"):
        plots.activation_outliers(before, after, STEPS)


def test_the_largest_channels_come_first_and_stand_out():
    figure = plots.channel_magnitudes(np.array([1.0, 1.0, 30.0, 2.0]), 0.25, "layer 3")
    (axes,) = figure.axes
    lines = axes.collections[0]
    assert [line[1][1] for line in lines.get_segments()] == [30, 2, 1, 1]
    colours = [tuple(each) for each in lines.get_colors()]
    assert colours[0] != colours[1] == colours[2] == colours[3]
    assert axes.get_title(loc="left") == "layer 3: the largest channel is 20 times the median"
    assert "the largest 1 of 4" in {text.get_text() for text in axes.get_legend().get_texts()}
    with pytest.raises(NothingToDraw, match="missing or all zero"):
        plots.channel_magnitudes(np.zeros(3), 0.01)
