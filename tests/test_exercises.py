"""The checks of the exercises: right answers, hints for usual mistakes, and input that is no number."""

import pytest

from edgelab.exercises import EXERCISES, UnknownExercise, check
from edgelab.ledger import LedgerError, Row

NUMBERS = [
    "cache_of_70b",
    "bits_for_13b",
    "word_to_token_perplexity",
    "windows_without_pairing",
    "smoothed_outlier",
    "error_that_is_made_up_for",
    "decoding_at_60_percent",
    "tokens_at_the_ridge",
    "tokens_of_a_two_bit_cache",
    "codebook_of_a_row",
    "embedding_in_8_bits",
    "gradient_through_rounding",
    "gradient_of_a_step",
    "five_in_a_byte",
    "zeros_of_a_bell_curve",
]


@pytest.mark.parametrize("name", NUMBERS)
def test_the_right_answer_is_right_and_nothing_else_is(name):
    asked = EXERCISES[name]()
    assert check(name, asked.answer).startswith("Right")
    for wrong, hint in asked.mistakes:
        assert check(name, wrong) == f"Not yet: {hint}"
    assert check(name, asked.answer * 3.3).startswith("Not yet")
    assert check(name, None).startswith("Replace None")
    assert check(name, "many").startswith("A number is needed")


def test_the_answers_worked_by_hand():
    assert EXERCISES["cache_of_70b"]().answer == 2 * 80 * 8 * 128 * 4096 * 8 * 2 / 1e9
    assert EXERCISES["bits_for_13b"]().answer == 2
    assert EXERCISES["word_to_token_perplexity"]().answer == pytest.approx(11.3524, abs=1e-4)
    assert EXERCISES["windows_without_pairing"]().answer == pytest.approx(3600)
    assert EXERCISES["smoothed_outlier"]().answer == pytest.approx(64 / (8**1.5 * 2**0.5))
    assert EXERCISES["error_that_is_made_up_for"]().answer == pytest.approx(0.4**2 + 0.7**2 - 1.6 * 0.4 * 0.7)
    assert EXERCISES["decoding_at_60_percent"]().answer == pytest.approx(40.8 / 4.1)
    assert EXERCISES["tokens_at_the_ridge"]().answer == 10
    assert EXERCISES["tokens_of_a_two_bit_cache"]().answer == pytest.approx(16 / 3)
    assert EXERCISES["codebook_of_a_row"]().answer == pytest.approx((576 * 4 + 16 * 16 + 9 * 16) / 576)
    assert EXERCISES["embedding_in_8_bits"]().answer == pytest.approx(
        (106_168_320 / 2 + 1_658_880 * 2.5 + 49_152 * 579 + 35_136 * 4) / 1e6
    )
    assert EXERCISES["gradient_through_rounding"]().answer == 10 + 100 + 1000
    assert EXERCISES["gradient_of_a_step"]().answer == pytest.approx((0 - 0.3) + (1 - 0.6) + 1)
    assert EXERCISES["five_in_a_byte"]().answer == pytest.approx(1.85)
    assert EXERCISES["zeros_of_a_bell_curve"]().answer == pytest.approx(31.006, abs=1e-3)


def test_the_best_within_a_budget_is_read_from_the_reference_rows(monkeypatch):
    like = {"protocol": "edgelab-512", "corpus": "wiki", "n_tokens": 16_352, "badge": "packed"}
    rows = [
        Row("none", ppl=21.7, weights_mb=538.0, **like),
        Row("quantize.rtn:bits=4,group_size=64", ppl=28.0, weights_mb=171.0, **like),
        Row("quantize.rtn:bits=3,group_size=64", ppl=70.0, weights_mb=157.0, **like),
        Row("quantize.rtn:bits=4,group_size=32", ppl=16.0, weights_mb=175.0, **like | {"n_tokens": 2044}),
    ]
    monkeypatch.setattr("edgelab.ledger.reference", lambda: rows)
    assert check("best_within_200_mb", 28.0).startswith("Right")
    assert "538 MB" in check("best_within_200_mb", 21.7)
    assert "157 MB" in check("best_within_200_mb", 70.0)
    assert "its size" in check("best_within_200_mb", 171.0)
    assert check("best_within_200_mb", 16.0).startswith("Not yet")
    monkeypatch.setattr("edgelab.ledger.reference", lambda: rows[:1])
    with pytest.raises(LedgerError, match="no row within 200 MB"):
        check("best_within_200_mb", 28.0)


def test_an_unknown_exercise_is_answered_with_the_known_ones():
    with pytest.raises(UnknownExercise, match=r"'cache'; there are .*cache_of_70b"):
        check("cache", 1)
