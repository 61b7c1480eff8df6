"""Plots from rows written by hand: what is drawn, what is left out and said, which rows share a front."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from edgelab import plots
from edgelab.ledger import Field, Row, declare
from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.style import as_frame, new_chart, row_names
from edgelab.rows import UnknownMetric

BASELINE_WINDOWS = [3.0, 3.2, 2.8, 3.1]


def make_row(recipe="none", family="baseline", ppl=20.0, weights_mb=500.0, **fields):
    delta = math.log(ppl / 20.0)
    row = dict(
        row_id=f"id of {recipe}", recipe=recipe, family=family, model="tiny", runtime="torch", kernel="mm",
        badge="packed", seed=0, fast=False, status="ok", error=None, source="reader", host="laptop",
        protocol="edgelab-512", corpus="wiki", n_tokens=2044,
        ppl=ppl, delta_nll=delta, delta_nll_low=delta - 0.1, delta_nll_high=delta + 0.2,
        window_nll=[nll + delta for nll in BASELINE_WINDOWS],
        weights_mb=weights_mb, linear_mb=0.6 * weights_mb, embedding_mb=0.3 * weights_mb,
        scales_mb=0.05 * weights_mb, bits_per_weight=weights_mb / 16,
        prefill_tokens=128, ttft_ms_p50=100.0, tpot_ms_p50=40.0, tpot_ms_p95=50.0,
        decode_ratio=1.0, decode_ratio_low=0.9, decode_ratio_high=1.1, started_at="2026-11-23T10:00:00",
    )  # fmt: skip
    return row | fields


@pytest.fixture
def rows():
    return [
        make_row(),
        make_row(
            "quantize.rtn:bits=8,group_size=0", "quantize", 20.5, 200.0, tpot_ms_p50=30.0, decode_ratio=1.5
        ),
        make_row(
            "quantize.rtn:bits=4,group_size=64", "quantize", 26.0, 120.0, tpot_ms_p50=20.0, decode_ratio=2.0
        ),
        make_row("prune.layers:keep=20", "prune", 40.0, 300.0),
    ]


def texts(figure):
    """Everything written in a figure, in one string."""
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    written += [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
    written += [
        text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()
    ]
    written += [axes.get_title(loc="left") for axes in figure.axes]
    return "\n".join([*written, figure.get_suptitle(), figure.get_supxlabel()])


def curve(figure, colour):
    """Corners of the lines of one colour in the first axes, (lines) of (corners, 2)."""
    return [line.get_xydata() for line in figure.axes[0].lines if to_hex(line.get_color()) == colour]


FRONT = "#9a9a9a"
ALL_PLOTS = [plots.tradeoff, plots.size_bars, plots.latency, plots.window_delta]


def test_unknown_metric_names_the_known_ones(rows):
    with pytest.raises(UnknownMetric, match=r"'weight'.*weights_mb"):
        plots.tradeoff(rows, x="weight")


# Every plot


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_each_plot_takes_rows_dictionaries_and_frames_and_leaves_them_alone(plot, rows):
    records = [Row(**{name: value for name, value in row.items() if name != "source"}) for row in rows]
    assert "rtn" in texts(plot(records))
    frame = pd.DataFrame(rows)
    before = frame.copy(deep=True)
    assert texts(plot(frame)) == texts(plot(rows))
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_failed_rows_are_left_out_and_counted(plot, rows):
    crashed = make_row("quantize.rtn:bits=2", "quantize", status="oom", error="out of memory")
    written = texts(plot([*rows, crashed]))
    assert "measuring failed: 1 (oom)" in written
    assert "2-bit" not in written
    assert "bits=2" not in written


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_fast_is_stamped_only_on_fast_rows(plot, rows):
    assert "FAST" not in texts(plot(rows))
    rows[1]["fast"] = True
    assert "FAST" in texts(plot(rows))


@pytest.mark.parametrize("plot", ALL_PLOTS)
@pytest.mark.parametrize("given_rows", [[], [make_row(status="error", error="no")], [{"recipe": "none"}]])
def test_nothing_to_draw_says_what_to_measure(plot, given_rows):
    with pytest.raises(plots.NothingToDraw, match=r"measure .* first"):
        plot(given_rows)


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_a_figure_is_a_picture_in_a_notebook_and_keeps_off_pyplot(plot, rows):
    figure = plot(rows)
    picture, about = figure._repr_png_()
    assert picture.startswith(b"\x89PNG")
    assert "rtn 4-bit g64" in about["alt"] and figure.axes[0].get_xlabel() in about["alt"]
    from matplotlib import pyplot

    assert not pyplot.get_fignums()


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_dollar_signs_in_names_are_text(plot, rows):
    rows[1]["recipe"] = "quantize.$x:bits=$4"
    assert "$" in texts(plot(rows))
    plot(rows)._repr_png_()


# Trade-off


def test_tradeoff_draws_front_and_baseline(rows):
    figure = plots.tradeoff(rows)
    front = curve(figure, FRONT)
    assert len(front) == 1
    np.testing.assert_allclose(front[0], [(120, 26), (200, 26), (200, 20.5), (500, 20.5), (500, 20)])
    assert any(np.allclose(line[:, 1], 20) for line in curve(figure, "#000000"))
    assert figure.axes[0].get_yscale() == "linear"


def test_other_tokens_of_the_same_text_share_a_front_in_what_is_not_per_token(rows):
    whole = [one | {"windows": 4, "bits_per_byte": one["ppl"] / 20} for one in rows]
    vocab = make_row(
        "prune.vocab:keep=9", "prune", weights_mb=400.0, windows=4, n_tokens=2300, bits_per_byte=0.9
    )
    vocab |= {"ppl": None, "delta_nll": None, "window_nll": None}
    figure = plots.tradeoff([*whole, vocab], y="bits_per_byte")
    (front,) = curve(figure, FRONT)
    np.testing.assert_allclose(front, [(120, 1.3), (200, 1.3), (200, 1.025), (400, 1.025), (400, 0.9)])
    assert "comparable only" not in texts(figure)
    assert "same windows; here they differ" in texts(
        plots.tradeoff([*whole, vocab | {"windows": 9}], y="bits_per_byte")
    )
    per_token = texts(plots.tradeoff([*whole, vocab]))
    assert "its tokens are others and ppl is per token: vocab keep=9." in per_token
    assert "not measured" not in per_token


def test_a_front_finds_its_baseline_where_a_column_is_empty_in_all_rows(rows):
    with_bytes = [one | {"bits_per_byte": one["ppl"] / 20} for one in rows]  # and no windows
    assert any(
        np.allclose(line[:, 1], 1) for line in curve(plots.tradeoff(with_bytes, y="bits_per_byte"), "#000000")
    )


def test_stairs_of_a_metric_that_should_be_high():
    rows = [make_row(decode_ratio=1.0), make_row("quantize.rtn:bits=4", "quantize", 26.0, decode_ratio=2.0)]
    front = curve(plots.tradeoff(rows, x="decode_ratio"), FRONT)[0]
    np.testing.assert_allclose(front, [(1, 20), (1, 26), (2, 26)])


def test_a_collapsed_model_is_named_and_stretches_no_axis(rows):
    collapsed = make_row("quantize.rtn:bits=2", "quantize", 8000.0, 90.0)
    figure = plots.tradeoff([*rows, collapsed])
    assert figure.axes[0].get_ylim()[1] < 60
    assert "Far off, not drawn: perplexity of rtn 2-bit (8,000.00)." in figure.get_supxlabel()
    assert plots.tradeoff([*rows, collapsed], highlight=collapsed["recipe"]).axes[0].get_ylim()[1] > 8000
    several = [make_row(f"quantize.rtn:bits={bits}", "quantize", 8000.0 - bits, 90.0) for bits in (1, 2, 3)]
    assert plots.tradeoff([*rows, *several]).axes[0].get_yscale() == "log"


def test_a_baseline_of_many_more_bytes_is_a_line_with_its_size(rows):
    cached = make_row("quantize.kv:bits=4", "quantize", 20.1, 500.0)
    figure = plots.tradeoff([rows[0], cached, *rows[1:3]])
    assert figure.axes[0].get_xlim()[1] < 250
    assert "baseline: 500.0 MB" in texts(figure)
    assert "As large as the baseline, not drawn: perplexity of kv 4-bit (20.10)." in figure.get_supxlabel()


def test_of_many_rows_the_front_is_named(rows):
    crowd = [make_row(f"quantize.rtn:bits=4,seed={n}", "quantize", 27.0 + n, 130.0 + n, source="reference")
             for n in range(20)]  # fmt: skip
    reference = [row | {"source": "reference"} for row in rows]
    figure = plots.tradeoff([*reference, *crowd])
    assert {text.get_text() for text in figure.axes[0].texts} == {
        "rtn 4-bit g64", "rtn 8-bit per row", "baseline"
    }  # fmt: skip


def test_an_engine_s_copy_is_drawn_where_speed_is_asked_for(rows):
    reference = [row | {"source": "reference"} for row in rows]
    there = dict(badge="runtime", parity="passed", runtime="onnxruntime", source="reference")
    engine = make_row("quantize.rtn:bits=4,group_size=64 @ onnxruntime", "quantize", 26.1, 121.0, **there)
    by_size = plots.tradeoff([*reference, engine])
    by_speed = plots.tradeoff([*reference, engine], x="decode_ratio")
    assert [len(figure.axes[0].collections) for figure in (by_size, by_speed)] == [4, 5]


def test_labels_keep_off_slanted_lines():
    figure = new_chart(4, 3)
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10))
    slanted = np.array([(0.0, 0.0), (10.0, 10.0)])
    label_marks(axes, [Mark(5.0, 5.0, "a label", "black")], [slanted])
    box = Text.get_window_extent(axes.texts[0])
    places = axes.transData.transform(np.linspace(slanted[0], slanted[1], 1000))
    assert not any(box.contains(*place) for place in places)


def test_the_tasks_are_an_axis_with_their_interval(rows):
    tasks = {
        "last_word": 0.4,
        "delta_last_word": -0.1,
        "delta_last_word_low": -0.15,
        "delta_last_word_high": -0.04,
    }
    figure = plots.tradeoff([rows[0] | {"last_word": 0.5}, rows[1] | tasks], y="last_word")
    bars = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert any(bar == pytest.approx([0.35, 0.46]) for bar in bars)
    assert figure.axes[0].get_ylabel() == "Last words predicted (share of sentences), higher is better"


def test_a_stranger_s_field_is_an_axis(rows, monkeypatch):
    monkeypatch.setattr("edgelab.ledger.row.OTHERS", {})
    declare({"warmth_c": Field("Warmth", unit="°C", better="lower")})
    warm = [Row(row["recipe"], ppl=row["ppl"], extra={"warmth_c": 40.0 + row["ppl"]}) for row in rows]
    figure = plots.tradeoff(warm, x="warmth_c")
    assert sorted(points.get_offsets()[0][0] for points in figure.axes[0].collections) == [60, 60.5, 66, 80]
    assert figure.axes[0].get_xlabel() == "Warmth (°C), lower is better"


def test_highlight_by_recipe_or_row_id_and_a_note_when_it_is_missing(rows):
    recipe = rows[2]["recipe"]
    for name in (recipe, f"id of {recipe}"):
        figure = plots.tradeoff(rows, highlight=name)
        bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
        assert bold == ["rtn 4-bit g64"]
    assert "Nothing measured yet for quantize.hqq" in texts(plots.tradeoff(rows, highlight="quantize.hqq"))


def test_families_keep_their_colour_and_unknown_ones_are_grey(rows):
    figure = plots.tradeoff([*rows, make_row("new.thing", "new", 30.0, 400.0)])
    colours = {text.get_text(): to_hex(text.get_color()) for text in figure.axes[0].texts}
    assert colours["rtn 4-bit g64"] == plots.FAMILY_COLOURS["quantize"].lower()
    assert colours["baseline"] == "#000000"
    assert colours["thing"] == "#6b6b6b"


def test_labels_do_not_overlap_each_other(rows):
    crowd = [make_row(f"quantize.rtn:bits=4,group_size={size}", "quantize", 26 + size / 99, 120 + size / 9)
             for size in (32, 64, 96, 192)]  # fmt: skip
    figure = plots.tradeoff([*rows[:2], *crowd])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without their leaders
    assert len(boxes) == 6
    assert all(first.count_overlaps(boxes[index + 1 :]) == 0 for index, first in enumerate(boxes))


def test_the_readers_rows_come_over_the_reference_and_are_labelled_once(rows):
    reference = [row | {"source": "reference", "host": "lab"} for row in rows]
    figure = plots.tradeoff(rows + reference)
    sizes = [points.get_sizes()[0] for points in figure.axes[0].collections]
    assert sizes == [24.0] * 4 + [70.0] * 4
    written = [text.get_text() for text in figure.axes[0].texts]
    assert len(written) == len(set(written))
    assert "yours" in texts(figure)


def test_only_the_newest_of_equal_measurements_is_drawn(rows):
    newer = rows[1] | {"ppl": 20.7, "started_at": "2026-11-24T10:00:00"}
    points = plots.tradeoff([newer, *rows]).axes[0].collections
    assert sorted(point.get_offsets()[0][1] for point in points) == [20.0, 20.7, 26.0, 40.0]


def test_speed_and_size_are_not_repeated_for_a_second_protocol(rows):
    other = [row | {"protocol": "gptq-2048"} for row in rows]
    assert len(plots.latency(rows + other).axes[0].get_yticks()) == 4
    assert len(plots.size_bars(rows + other).axes[0].get_yticks()) == 4


def test_times_of_two_machines_are_not_ranked_together(rows):
    elsewhere = [row | {"host": "server", "tpot_ms_p50": row["tpot_ms_p50"] / 9} for row in rows]
    figure = plots.tradeoff(rows + elsewhere, x="tpot_ms_p50")
    assert len(curve(figure, FRONT)) == 2
    assert "several machines (laptop, server) and must not be ranked together" in texts(figure)
    assert "machines" not in texts(plots.tradeoff(rows + elsewhere, x="weights_mb"))
    assert "machines" not in texts(plots.tradeoff(rows, x="tpot_ms_p50"))
    both = plots.latency(rows + elsewhere)
    assert "must not be ranked together" in texts(both)
    assert "layers keep=20, server" in texts(both)


def test_perplexities_of_two_protocols_share_no_front(rows):
    other = [row | {"protocol": "gptq-2048", "ppl": row["ppl"] - 5} for row in rows]
    figure = plots.tradeoff(rows + other)
    assert len(curve(figure, FRONT)) == 2
    assert "of the same protocol; here they differ" in texts(figure)


def test_a_failed_parity_gate_keeps_a_row_from_the_speed_front_only(rows):
    rows[2]["parity"] = "failed"
    figure = plots.tradeoff(rows, x="decode_ratio")
    assert curve(figure, FRONT)[0][:, 0].max() == 1.5
    assert "failed the parity gate" in texts(figure)
    assert curve(plots.tradeoff(rows), FRONT)[0][:, 0].min() == 120


# Size


def test_bars_add_up_to_the_weights(rows):
    figure = plots.size_bars(rows)
    ends = {}
    for bar in figure.axes[0].patches:
        ends[bar.get_y()] = ends.get(bar.get_y(), 0) + bar.get_width()
    assert sorted(ends.values()) == pytest.approx([120, 200, 300, 500])
    assert "120.0 MB, 7.50 bits/weight (packed)" in texts(figure)
    assert "not counted" not in texts(figure)


def test_a_size_without_parts_says_so():
    row = make_row(badge="analytic", linear_mb=None, embedding_mb=None, scales_mb=None, bits_per_weight=None)
    written = texts(plots.size_bars([row]))
    assert "not counted" in written
    assert "500.0 MB (analytic)" in written
    assert "norms" not in written


# Latency


def test_latency_whiskers_reach_from_p50_to_p95_and_over_the_spread_of_the_ratio(rows):
    per_token, _, ratio = plots.latency(rows[:1]).axes
    assert any(np.allclose(line.get_xdata(), [40, 50]) for line in per_token.lines)
    assert any(np.allclose(line.get_xdata(), [0.9, 1.1]) for line in ratio.lines)


def test_a_stall_does_not_squeeze_the_others(rows):
    rows[2]["tpot_ms_p95"] = 1600.0
    figure = plots.latency(rows)
    assert figure.axes[0].get_xlim()[1] < 100
    assert "rtn 4-bit g64 1,600 ms" in figure.get_supxlabel()
    assert "stalled" not in plots.latency(rows[:2]).get_supxlabel()


def test_latency_draws_rows_without_a_ratio(rows):
    rows[0] |= {
        "decode_ratio": None,
        "decode_ratio_low": None,
        "decode_ratio_high": None,
        "ttft_ms_p50": None,
    }
    assert len(plots.latency(rows).axes[2].collections) == 3


# Difference per window


def test_window_delta_pairs_windows_and_shows_the_recorded_interval(rows):
    rows[2]["window_nll"] = [3.1, 3.5, 2.9, 3.3]  # 0.1, 0.3, 0.1, 0.2 above the baseline
    rows[2] |= {"delta_nll": 0.175, "delta_nll_low": 0.05, "delta_nll_high": 0.3}
    figure = plots.window_delta([rows[0], rows[2]])
    points = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], [0.1, 0.3, 0.1, 0.2])
    assert "mean +0.1750, 95 % interval [+0.0500, +0.3000], perplexity × 1.191" in texts(figure)
    for row in (rows[0], rows[2]):  # 1,500 tokens are 1,000 words
        row |= {"protocol": "lm-eval-word", "n_tokens": 1500, "nll_sum": 4500.0, "ppl": math.exp(4.5)}
    assert "perplexity × 1.300" in texts(plots.window_delta([rows[0], rows[2]]))


def test_window_delta_computes_students_interval_for_another_baseline(rows):
    rows[2]["window_nll"] = list(np.add(rows[1]["window_nll"], [0.1, 0.3, 0.1, 0.2]))
    figure = plots.window_delta(rows[1:3], baseline=rows[1]["recipe"])
    # Mean 0.175, standard deviation 0.09574, four windows: 3.1824 × 0.09574 / 2 = 0.1523.
    assert "mean +0.1750, 95 % interval [+0.0227, +0.3273]" in texts(figure)


def test_window_delta_pairs_only_rows_of_the_same_protocol(rows):
    rows[2]["protocol"] = "gptq-2048"
    with pytest.raises(plots.NothingToDraw, match="per-window NLL beside 'none'"):
        plots.window_delta([rows[0], rows[2]])


# Names


@pytest.mark.parametrize(
    ("recipe", "short"),
    [
        ("none", "baseline"),
        ("quantize.bf16", "bf16"),
        ("quantize.rtn:bits=4,group_size=64", "rtn 4-bit g64"),
        ("quantize.rtn:bits=4,embedding_bits=8,group_size=64", "rtn 4-bit emb 8-bit g64"),
        (
            "prune.wanda:sparsity=0.5 + quantize.awq:bits=4 @ llamacpp",
            "wanda 0.5 sparse + awq 4-bit @ llamacpp",
        ),
        ("quantize.gptq:bits=4,group_size=0,symmetric=true", "gptq 4-bit per row sym"),
        ("quantize.rtn:bits=8,group_size=0 + quantize.embedding:bits=8", "rtn 8-bit per row + emb 8-bit"),
        ("prune.layers:keep=0,drop=15/16", "layers without 15/16"),
        ("prune.layers:keep=0,drop=13/14/15/16/17", "layers without 13/14/15/16/17"),
        (
            "prune.layers:keep=0,drop=3/4/5/6/7/12/13/14/15/16/17/18/19/25/26 + distill:loss=kl,steps=122",
            "without 15 layers + distill loss=kl steps=122",
        ),
        ("prune.vocab:keep=0 @ llamacpp", "vocab @ llamacpp"),
        ("prune.layers:keep=20", "layers keep=20"),
    ],
)
def test_label_shortens_recipes(recipe, short):
    assert plots.label(recipe) == short


def test_names_tell_equal_recipes_apart(rows):
    frame = as_frame([rows[0], rows[0] | {"model": "other"}, rows[1]])
    assert row_names(frame) == ["baseline, tiny", "baseline, other", "rtn 8-bit per row"]
