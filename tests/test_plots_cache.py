"""The picture of the contexts that fit, from tables written by hand."""

import pandas as pd
import pytest

from edgelab.devices import catalogue, context_table, models
from edgelab.plots import NothingToDraw, context_reach


@pytest.fixture
def contexts():
    """Two devices that hold the weights, below and above them one that does not."""
    columns = {"memory_gb": [1.0, 6.0, 8.0], "16-bit cache": [0, 300, 4000], "4-bit cache": [0, 1000, 13_000]}
    return pd.DataFrame(columns, index=["watch", "phone", "board"])


def test_every_context_stands_beside_its_device(contexts):
    (axes,) = context_reach(contexts, title="a title").axes
    points = [
        tuple(map(tuple, dots.get_offsets().compressed().reshape(-1, 2))) for dots in axes.collections[1:]
    ]
    assert points == [((300, 1), (4000, 2)), ((1000, 1), (13_000, 2))]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "watch, 1 GB",
        "phone, 6 GB",
        "board, 8 GB",
    ]
    words = {text.get_text(): text.xy for text in axes.texts}
    assert words == {"16-bit": (4000, 2), "4-bit": (13_000, 2), "does not hold the weights": (0.01, 0)}
    assert axes.get_title(loc="left") == "a title" and "analytic" in axes.get_xlabel()
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and low < 300 and high > 13_000


def test_the_trained_context_is_a_line(contexts):
    (axes,) = context_reach(contexts, trained=2048).axes
    assert axes.lines[-1].get_xdata()[0] == 2048 and axes.texts[-1].get_text() == "trained on 2,048"
    assert not context_reach(contexts).axes[0].lines


def test_a_table_of_the_catalogue_is_drawn():
    table = context_table(models()["Llama-2-13B"], 6.9)
    picture, _ = context_reach(table, models()["Llama-2-13B"].context_length)._repr_png_()
    assert picture.startswith(b"\x89PNG") and len(table) < len(catalogue()) + 1


def test_where_nothing_fits_there_is_nothing_to_draw(contexts):
    with pytest.raises(NothingToDraw, match="no device holds the weights"):
        context_reach(contexts.iloc[:1])
