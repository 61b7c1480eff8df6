"""The parity gate, by hand: what passes, what fails, and by which of its numbers."""

import json
import math

import pytest
import torch

from edgelab.assets import data_dir
from edgelab.measure import parity


def answer(written=range(16), likely=None):
    return list(written), likely or [(token, math.log(0.5 / (token + 1))) for token in range(20)]


def test_perplexities_within_one_per_cent_pass():
    assert parity.by_perplexity(20.19, 20).passed and parity.by_perplexity(19.81, 20).passed
    wrong = parity.by_perplexity(20.21, 20)
    assert not wrong.passed and "20.210 against 20.000" in wrong.detail and "+1.05%" in wrong.detail
    assert not parity.by_perplexity(math.inf, 20).passed and not parity.by_perplexity(math.nan, 20).passed


def quality(ppl=20.0, kld=0.2, agreement=0.75):
    return {"ppl": ppl, "kld_mean": kld, "top1_agreement": agreement}


@pytest.mark.parametrize(
    ("engine", "passes"),
    [
        (quality(), True),
        (quality(20.15, 0.215, 0.72), True),  # each within its bound
        (quality(ppl=20.21), False),
        (quality(kld=0.221), False),
        (quality(kld=0.179), False),
        (quality(agreement=0.70), False),
        (quality(kld=math.nan), False),
    ],
)
def test_each_number_of_quality_can_fail_alone(engine, passes):
    assert parity.by_quality(engine, quality()).passed == passes


def test_an_engine_whose_perplexity_is_right_by_luck_fails():
    """An engine that lost the scaling of rotary frequencies, beside the reference in PyTorch."""
    verdict = parity.by_quality(quality(20.03, 0.099, 0.75), quality(20, None, None))
    assert not verdict.passed
    for words in ("+0.15%", "0.0990 against 0.0000", "75.0% against 100.0%"):
        assert words in verdict.detail


def test_committed_rows_of_engines_pass():
    rows = [json.loads(line) for line in (data_dir() / "reference" / "rows.jsonl").read_text().splitlines()]
    scored = {row["recipe"]: row for row in rows if row["ppl"] is not None}
    pairs = [
        (row, scored[recipe.partition(" @ ")[0]])
        for recipe, row in scored.items()
        if row["badge"] == "runtime" and not recipe.startswith("native")
    ]
    assert len(pairs) >= 9
    for engine, twin in pairs:
        assert parity.by_quality(engine, twin).passed, engine["recipe"]


def test_equal_answers_pass_and_their_numbers_are_said():
    same = parity.by_answers([answer()] * 32, [answer()] * 32)
    assert same.passed
    for words in ("32 prompts", "same next token 100%", "0.000 nats", "alike for 100%"):
        assert words in same.detail


def test_each_of_the_three_numbers_can_fail_alone():
    twin = [answer()] * 32
    first, second, *rest = answer()[1]
    swapped = answer(likely=[(second[0], first[1]), (first[0], second[1]), *rest])
    assert parity.by_answers([swapped] * 3 + twin[3:], twin).passed
    assert not parity.by_answers([swapped] * 4 + twin[4:], twin).passed
    shifted = answer(likely=[(token, likely - 0.11) for token, likely in answer()[1]])
    assert not parity.by_answers([shifted] * 32, twin).passed
    assert parity.by_answers([shifted] * 15 + twin[15:], twin).passed  # the median
    early = answer(written=[*range(11), 99, *range(12, 16)])  # 11 of 16 are alike
    assert not parity.by_answers([early] * 32, twin).passed
    assert not parity.by_answers([answer(likely=[(99, -0.1)])] * 32, twin).passed  # names none of the tokens


def test_prompts_are_spread_over_the_text():
    asked = parity.prompts(torch.arange(1000), count=3, length=10)
    assert [one[0] for one in asked] == [0, 495, 990] and asked[-1][-1] == 999
    assert parity.prompts(torch.arange(5), count=2, length=10) == [[0, 1, 2, 3, 4]] * 2


def test_a_speaker_goes_on_greedily():
    class Counter:
        def top(self, ids, count):
            return [(ids[-1] + 1, 0.0)]

        def prefill(self, ids):
            return ids[-1] + 1

        def decode(self, token):
            return token + 1

    ((written, likely),) = parity.answers(Counter(), [[7, 8]])
    assert written == list(range(9, 25)) and likely == [(9, 0.0)]


@pytest.mark.parametrize("count", [1, 32])
def test_one_prompt_is_enough_to_ask(count):
    assert len(parity.prompts(torch.arange(200), count=count)) == count
