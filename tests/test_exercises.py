"""The checks of the exercises: right answers, hints for usual mistakes, and input that is no number."""

import pytest

from edgelab.exercises import EXERCISES, UnknownExercise, check
from edgelab.exercises.coding import NOTHING_YET
from edgelab.ledger import LedgerError, Row

NUMBERS = [
    "cache_of_70b",
    "bits_for_13b",
    "group_within_budget",
    "levels_of_symmetric_two_bits",
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
    "unseen_directions",
    "zeros_until_a_bitmap_pays",
    "parameters_of_25_blocks",
    "largest_smaller_rank",
    "bytes_of_teacher_states",
    "kl_with_a_bucket",
    "parameters_of_an_adapter",
    "memory_of_adapter_training",
]


@pytest.mark.parametrize("name", NUMBERS)
def test_the_right_answer_is_right_and_nothing_else_is(name):
    asked = EXERCISES[name]()
    assert check(name, asked.answer).text.startswith("Right")
    for wrong, hint in asked.mistakes:
        assert check(name, wrong).text == f"Not yet: {hint}"
    assert check(name, asked.answer * 3.3).text.startswith("Not yet")
    assert check(name, None).text == "Replace None by your answer."
    assert check(name, "many").text.startswith("A number is needed")


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
    assert EXERCISES["zeros_until_a_bitmap_pays"]().answer == 78.125
    assert EXERCISES["parameters_of_25_blocks"]().answer == 134_515_008 - 5 * (884_736 + 2_654_208 + 1152)
    assert EXERCISES["largest_smaller_rank"]().answer == 143
    assert EXERCISES["bytes_of_teacher_states"]().answer == 294_912_000
    assert EXERCISES["kl_with_a_bucket"]().answer == pytest.approx(0.082283, abs=1e-6)
    assert EXERCISES["parameters_of_an_adapter"]().answer == 2 * 460_800
    assert EXERCISES["memory_of_adapter_training"]().answer == 20 * (4 + 8)


CODE = [
    "tokens_that_fit",
    "paired_interval",
    "recipes_that_nobody_beats",
    "quantize_groups",
    "gptq_step",
    "damped_hessian",
    "static_range",
    "unpack_nibbles",
    "keys_by_channel",
    "straight_through",
    "pack_five",
    "roofline_bound",
    "effective_bandwidth",
    "wanda_mask",
    "remove_one_weight",
    "block_influence",
    "softened_kl",
    "merged_weight",
]


@pytest.mark.parametrize("name", CODE)
def test_a_right_function_is_right_and_a_usual_mistake_gets_its_hint(name):
    asked = EXERCISES[name]()
    assert check(name, asked.solution).text == f"Right. {asked.why}"
    for mistake, hint in asked.mistakes:
        assert check(name, mistake).text == f"Not yet: {hint}"
    assert check(name, lambda *given: ...).text == NOTHING_YET


def test_the_functions_that_readers_write_give_what_is_worked_by_hand():
    def called(name):
        asked = EXERCISES[name]()
        return asked.solution(*asked.inputs)

    assert called("tokens_that_fit") == 10_300_000 // (2 * 32 * 8 * 128 * 2) == 78
    # Differences 5, 3, 8, 1, 9 and 6 hundredths: mean 16/3, sum of squares 136/3, so that s / sqrt(6) = sqrt(136/90).
    reach = 2.5705818 * (136 / 90) ** 0.5
    expected = [16 / 3, 16 / 3 - reach, 16 / 3 + reach]
    assert [100 * one for one in called("paired_interval")] == pytest.approx(expected, rel=1e-6)
    assert called("recipes_that_nobody_beats").tolist() == [False, True, False, False, True, True, False]
    assert called("quantize_groups").tolist() == [
        [1.5, -0.5, 0.5, -1.0, 0.75, -0.25, 0.0, 0.5],
        [-3.0, 1.0, 0.0, 2.0, 0.25, -0.375, 0.25, 0.0],
    ]


def test_functions_of_calibration_cache_training_and_engines_give_what_is_worked_by_hand():
    def called(name):
        asked = EXERCISES[name]()
        found = asked.solution(*asked.inputs)
        return found.tolist()

    assert called("unpack_nibbles") == [[1, 2, 3, 4, 5, 6], [0, 15, 10, 9, 7, 0]]
    # Channels from 0 to 3 by 1, from -90 to -60 by 10, from 1 to 2.5 by 0.5
    assert called("keys_by_channel") == [[0, -90, 1], [1, -60, 1.5], [2, -80, 2], [3, -70, 2.5]]
    # Levels from -1 to 1.5 in steps of 0.5: 1.55 is rounded to the last, 1.8 beyond it, and -1.2 to the first
    assert called("straight_through") == [[1, -2, 0.5, 4], [3, 0.25, 0, 2]]
    assert called("pack_five") == [2 + 3 + 0 + 27 + 162, 0, 242, 1 + 2 * 3 + 0 + 0 + 81]
    assert called("roofline_bound") == [56.25, 56.25, 320, 2560]
    # x^T x / 4, whose diagonal is 3, 1.5 and 1.875: a tenth of its mean is 0.2125
    expected = [[3.2125, 0, -0.5], [0, 1.7125, -0.375], [-0.5, -0.375, 2.0875]]
    for row, wanted in zip(called("damped_hessian"), expected, strict=True):
        assert row == pytest.approx(wanted)
    # Steps of 3/255 from -1 to 2, 85 of them below zero
    assert called("static_range")[1] == pytest.approx([-1, 4 * 3 / 255, 2, -3 / 255], abs=1e-6)


