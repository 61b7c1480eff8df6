"""KL divergence and agreement by hand and against torch, paired differences against scipy."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torch.nn import functional

from edgelab.measure.divergence import (
    DivergenceSum,
    PairingError,
    kl_divergence,
    paired_delta,
    recording,
    top1_agreement,
)
from edgelab.measure.perplexity import PROTOCOLS, evaluate, windows
from edgelab.recipes import Context
from edgelab.techniques.quantization.rtn import RoundToNearest

LOGITS = arrays("float32", (3, 5), elements=st.floats(-30, 30, width=32)).map(torch.from_numpy)


def test_kl_by_hand():
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [0.8, 0.1, 0.1]])
    q = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.1, 0.8, 0.1]])
    expected = [0.5 * math.log(3 / 2) + 2 * 0.25 * math.log(3 / 4), 0.7 * math.log(8)]
    # Adding a number to all logits of a position changes nothing.
    torch.testing.assert_close(kl_divergence(p.log() + 7, q.log() - 3), torch.tensor(expected))


def test_kl_is_of_the_reference_first():
    p, q = torch.tensor([[0.0, 0.0, -100.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    torch.testing.assert_close(kl_divergence(p, q), torch.tensor([math.log(3 / 2)]))
    assert kl_divergence(q, p) > 30  # the candidate rules out what the reference finds likely


@given(LOGITS, LOGITS)
def test_kl_is_that_of_torch_and_never_negative(reference, candidate):
    found = kl_divergence(reference, candidate)
    theirs = functional.kl_div(
        torch.log_softmax(candidate, -1), torch.log_softmax(reference, -1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    assert (found >= -1e-5).all()
    assert (kl_divergence(reference, reference) == 0).all()


def test_kl_of_sixteen_bit_logits_is_computed_in_float32():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert kl_divergence(logits.bfloat16(), logits.half()).dtype == torch.float32


def test_agreement_by_hand():
    reference = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [0.0, 5.0, 0.0]])
    candidate = torch.tensor([[0.0, 0.0, 9.0], [0.0, 1.0, 0.0], [-1.0, 0.0, -1.0]])
    assert top1_agreement(reference, candidate).tolist() == [True, False, True]


@given(st.lists(st.tuples(st.floats(100, 2000), st.floats(100, 2000)), min_size=2, max_size=20))
def test_interval_is_that_of_student_for_windows_of_equal_length(pairs):
    nll, baseline = (list(column) for column in zip(*pairs, strict=True))
    found = paired_delta(nll, baseline, [511] * len(pairs))
    difference = (np.array(nll) - np.array(baseline)) / 511
    if np.ptp(difference) == 0:  # scipy warns where nothing varies
        assert found.low == pytest.approx(found.high)
        return
    theirs = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(difference.mean(), abs=1e-9)
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, abs=1e-6),
        pytest.approx(theirs.high, abs=1e-6),
    )


def test_interval_by_hand():
    # Differences per token 1, 2, 3: mean 2, standard error 1 / sqrt(3), and 4.302653 is Student's t of two degrees.
    found = paired_delta([20, 30, 40], [10, 10, 10], [10, 10, 10])
    reach = 4.302653 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - reach, 2 + reach), rel=1e-6)


def test_windows_weigh_by_their_tokens():
    found = paired_delta([20.0, 3.0], [10.0, 4.0], [30, 10])
    assert found.mean == pytest.approx((23 - 14) / 40)
    # shares 3/4 and 1/4, differences 1/3 and -1/10: variance of the weighted mean, n / (n - 1) times
    deviations = (0.75 * (1 / 3 - 0.225), 0.25 * (-0.1 - 0.225))
    reach = 12.706205 * math.sqrt(2 * sum(part**2 for part in deviations))
    assert found.high - found.mean == pytest.approx(reach, rel=1e-6)


def test_one_window_has_no_interval():
    found = paired_delta([12.0], [10.0], [4])
    assert found.mean == 0.5
    assert math.isnan(found.low) and math.isnan(found.high)


def test_a_constant_difference_is_certain():
    found = paired_delta([11, 12, 13], [10, 11, 12], [4, 4, 4])
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize(("nll", "baseline", "tokens"), [([1], [1, 2], [5, 5]), ([1, 2], [1, 2], [5])])
def test_other_windows_are_refused(nll, baseline, tokens):
    with pytest.raises(PairingError, match="measure both alike"):
        paired_delta(nll, baseline, tokens)


@pytest.fixture
def states(tiny_reference, story, tmp_path):
    """The hidden states of the tiny model on three windows of 150 tokens, kept in a file."""
    one = replace(PROTOCOLS["edgelab-512"], window=150)
    cut = windows(story, one, tiny_reference.tokenizer, 3)
    with recording(tmp_path / "states.npy", cut, tiny_reference.model) as recorder:
        evaluate(tiny_reference.model, tiny_reference.tokenizer, story, one, 3, track=[recorder])
        assert not (tmp_path / "states.npy").exists()
    return tmp_path / "states.npy", one


def test_reference_against_itself(states, tiny_reference, story):
    file, one = states
    divergence = DivergenceSum(file, tiny_reference.model)
    evaluate(tiny_reference.model, tiny_reference.tokenizer, story, one, 3, track=[divergence])
    assert (divergence.kld_mean, divergence.agreement) == (0, 1)
    assert divergence.position == 3 * 149


@pytest.mark.parametrize("bits", [2, 4])
def test_divergence_of_a_candidate_equals_the_naive_loop(bits, states, tiny_reference, story):
    file, one = states
    candidate = RoundToNearest(bits=bits, group_size=32).apply(tiny_reference.model, Context())
    divergence = DivergenceSum(file, tiny_reference.model)
    evaluate(candidate, tiny_reference.tokenizer, story, one, 3, track=[divergence])
    total, agreed = 0.0, 0
    for begin in (0, 150, 300):
        with torch.no_grad():
            p, q = (
                torch.log_softmax(model(story.ids[None, begin : begin + 150]).logits[0, :-1].double(), -1)
                for model in (tiny_reference.model, candidate)
            )
        total += (p.exp() * (p - q)).sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
    assert divergence.kld_mean == pytest.approx(total / 447, rel=1e-4)
    assert divergence.agreement == pytest.approx(agreed / 447, abs=1 / 447)  # near ties may fall either way
    assert divergence.kld_mean > 1e-3


def test_states_of_a_sixteen_bit_reference_are_kept_in_float32(tiny_reference, story, tmp_path):
    one = replace(PROTOCOLS["edgelab-512"], window=80)
    model = copy.deepcopy(tiny_reference.model).bfloat16()
    cut = windows(story, one, tiny_reference.tokenizer, 1)
    with recording(tmp_path / "new" / "states.npy", cut, model) as recorder:
        evaluate(model, tiny_reference.tokenizer, story, one, 1, track=[recorder])
    kept = np.load(tmp_path / "new" / "states.npy")
    assert (kept.dtype, kept.shape) == (np.float32, (79, 64))
    assert np.isfinite(kept).all() and np.abs(kept).max(1).min() > 0  # every position was written


def test_an_interrupted_recording_leaves_no_file(tiny_reference, story, tmp_path):
    cut = windows(story, PROTOCOLS["edgelab-512"], tiny_reference.tokenizer, 1)
    with (
        pytest.raises(KeyboardInterrupt),
        recording(tmp_path / "a" / "states.npy", cut, tiny_reference.model),
    ):
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []
