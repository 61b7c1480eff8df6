"""The limit over measured points: where the lines lie, what the points say, what cannot be drawn."""

import io

import numpy as np
import pandas as pd
import pytest

from edgelab import plots
from edgelab.ledger import Row
from edgelab.plots.style import NothingToDraw

ROWS = [
    Row("none", weights_mb=500.0, decode_tok_s=20.0, badge="packed", host="a"),
    Row("quantize.rtn:bits=4,group_size=64", "quantize", weights_mb=100.0, decode_tok_s=50.0, badge="packed"),
]
POINTS = pd.DataFrame(
    {
        "name": ["int4", "int4", "float32"],
        "tokens": [8, 1, 1],
        "flop_per_byte": [32.0, 4.0, 0.5],
        "gflop_s": [90.0, 60.0, 9.0],
    }
)


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.axes[0].texts}


def test_the_limit_is_bandwidth_over_bytes_and_points_say_their_share():
    assert plots.limit_tok_s(500, 20) == 40
    figure = plots.decode_limit(ROWS, 20.0)
    line = figure.axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(line[:, 0] * line[:, 1], 20e3)
    assert line[0, 0] < 100 and line[-1, 0] > 500
    assert {"baseline, 50%", "rtn 4-bit g64, 25%", "20 GB/s ÷ bytes"} <= texts(figure)
    figure.savefig(io.BytesIO(), format="png")


def test_one_recipe_on_several_runtimes_is_named_by_the_runtimes():
    engines = [
        Row(f"{ROWS[1].recipe}{on}", "quantize", runtime=runtime, weights_mb=100.0, decode_tok_s=rate)
        for on, runtime, rate in (("", "torch", 50.0), (" @ openvino", "openvino", 100.0))
    ]
    assert {"baseline, 50%", "torch, 25%", "openvino, 50%"} <= texts(
        plots.decode_limit([ROWS[0], *engines], 20.0)
    )


def test_rows_of_fast_mode_and_failed_rows_are_said():
    failed = Row("quantize.bf16", "quantize", status="crashed")
    figure = plots.decode_limit(
        [*ROWS, failed, Row("none", fast=True, weights_mb=1.0, decode_tok_s=1.0)], 20.0
    )
    assert "FAST" in figure.get_suptitle()
    assert "1 (crashed)" in figure.get_supxlabel()


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_a_bandwidth_that_is_none(bandwidth):
    with pytest.raises(NothingToDraw, match="limits nothing"):
        plots.decode_limit(ROWS, bandwidth)


def test_nothing_measured():
    with pytest.raises(NothingToDraw, match="measure latency and size first"):
        plots.decode_limit([Row("none", weights_mb=1.0)], 20.0)
    with pytest.raises(NothingToDraw, match="measure layers first"):
        plots.roofline(POINTS[:0], 20.0, {"int8": 100.0})


def test_roofline_has_a_slope_a_roof_for_each_dtype_and_a_line_for_each_name():
    figure = plots.roofline(POINTS, 20.0, {"int8": 200.0, "float32": 60.0, "never": 5000.0})
    slope, *others = (line.get_xydata() for line in figure.axes[0].lines)
    np.testing.assert_allclose(slope[:, 1], 20 * slope[:, 0])
    int8, float32, int4, baseline = others  # a roof that no intensity reaches is left out
    assert int8[0].tolist() == [10.0, 200.0] and float32[0].tolist() == [3.0, 60.0]
    assert int4.tolist() == [[4.0, 60.0], [32.0, 90.0]] and baseline.tolist() == [[0.5, 9.0]]
    assert {"int4, 1 token", "int4, 8 tokens", "float32, 1 token", "int8 200", "20 GB/s"} <= texts(figure)
    figure.savefig(io.BytesIO(), format="png")
