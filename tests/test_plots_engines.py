"""Engines in one picture: where points stand, what their colour says, which are named, and a failed gate."""

import pytest

from edgelab import plots
from edgelab.plots.engines import RUNTIME_COLOURS
from edgelab.plots.style import NothingToDraw

SAME = {
    "model": "tiny",
    "protocol": "edgelab-512",
    "corpus": "wiki",
    "n_tokens": 100,
    "host": "a",
    "threads": 2,
}


def row(recipe, ratio, ppl, megabytes, **more):
    runtime = recipe.partition(" @ ")[2] or "torch"
    return SAME | {
        "recipe": recipe,
        "family": "quantize",
        "runtime": runtime,
        "badge": "runtime",
        "decode_ratio": ratio,
        "ppl": ppl,
        "weights_mb": megabytes,
        **more,
    }


ROWS = [
    row("none", None, 20.0, 500),
    row("quantize.rtn:bits=4 @ onnxruntime", 6.0, 25.0, 90, parity="passed"),
    row("quantize.rtn:bits=4 @ llamacpp", 4.0, 90.0, 97, parity="failed"),
]


def drawn(figure):
    return figure.axes[0].collections


def test_points_stand_at_rate_and_quality_and_the_baseline_at_one():
    figure = plots.engines(ROWS)
    places = [tuple(one.get_offsets()[0]) for one in drawn(figure)]
    assert places == [(1.0, 20.0), (6.0, 25.0), (4.0, 90.0)]
    said = [text.get_text() for text in figure.axes[0].texts]
    assert "baseline, 500 MB" in said and "rtn 4-bit, 90 MB" in said
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        name for name in RUNTIME_COLOURS if name in ("torch", "onnxruntime", "llamacpp")
    ]


def test_what_an_engine_rounds_itself_is_called_native():
    figure = plots.engines([ROWS[0], row("native.int4 @ openvino", 5.0, 24.0, 92, family="native")])
    assert "native.int4, 92 MB" in [text.get_text() for text in figure.axes[0].texts]


def test_a_failed_gate_is_hollow_and_said():
    figure = plots.engines(ROWS)
    filled = [len(one.get_facecolor()) for one in drawn(figure)]
    assert filled == [1, 1, 0]
    assert "failed the parity gate" in figure._supxlabel.get_text()


def test_rows_without_speed_are_counted_not_drawn():
    figure = plots.engines([*ROWS, row("quantize.bf16", None, 20.1, 270)])
    assert len(drawn(figure)) == 3 and "1 without" in figure._supxlabel.get_text()
    with pytest.raises(NothingToDraw):
        plots.engines([row("quantize.bf16", None, 20.1, 270)])
