"""Questions to tables of rows: fronts, budgets, pairs and recommendations, from rows written by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab import assets, ledger, rows
from edgelab.ledger import Row
from edgelab.measure.intervals import PairingError

RTN4 = "quantize.rtn:bits=4,group_size=64"
GPTQ4 = "quantize.gptq:bits=4,group_size=64"


def row(recipe, window_nll, weights_mb=100.0, **changes):
    values = {
        "model": assets.EMBEDDED_NAME,
        "protocol": "edgelab-512",
        "corpus": "wiki",
        "badge": "packed",
        "n_tokens": 511 * len(window_nll),
        "ppl": math.exp(sum(window_nll) / len(window_nll)),
        "weights_mb": weights_mb,
        "window_nll": window_nll,
    }
    return Row(recipe, **values | changes)


# The Pareto front


def test_pareto_front_by_hand():
    frame = pd.DataFrame(
        {
            "weights_mb": [500, 200, 120, 300, 200, np.nan],
            "ppl": [20, 20.5, 26, 40, 22, 10],
            "name": list("abcdef"),
        }
    )
    assert list(rows.pareto_front(frame, "weights_mb", "ppl")["name"]) == ["c", "b", "a"]


def test_pareto_front_follows_the_direction_of_each_metric():
    frame = pd.DataFrame({"decode_tok_s": [10, 20, 30], "ppl": [20, 20, 25], "name": list("abc")})
    assert list(rows.pareto_front(frame, "decode_tok_s", "ppl")["name"]) == ["b", "c"]


def test_pareto_front_keeps_equal_rows():
    frame = pd.DataFrame({"weights_mb": [1.0, 1.0], "ppl": [2.0, 2.0]})
    assert len(rows.pareto_front(frame, "weights_mb", "ppl")) == 2


small = st.integers(0, 6)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=30), st.booleans())
def test_no_row_beats_the_front_and_the_front_beats_every_other_row(points, higher_is_better):
    x = "decode_tok_s" if higher_is_better else "weights_mb"
    frame = pd.DataFrame(points, columns=[x, "ppl"])
    front = rows.pareto_front(frame, x, "ppl")

    def beats(a, b):
        x_as_good = a[x] >= b[x] if higher_is_better else a[x] <= b[x]
        return x_as_good and a["ppl"] <= b["ppl"] and (a[x] != b[x] or a["ppl"] != b["ppl"])

    every = frame.to_dict("records")
    best = front.to_dict("records")
    assert best
    assert not any(beats(row, member) for row in every for member in best)
    others = frame.drop(front.index).to_dict("records")
    assert all(any(beats(member, row) for member in best) for row in others)


def test_an_unknown_metric_is_answered_with_the_known_ones():
    with pytest.raises(rows.UnknownMetric, match=r"'recipe'; there are ppl, .*weights_mb"):
        rows.find_metric("recipe")  # a field, but neither of its directions is better


# Which rows compare


@pytest.fixture
def measured():
    """Two windows each, but for one row of one window; a simulated row is the best and the smallest of 4 bits."""
    return ledger.frame(
        [
            row("none", [2.9, 3.1], 500.0, decode_tok_s=10.0, peak_rss_mb=600.0),
            row("quantize.bf16", [2.91, 3.11], 250.0, decode_tok_s=15.0, peak_rss_mb=320.0),
            row(RTN4, [3.2, 3.3], 120.0, peak_rss_mb=400.0),
            row("quantize.nf4:group_size=64", [3.0, 3.2], 110.0, badge="simulated"),
            row("quantize.rtn:bits=8,group_size=0", [2.3], 90.0, peak_rss_mb=100.0),
        ]
    )


def test_only_rows_of_the_same_windows_have_an_order(measured):
    kept = rows.comparable(measured)
    assert list(kept.index) == [0, 1, 2, 3]
    with pytest.raises(rows.NotMeasured, match="no row has ppl and weights_mb: measure first"):
        rows.comparable(measured.assign(status="error"))


def test_many_rows_of_quality_alone_do_not_outvote_those_with_a_speed(measured):
    few = measured.assign(n_tokens=511, decode_tok_s=None)
    many = pd.concat([measured, *(few.assign(recipe=few["recipe"] + str(copy)) for copy in range(3))])
    assert set(rows.comparable(many)["n_tokens"]) == {1022}


def test_of_equal_measurements_the_newest_counts_and_the_reader_s_before_the_project_s():
    table = ledger.frame(
        [row(RTN4, [nll], started_at=str(day)) for day, nll in ((2, 1.0), (1, 2.0), (3, 3.0))]
    )
    assert rows.newest(table, ["recipe"])["ppl"].item() == pytest.approx(math.exp(3))
    assert rows.newest(table.assign(source=["reader", "reader", "reference"]), ["recipe"]).index == [0]


# Pairs


def test_of_a_recipe_with_and_without_a_small_embedding_the_smaller_is_kept():
    small = " + quantize.embedding:bits=8"
    recipes = ["none", "quantize.rtn:bits=4", "quantize.rtn:bits=4" + small, "quantize.hqq:bits=4",
               "quantize.hqq:bits=4" + small + " @ llamacpp"]  # fmt: skip
    kept = rows.small_embedding(pd.DataFrame({"recipe": recipes}))
    assert kept["recipe"].tolist() == [recipes[0], *recipes[2:]]


def test_two_rows_are_compared_window_by_window():
    table = ledger.frame(
        [row("none", [2.0, 4.0, 3.0], started_at="1"), row(RTN4, [2.1, 4.3, 3.2], started_at="2")]
    )
    found = rows.paired(table, RTN4)
    # Mean 0.2, standard deviation 0.1, three windows: 4.3027 × 0.1 / √3 = 0.2484.
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, -0.0484, 0.4484), abs=1e-4)
    assert rows.paired(table, "none", RTN4).mean == pytest.approx(-0.2)


def test_two_recipes_are_compared_seed_by_seed_and_over_the_means_of_all():
    """Seeds 0 and 1 have both, seed 2 one of them; the newest of two rows counts."""
    first, second = [3.0, 4.0], [3.4, 4.2]
    made = [
        row(RTN4, [9.0, 9.0], seed=0),
        row("none", first, seed=0),
        row(RTN4, [2.8, 3.6], seed=0),
        row("none", second, seed=1),
        row(RTN4, [3.4, 4.0], seed=1),
        row(RTN4, [1.0, 1.0], seed=2),
    ]
    found = rows.over_seeds(ledger.frame(made), RTN4, "none")
    assert found.index.tolist() == [0, 1, "all"]
    assert found["delta_nll"].tolist() == pytest.approx([-0.3, -0.1, -0.2])
    assert found.loc["all", "ppl"] == pytest.approx(math.exp(3.45))
    assert found.loc["all", "ppl_other"] == pytest.approx(math.exp(3.65))
    with pytest.raises(PairingError, match="No seed has rows of"):
        rows.over_seeds(ledger.frame(made), RTN4, GPTQ4)


def test_a_pair_in_words_says_whether_its_windows_tell_the_two_apart():
    nll = {"none": [2.0, 4.0, 3.0], RTN4: [2.1, 4.3, 3.2], GPTQ4: [2.2, 4.2, 3.2]}
    table = ledger.frame([row(recipe, windows) for recipe, windows in nll.items()])
    said = rows.paired_in_words(table, RTN4)
    assert said.endswith("3 windows: +0.2000 nats per token, 95 % interval -0.0484 to +0.4484: "
                         "not told apart by these windows.")  # fmt: skip
    assert rows.paired_in_words(table, GPTQ4).endswith("+0.2000 to +0.2000: worse.")
    assert rows.paired_in_words(table, "none", GPTQ4).endswith("-0.2000 to -0.2000: better.")
    assert "measure both in one comparison" in rows.paired_in_words(table, "quantize.bf16")
    one = ledger.frame([row("none", [2.0]), row(RTN4, [2.1])])
    assert rows.paired_in_words(one, RTN4).endswith("+0.1000 nats per token; one window gives no interval.")


def test_overlapping_intervals_may_belong_to_rows_that_are_told_apart():
    nll = {"a": [2.3, 4.1, 3.5], "b": [2.2, 4.0, 3.4], "c": [3.3, 4.9, 3.8]}  # a is above b by 0.1 everywhere
    like = {"a": (0.3, 0.1, 0.5), "b": (0.2, 0.0, 0.4), "c": (1.0, 0.9, 1.1)}
    names = ("delta_nll", "delta_nll_low", "delta_nll_high")
    table = [row(recipe, nll[recipe], **dict(zip(names, like[recipe], strict=True))) for recipe in nll]
    found = rows.overlapping(ledger.frame([row("none", [2.0, 3.9, 3.1]), *table]))
    assert found[["recipe", "other"]].to_numpy().tolist() == [["a", "b"]]
    assert found.loc[0, list(names)].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert rows.overlapping(ledger.frame(table[1:])).empty


def test_rows_of_other_windows_are_no_pair():
    table = ledger.frame(
        [row("none", [2.0, 3.0]), row(RTN4, [2.1]), row(GPTQ4, [2.1, 3.0], corpus="stories")]
    )
    for recipe in (RTN4, GPTQ4):
        with pytest.raises(PairingError, match="read the same windows; measure both"):
            rows.paired(table, recipe)


@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=2, max_size=20))
def test_a_pair_turned_round_has_the_interval_turned_round(windows):
    mine, other = (list(nll) for nll in zip(*windows, strict=True))
    table = ledger.frame([row("none", other), row(RTN4, mine)])
    there, back = rows.paired(table, RTN4), rows.paired(table, "none", RTN4)
    assert (there.low, there.mean, there.high) == pytest.approx(
        (-back.high, -back.mean, -back.low), abs=1e-12
    )
    assert there.low <= there.mean <= there.high


def test_the_interval_of_a_value_is_the_baseline_s_moved_by_the_ends_of_the_difference():
    delta = {"delta_nll": 0.2, "delta_nll_low": 0.1, "delta_nll_high": 0.4}
    words = {"delta_last_word": -0.1, "delta_last_word_low": -0.2, "delta_last_word_high": 0.0}
    ratio = {"decode_ratio": 2.0, "decode_ratio_low": 1.9, "decode_ratio_high": 2.2}
    table = ledger.frame([row(RTN4, [math.log(20) + 0.2], last_word=0.3, **delta | words | ratio)])
    assert rows.interval_ends(table, "ppl")[0] == pytest.approx([20 * math.exp(0.1), 20 * math.exp(0.4)])
    assert rows.interval_ends(table, "last_word")[0] == pytest.approx([0.2, 0.4])
    assert rows.interval_ends(table, "decode_ratio")[0] == pytest.approx([1.9, 2.2])
    assert np.isnan(rows.interval_ends(table, "weights_mb")).all()
    assert np.isnan(rows.interval_ends(ledger.frame([row("none", [1.0])]), "ppl")).all()


def test_the_interval_of_perplexity_per_word_is_one_of_words():
    """1,500 tokens are 1,000 words: 0.02 nats per token either way are 0.03 per word."""
    delta = {"delta_nll": 0.1, "delta_nll_low": 0.08, "delta_nll_high": 0.12}
    made = {"protocol": "lm-eval-word", "n_tokens": 1500, "nll_sum": 4350.0, "ppl": math.exp(4.35)}
    table = ledger.frame([row(RTN4, [2.9], **made | delta), row("none", [2.8], nll_sum=1430.8)])
    assert rows.tokens_per_unit(table).tolist() == pytest.approx([1.5, 1])
    assert rows.interval_ends(table, "ppl")[0] == pytest.approx([math.exp(4.32), math.exp(4.38)])


# The first windows


def test_longer_rows_answer_for_their_first_windows():
    table = ledger.frame(
        [
            row("none", [2.0, 3.0, 4.0]),
            row(RTN4, [2.5, 3.1, 9.0]),
            row(RTN4, [2.5]),
            row(RTN4, [1.0, 1.0], corpus="stories"),
            row(RTN4, [1.0, 1.0], protocol="gptq-2048"),
            row(RTN4, [1.0, 1.0], model="other"),
            row(RTN4, [1.0, 1.0], fast=True),
            Row(RTN4, status="oom", model=assets.EMBEDDED_NAME),
        ]
    )
    cut = rows.first_windows(table, 2)
    assert list(cut.index) == [0, 1]
    assert list(cut["ppl"]) == pytest.approx([np.exp(2.5), np.exp(2.8)])
    assert list(cut["n_tokens"]) == [1022, 1022]
    assert cut["delta_nll"].iloc[1] == pytest.approx(0.3)
    assert cut["delta_nll_low"].iloc[1] < 0.3 < cut["delta_nll_high"].iloc[1]
    assert list(table["n_tokens"][:2]) == [1533, 1533]  # the rows given are left alone
    assert rows.first_windows(table, 9).empty and "ppl" in rows.first_windows(table, 9)


def test_last_words_are_cut_with_their_windows():
    table = ledger.frame(
        [
            row("none", [2.0, 3.0, 4.0], last_word=0.6, last_word_right="11 10 00"),
            row(RTN4, [2.5, 3.1, 9.0], last_word=0.2, last_word_right="10 00 00"),
            row(GPTQ4, [2.5, 3.1, 9.0], last_word=0.2, last_word_right="100 000 000"),  # other sentences
        ]
    )
    cut = rows.first_windows(table, 2)
    assert list(cut["last_word"]) == pytest.approx([0.75, 0.25, 1 / 6])
    assert list(cut["last_word_right"]) == ["11 10", "10 00", "100 000"]
    assert math.isnan(cut["delta_last_word"].iloc[2])
    assert cut["delta_last_word"].iloc[1] == pytest.approx(-0.5)
    assert cut[["last_word_lost", "last_word_won"]].iloc[1].tolist() == [2, 0]


# Budgets


def test_rates_in_turns_are_those_of_the_ratio():
    baseline = row("none", [3.0], decode_tok_s=30.0)
    slowed = row(RTN4, [3.0], decode_tok_s=40.0, decode_ratio=2.0)  # timed while the machine was busy
    untimed = row(GPTQ4, [3.0])
    rates = rows.in_turns_tok_s(ledger.frame([baseline, slowed, untimed]))
    assert rates.iloc[:2].tolist() == [30.0, 60.0] and math.isnan(rates.iloc[2])
    with pytest.raises(rows.NotMeasured, match="'none' has a decoding rate"):
        rows.in_turns_tok_s(ledger.frame([slowed]))


def test_the_best_within_a_budget_by_hand(measured):
    kept = rows.comparable(measured)
    assert rows.best_within(kept, 1000)["recipe"] == "none"
    assert rows.best_within(kept, 499)["recipe"] == "quantize.bf16"
    assert rows.best_within(kept, 120)["recipe"] == RTN4  # not the simulated one
    assert rows.best_within(kept, 119) is None
    assert rows.best_within(kept, 350, "peak_rss_mb")["recipe"] == "quantize.bf16"
    other_order = kept.assign(last_word=[0.3, 0.2, 0.4, 0.9, 0.1][: len(kept)])
    assert rows.best_within(other_order, 1000, by="last_word")["recipe"] == RTN4


def test_a_recommendation_is_a_row_and_its_reason(measured):
    found = rows.recommend(measured, 130)
    assert found.row["recipe"] == RTN4
    assert found.sentence == (
        f"If the device has 130 MB (weights), use {RTN4}: 120.0 MB, perplexity 25.79. "
        "The next better one needs 250.0 MB (quantize.bf16, perplexity 20.29)."
    )
    none = rows.recommend(measured, 100)
    assert none.row is None
    assert none.sentence == f"Nothing measured fits 100 MB (weights); the smallest is {RTN4} with 120.0 MB."
    assert rows.recommend(measured, 600).sentence.endswith("Nothing measured is better.")
    with pytest.raises(rows.NotMeasured):
        rows.recommend(measured.assign(badge="simulated"), 100)


def test_a_recommendation_says_its_interval_and_which_smaller_recipe_is_as_good():
    ends = {"delta_nll": 0.1, "delta_nll_low": 0.05, "delta_nll_high": 0.15}
    table = ledger.frame(
        [
            row("none", [3.0, 3.0, 3.0], 500.0),
            row(GPTQ4, [3.0, 3.1, 3.2], 120.0, **ends),
            row(RTN4, [3.1, 3.0, 3.3], 100.0),
            row("quantize.rtn:bits=3,group_size=64", [4.0, 4.1, 4.2], 80.0),
        ]
    )
    sentence = rows.recommend(table, 200).sentence
    assert f"perplexity 22.20 [{math.exp(3.05):.2f}, {math.exp(3.15):.2f}]" in sentence
    assert f"These windows do not tell it from {RTN4} with 100.0 MB." in sentence


# Methods


def test_rows_of_a_single_method_at_its_defaults_have_method_bits_and_group_size():
    mixed = "quantize.mixed:bits=3.5,group_size=64"
    texts = ["none", RTN4, RTN4, mixed, f"{RTN4},symmetric=true", f"{RTN4} @ llamacpp", "quantize.kv:bits=4",
             f"quantize.bf16 + {RTN4}"]  # fmt: skip
    table = ledger.frame([row(text, [float(place)]) for place, text in enumerate(texts)])
    points = rows.by_method(table)
    assert points[["recipe", "method", "bits", "group_size"]].to_numpy().tolist() == [
        [RTN4, "quantize.rtn", 4, 64],
        [mixed, "quantize.mixed", 3.5, 64],
    ]
    assert points["ppl"].iloc[0] == pytest.approx(np.exp(2))  # the newer of two
    assert rows.by_method(table.iloc[:1]).empty


def test_rows_that_only_prune_single_weights_have_method_and_sparsity():
    wanda = "prune.wanda:sparsity=0.5"
    texts = ["none", wanda, f"{wanda},by_layer=owl", f"{wanda} + prune.store:format=bitmap", "prune.layers:keep=20",
             "prune.magnitude:sparsity=0.3", wanda, f"{wanda} @ llamacpp"]  # fmt: skip
    table = ledger.frame([row(text, [float(place)]) for place, text in enumerate(texts)])
    points = rows.by_sparsity(table)
    assert points[["method", "sparsity"]].to_numpy().tolist() == [
        ["prune.magnitude", 0.3],
        ["prune.wanda", 0.5],
    ]
    assert points["ppl"].tolist() == [pytest.approx(np.exp(5)), pytest.approx(np.exp(6))]  # the newer of two
    assert rows.by_sparsity(table.iloc[:1]).empty


def test_rows_come_in_the_order_asked_for_and_the_missing_are_named(caplog):
    early, late = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2))
    table = ledger.frame(
        [
            row("none", [3.0], started_at=late),
            row("none", [2.0], started_at=early),
            row(RTN4, [3.5], started_at=early),
            row("quantize.bf16", [3.1]),
        ]
    )
    found = rows.of_recipes(table, [RTN4, GPTQ4, "none"])
    assert found["recipe"].tolist() == [RTN4, "none"]
    assert found["ppl"].tolist() == [pytest.approx(np.exp(3.5)), pytest.approx(np.exp(3))]
    assert caplog.messages == [f"Not measured yet, and left out here: {GPTQ4}."]
    caplog.clear()
    assert rows.of_recipes(table, []).empty and rows.of_recipes(table, ["none"]).index.tolist() == [0]
    assert caplog.messages == []


def test_rows_are_found_by_names_given_to_recipes_as_a_reader_writes_them():
    table = ledger.frame([row("none", [3.0]), row(RTN4, [3.5])])
    found = rows.by_name(table, {"rounded": "quantize.rtn:bits=4", "plain": "none"})
    assert found["recipe"].to_dict() == {"rounded": RTN4, "plain": "none"}


# Variants with tokens of their own, and recovery

VOCAB, LAYERS = "prune.vocab:keep=16384", "prune.layers:keep=20"


@pytest.fixture
def other_tokens():
    """The baseline and 4 bits on two windows of text, and two variants that read the same text in other tokens."""
    bytes_too = {"windows": 2, "bits_per_byte": 0.9}
    own = {"ppl": None, "window_nll": None, "weights_mb": 400.0}
    return ledger.frame(
        [
            row("none", [2.9, 3.1], 500.0, **bytes_too),
            row(RTN4, [3.2, 3.3], 120.0, **bytes_too | {"bits_per_byte": 1.0}),
            Row(**vars(row(VOCAB, [3.0, 3.0], **bytes_too | {"n_tokens": 1100})) | own),
            Row(**vars(row(VOCAB, [3.0, 3.0], **bytes_too | {"n_tokens": 560, "windows": 1})) | own),
        ]
    )


def test_other_tokens_of_the_same_text_are_comparable(other_tokens):
    assert list(rows.comparable(other_tokens).index) == [0, 1, 2]
    assert list(rows.comparable(other_tokens.assign(bits_per_byte=None)).index) == [0, 1]
    with pytest.raises(rows.NotMeasured, match="ppl and weights_mb"):
        rows.comparable(other_tokens.iloc[2:])


def test_what_is_not_per_token_compares_by_text():
    per_token = ["model", "protocol", "corpus", "n_tokens"]
    assert rows.compared_by(["weights_mb", "ppl"]) == rows.compared_by(["kld_mean", "last_word"]) == per_token
    assert rows.compared_by(["weights_mb", "bits_per_byte"]) == ["model", "protocol", "corpus", "windows"]
    assert rows.compared_by(["weights_mb", "decode_ratio"]) == ["model"]


def test_a_budget_may_be_best_spent_on_other_tokens(other_tokens):
    by_bytes = other_tokens.assign(bits_per_byte=[0.95, 1.0, 0.9, 0.5])
    assert rows.recommend(by_bytes, 450, by="bits_per_byte").row["recipe"] == VOCAB
    assert rows.recommend(by_bytes, 450, by="ppl").row["recipe"] == RTN4


def test_a_recipe_before_its_recovery():
    after = {
        f"{LAYERS} + recover": LAYERS,
        f"{LAYERS} + recover:steps=122,loss=ce": LAYERS,
        f"prune.heads:groups=2 + {LAYERS} + recover:steps=1 @ llamacpp": f"prune.heads:groups=2 + {LAYERS} @ llamacpp",
        f"{LAYERS} + recover:steps=122 + {RTN4}": f"{LAYERS} + recover:steps=122 + {RTN4}",
        LAYERS: LAYERS,
        "none": "none",
    }
    assert rows.without_recovery(pd.Series([*after])).tolist() == [*after.values()]


def test_before_and_after_are_pairs_of_the_same_windows():
    steps = f"{LAYERS} + recover:steps=122"
    table = ledger.frame(
        [
            row(LAYERS, [4.0, 4.0]),
            row(LAYERS, [9.0]),
            row(steps, [3.5, 3.5], train_tokens=124_928),
            row(steps.replace("122", "243"), [3.0, 3.0], train_tokens=248_832),
            row(steps, [1.0], status="error"),
            row("prune.hidden:share=0.25 + recover:steps=122", [2.0, 2.0]),  # its like before is not there
        ]
    )
    found = rows.before_and_after(table)
    assert found[["recipe", "train_tokens"]].to_numpy().tolist() == [[LAYERS, 124_928], [LAYERS, 248_832]]
    assert found["before"].tolist() == [pytest.approx(math.exp(4))] * 2
    assert found["after"].tolist() == [pytest.approx(math.exp(3.5)), pytest.approx(math.exp(3))]
    assert rows.before_and_after(table.iloc[:2]).empty