def test_functions_of_pruning_give_what_is_worked_by_hand():
    import torch

    asked = EXERCISES["wanda_mask"]()
    # Norms of the inputs √3, √66, √0.5 and √12: the 3 of the first row scores 5.2, and its 2 scores 6.9
    assert asked.solution(*asked.inputs).tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    step = EXERCISES["remove_one_weight"]().solution
    moved, error = step(torch.tensor([1.0, 1.0]), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0)
    assert moved.tolist() == pytest.approx([0, 1.5]) and error.item() == pytest.approx(0.75)


def test_the_influence_of_a_block_is_worked_by_hand():
    asked = EXERCISES["block_influence"]()
    # Cosines 1, 1/√2, 0 (-0.25 - 0.75 + 1) and 3.5 / √(5 · 5.25)
    expected = 1 - (1 + 0.5**0.5 + 0 + 3.5 / (5 * 5.25) ** 0.5) / 4
    assert asked.solution(*asked.inputs).item() == pytest.approx(expected)


def test_no_other_weights_without_one_do_better_than_those_of_the_exercise():
    import torch

    asked = EXERCISES["remove_one_weight"]()
    weight, hessian, j = asked.inputs
    moved, error = asked.solution(*asked.inputs)
    assert error.item() == pytest.approx(0.5 * weight[j].item() ** 2 / torch.linalg.inv(hessian)[j, j].item())
    for k in (1, 2):
        for step in (-0.01, 0.01):
            other = moved.clone()
            other[k] += step
            assert 0.5 * (other - weight) @ hessian @ (other - weight) > error


def test_the_step_of_the_exercise_done_for_all_columns_is_gptq():
    import torch

    from edgelab.techniques.quantization.gptq import gptq, inverse_factor

    step = EXERCISES["gptq_step"]().solution
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(6) + 0.4
    found, factor = weight, inverse_factor(hessian, 0.01)[0]
    for j in range(6):
        found = step(found, factor, j, 0.5)
    grid = torch.full((3, 1), 0.5), torch.full((3, 1), 8.0)
    expected, _ = gptq(weight, hessian, 4, 6, lambda groups: grid, activation_order=False)
    assert torch.allclose(found, expected.dequantize())


def test_a_whole_number_worked_out_in_floats_is_that_number():
    assert check("windows_without_pairing", 8 * (0.30**2 + 0.30**2) / 0.02**2).right
    assert not check("windows_without_pairing", 3600.5).right


def test_tokens_may_be_a_whole_float_and_are_not_a_share_of_one():
    def tokens(room_gb, weights_gb, layers, kv_heads, head_dim):
        return (room_gb - weights_gb) * 1e9 / (2 * layers * kv_heads * head_dim * 2)

    assert check("tokens_that_fit", lambda *sizes: tokens(*sizes) // 1).right
    assert not check("tokens_that_fit", tokens).right


def test_the_best_within_a_budget_is_read_from_the_reference_rows(monkeypatch):
    like = {"protocol": "edgelab-512", "corpus": "wiki", "n_tokens": 16_352, "badge": "packed"}
    rows = [
        Row("none", ppl=21.7, weights_mb=538.0, **like),
        Row("quantize.rtn:bits=4,group_size=64", ppl=28.0, weights_mb=171.0, **like),
        Row("quantize.rtn:bits=8,group_size=0", ppl=27.9, weights_mb=220.0, **like),
        Row("quantize.rtn:bits=3,group_size=64", ppl=70.0, weights_mb=157.0, **like),
        Row("quantize.rtn:bits=4,group_size=32", ppl=16.0, weights_mb=175.0, **like | {"n_tokens": 2044}),
    ]
    monkeypatch.setattr("edgelab.ledger.reference", lambda: rows)
    assert check("best_within_200_mb", 28.0).text.startswith("Right")
    assert "220 MB" in check("best_within_200_mb", 27.9).text
    assert "538 MB" in check("best_within_200_mb", 21.7).text
    assert "157 MB" in check("best_within_200_mb", 70.0).text
    assert "its size" in check("best_within_200_mb", 171.0).text
    assert check("best_within_200_mb", 16.0).text.startswith("Not yet")
    monkeypatch.setattr("edgelab.ledger.reference", lambda: rows[:1])
    with pytest.raises(LedgerError, match="no row within 200 MB"):
        check("best_within_200_mb", 28.0)


def test_an_unknown_exercise_is_answered_with_the_known_ones():
    with pytest.raises(UnknownExercise, match=r"'cache'; there are .*cache_of_70b"):
        check("cache", 1)
