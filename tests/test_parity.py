"""The parity gate, by hand: what passes, what fails, and by which of its numbers."""

import copy
import math

import pytest
import torch

from edgelab.measure import parity, perplexity
from edgelab.measure.perplexity import Slice, Window


def answer(written=range(16), likely=None):
    return list(written), likely or [(token, math.log(0.5 / (token + 1))) for token in range(20)]


def slices(probabilities, target, positions=10):
    """One slice of equal positions, with the logits of these probabilities."""
    logits = torch.tensor(probabilities).log().repeat(positions, 1)
    return [Slice(0, logits, torch.full((positions,), target), None)]


def test_the_three_numbers_by_hand():
    """KL = 1/2 ln 2 + 1/4 ln 1/2 = 0.1733; the target has half the probability, so the perplexity is twice as large."""
    same = parity.by_logits(slices([0.5, 0.25, 0.25], 0), slices([0.5, 0.25, 0.25], 0))
    assert same.passed
    for words in ("10 tokens", "perplexity +0.00%", "0.0000 nats", "same most likely token 100.0%"):
        assert words in same.detail
    wrong = parity.by_logits(slices([0.25, 0.5, 0.25], 0), slices([0.5, 0.25, 0.25], 0))
    assert not wrong.passed
    for words in ("perplexity +100.00%", "0.1733 nats", "same most likely token 0.0%"):
        assert words in wrong.detail


@pytest.mark.parametrize(
    ("engine", "torch_", "target", "numbers"),
    [
        # of a rare token only: 2 % off in perplexity
        ([0.9, 0.0902, 0.0098], [0.9, 0.09, 0.01], 2, ("+2.04%", "0.0000 nats", "100.0%")),
        # as far from a reference of (0.5, 0.2, 0.2, 0.1) as its twin, with its perplexity: 0.2 ln 3 apart
        ([0.5, 0.1, 0.3, 0.1], [0.5, 0.3, 0.1, 0.1], 0, ("+0.00%", "0.2197 nats", "100.0%")),
        # two tokens nearly as likely, in the other order
        (
            [0.299, 0.301, 0.2 - 1e-3, 0.2],
            [0.301, 0.299, 0.2 - 1e-3, 0.2],
            2,
            ("+0.00%", "0.0000 nats", "0.0%"),
        ),
    ],
    ids=["perplexity", "divergence", "agreement"],
)
def test_each_number_of_logits_can_fail_alone(engine, torch_, target, numbers):
    verdict = parity.by_logits(slices(engine, target), slices(torch_, target))
    assert not verdict.passed
    for words in numbers:
        assert words in verdict.detail


def test_small_differences_pass():
    """As int8 activations make them: perplexity +0.5 %, and one token in twenty another."""
    near, other = slices([0.5, 0.3, 0.2], 0, 95), slices([0.34, 0.33, 0.33], 0, 5)
    moved, swapped = slices([0.4975, 0.302, 0.2005], 0, 95), slices([0.33, 0.34, 0.33], 0, 5)
    assert parity.by_logits(moved + swapped, near + other).passed
    assert not parity.by_logits(slices([math.nan] * 3, 0), slices([0.5, 0.3, 0.2], 0)).passed


@pytest.mark.parametrize("lost", ["rope_parameters", "bias"])
def test_an_engine_that_leaves_a_part_of_the_model_out_fails(new_model, lost):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = new_model("llama", rope_parameters=scaled, attention_bias=True)
    other = new_model("llama", attention_bias=True)
    other.load_state_dict(model.state_dict())
    if lost == "bias":
        other = copy.deepcopy(model)
        for layer in other.model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
            torch.nn.init.zeros_(layer.self_attn.v_proj.bias)
    ids = torch.randint(0, 300, (3, 129), generator=torch.Generator().manual_seed(0))
    cut = [Window(one, 1, 128) for one in ids]
    assert parity.by_logits(perplexity.slices(model, cut), perplexity.slices(model, cut)).passed
    assert not parity.by_logits(perplexity.slices(other, cut), perplexity.slices(model, cut)).passed


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
