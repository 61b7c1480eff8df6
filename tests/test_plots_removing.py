"""Pictures of what is removed whole, from rows and numbers by hand."""

import math
import subprocess
import sys

import pandas as pd
import pytest

from edgelab.ledger import Row
from edgelab.plots import NothingToDraw, chosen_and_random, influence_and_loss, truth_table, width_times

LAYERS, VOCAB, WANDA = "prune.layers:keep=20", "prune.vocab:keep=16384", "prune.wanda:sparsity=0.5"
STEPS = " + recover:steps=122"


def row(recipe, bits=1.0, weights_mb=500.0, family="prune", **changes):
    values = {
        "family": family, "model": "tiny", "protocol": "edgelab-512", "corpus": "wiki", "badge": "packed",
        "windows": 32, "n_tokens": 16352, "ppl": 20 * 2**bits, "bits_per_byte": bits, "weights_mb": weights_mb,
        "delta_bits_per_byte": bits - 1, "delta_bits_per_byte_low": bits - 1.1, "delta_bits_per_byte_high": bits - 0.9,
        "started_at": "2026-11-29T00:00:00",
    }  # fmt: skip
    return Row(recipe, **values | changes)


def timed(ratio, low=None, **more):
    return {
        "decode_ratio": ratio,
        "prefill_ratio": ratio,
        "decode_ratio_low": low,
        "decode_ratio_high": low and 2.0,
    } | more


@pytest.fixture
def table():
    none = row("none", family="baseline", delta_bits_per_byte=None)
    return [
        none,
        row(WANDA, 1.2, **timed(1.01, 0.95)),
        row(LAYERS, 1.5, 400.0, **timed(1.4, 1.3)),
        row(VOCAB, 1.1, 420.0, ppl=None, n_tokens=19000),
        row(LAYERS + STEPS, 1.3, 400.0, "prune", train_tokens=124_928),
    ]


def points(axes):
    """Places of everything drawn as a point, (x, y)."""
    return [tuple(one) for drawn in axes.collections for one in drawn.get_offsets().tolist()]


def names(axes):
    return [tick.get_text() for tick in axes.get_yticklabels()]


# The truth table


def test_a_line_for_each_recipe_with_the_best_on_top(table):
    figure = truth_table(table)
    quality, size, prefill, decode = figure.axes
    assert names(quality) == ["layers keep=20", "wanda 0.5 sparse", "vocab keep=16384"]
    assert sorted(points(quality)) == [(1.1, 2), (1.2, 1), (1.3, 0), (1.5, 0)]  # layers before and after
    assert sorted(points(size)) == [(400, 0), (420, 2), (500, 1)]
    assert sorted(points(prefill)) == sorted(points(decode)) == [(1.01, 1), (1.4, 0)]
    assert quality.get_title(loc="left") == "2 of 3 recipes are smaller, 1 of 2 that were timed write faster"
    assert "◀ after recovery on 124,928 tokens" in figure.get_supxlabel()
    assert figure._repr_png_()[0].startswith(b"\x89PNG")


def test_without_speeds_the_title_claims_none(table):
    slow = [Row(**vars(one) | {"decode_ratio": None, "prefill_ratio": None}) for one in table]
    assert truth_table(slow).axes[0].get_title(loc="left") == "2 of 3 recipes are smaller"


def test_speed_and_quality_may_come_from_different_rows_of_a_recipe(table):
    alone = Row(
        LAYERS, family="prune", model="tiny", badge="packed", started_at="2026-11-30", **timed(1.6, 1.5)
    )
    decode = truth_table([*table, alone]).axes[3]
    assert (1.6, 0) in points(decode) and (1.4, 0) not in points(decode)


def test_rows_of_another_text_and_failed_rows_are_not_in_it(table):
    other = row("prune.heads:groups=2", 3.0, corpus="web")
    failed = row("prune.hidden:share=0.25", 3.0, status="error")
    assert names(truth_table([*table, other, failed]).axes[0]) == names(truth_table(table).axes[0])


def test_speeds_of_an_engine_are_over_its_own_baseline(table):
    engine = row("none @ llamacpp", family="baseline", **timed(2.5))
    others = [row(f"{LAYERS} @ {name}", 1.5, 400.0, **timed(3.5)) for name in ("llamacpp", "onnxruntime")]
    figure = truth_table([*table, engine, *others])
    quality, _, prefill, decode = figure.axes
    assert len(names(quality)) == 5 and "relative to the same engine" in figure.get_supxlabel()
    assert sorted(x for x, _ in points(decode)) == sorted(x for x, _ in points(prefill)) == [1.01, 1.4, 1.4]


def test_a_row_far_off_is_named_and_stretches_no_axis(table):
    others = [row(f"prune.wanda:sparsity=0.{one}", 1 + one / 10) for one in (1, 2)]
    figure = truth_table([*table, *others, row("prune.wanda:sparsity=0.9", 3.6)])
    assert max(x for x, _ in points(figure.axes[0])) == 1.5
    assert "Too far off in bits per byte to be drawn: wanda 0.9 sparse (3.60)." in figure.get_supxlabel()


def test_of_several_rows_the_newest_counts_and_what_has_only_recovered_has_its_own_line(table):
    newer = row(WANDA, 1.4, started_at="2026-11-30")
    lonely = row("prune.channels:share=0.25" + STEPS, 1.25, 450.0, "prune", train_tokens=124_928)
    figure = truth_table([*table, newer, lonely])
    assert names(figure.axes[0])[2] == "channels share=0.25 + recover steps=122"
    assert (1.4, 1) in points(figure.axes[0])


@pytest.mark.parametrize("left", [slice(0, 0), slice(0, 1), slice(1, None)])
def test_the_truth_needs_a_baseline_and_something_else(table, left):
    with pytest.raises(NothingToDraw, match="measure"):
        truth_table(table[left])


def test_a_truth_table_needs_no_torch():
    code = (
        "import sys; from edgelab import ledger, plots; from edgelab.ledger import Row;"
        "about = dict(model='m', protocol='p', corpus='c', windows=1, n_tokens=9, weights_mb=1.0);"
        "rows = [Row(name, ppl=2.0, bits_per_byte=1.0, **about) for name in ('none', 'prune.layers:keep=2')];"
        "plots.truth_table(rows); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Blocks


def test_influence_and_loss_say_how_well_their_orders_agree():
    blocks = pd.DataFrame({"influence": [0.4, 0.1, 0.2, 0.3], "loss": [2.0, 0.1, 0.3, 0.2]})
    figure = influence_and_loss(blocks, most=1)
    (axes,) = figure.axes
    # Ranks (4, 1, 2, 3) and (4, 1, 3, 2): 1 - 6 * 2 / (4 * 15)
    assert axes.get_title(loc="left").endswith("Spearman 0.80")
    assert {text.get_text() for text in axes.texts} == {"block 0", "block 1"}
    assert len(points(axes)) == 4 and figure.get_supxlabel() == ""


def test_a_block_without_which_the_loss_is_lower_is_counted():
    blocks = pd.DataFrame({"influence": [0.4, 0.1, 0.2], "loss": [2.0, -0.1, 0.3]})
    figure = influence_and_loss(blocks)
    assert len(points(figure.axes[0])) == 2
    assert figure.get_supxlabel() == "Not drawn, because not above zero: 1."
    with pytest.raises(NothingToDraw, match="above zero"):
        influence_and_loss(blocks.assign(loss=0.0))


# Chosen and random


@pytest.fixture
def criteria():
    seeds = pd.DataFrame({"criterion": "random", "ppl": [50.0, 60, 55, 70, 65]})
    chosen = pd.DataFrame({"criterion": ["taylor", "magnitude"], "ppl": [40.0, 52.0]})
    return pd.concat([seeds, chosen], ignore_index=True).assign(fast=False)


def test_who_beats_every_seed_is_counted(criteria):
    (axes,) = chosen_and_random(criteria, baseline=20.0).axes
    assert axes.get_title(loc="left") == "1 of 2 criteria beat each of 5 random choices"
    assert names(axes) == ["magnitude", "random", "taylor"]
    assert sorted(points(axes)) == [(40, 2), (50, 1), (52, 0), (55, 1), (60, 1), (65, 1), (70, 1)]
    assert axes.patches[0].get_bbox().intervalx.tolist() == [50, 70]


def test_a_criterion_far_off_is_named_and_stretches_no_axis(criteria):
    far = pd.DataFrame({"criterion": ["activation"], "ppl": [812_345.0], "fast": False})
    figure = chosen_and_random(pd.concat([criteria, far]))
    assert names(figure.axes[0]) == ["magnitude", "random", "taylor"] and figure.axes[0].get_xlim()[1] < 100
    assert figure.axes[0].get_title(loc="left").startswith("1 of 3 criteria")
    assert figure.get_supxlabel() == "Far off, not drawn: activation (812,345)."


@pytest.mark.parametrize("only", ["random", "taylor"])
def test_a_control_needs_something_to_control(criteria, only):
    with pytest.raises(NothingToDraw, match=r"measure prune\.channels:by=random first"):
        chosen_and_random(criteria[criteria["criterion"] == only])


def test_points_without_a_perplexity_are_no_points(criteria):
    lost = criteria.assign(ppl=criteria["ppl"].where(criteria["criterion"] == "random", math.nan))
    with pytest.raises(NothingToDraw):
        chosen_and_random(lost)


# Widths


def test_times_are_relative_to_the_widest():
    ms = pd.DataFrame({"1 token": [1.0, 2.0], "128 tokens": [3.0, 4.0]}, index=[768, 1536])
    work, one, many = (line.get_xydata().tolist() for line in width_times(ms).axes[0].lines)
    assert work == [[768, 0.5], [1536, 1]]
    assert one == [[768, 0.5], [1536, 1]] and many == [[768, 0.75], [1536, 1]]
