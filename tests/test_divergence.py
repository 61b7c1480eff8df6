"""KL divergence and agreement by hand, against torch and against a naive loop; what is kept of the reference."""

import copy
import math
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional

from edgelab.measure import MEASUREMENTS, Asked
from edgelab.measure.divergence import DivergenceSum, StateRecorder, kl_divergence, top1_agreement
from edgelab.measure.perplexity import evaluate, score, windows
from edgelab.measure.protocols import PROTOCOLS
from edgelab.recipes import Context
from edgelab.reference import resolve
from edgelab.storage.cache import CacheError
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


@pytest.fixture
def states(tiny_reference, story, tmp_path):
    """The hidden states of the tiny model on three windows of 150 tokens, kept in a file."""
    one = replace(PROTOCOLS["edgelab-512"], window=150)
    recorder = StateRecorder(tmp_path / "new" / "states.npy")
    evaluate(tiny_reference.model, tiny_reference.tokenizer, story, one, 3, track=[recorder])
    assert not recorder.file.exists()
    assert recorder.values() == {}
    return recorder.file, one


def test_reference_against_itself(states, tiny_reference, story):
    file, one = states
    divergence = DivergenceSum(file, tiny_reference.model)
    evaluate(tiny_reference.model, tiny_reference.tokenizer, story, one, 3, track=[divergence])
    assert divergence.position == 3 * 149
    assert divergence.values() == {"kld_mean": 0, "top1_agreement": 1}


def test_states_that_are_used_are_not_the_longest_unused(tmp_path, tiny_reference):
    """Or the variants of a long comparison would push out of the cache what each of its rows is compared with."""
    file = tmp_path / "states.npy"
    np.save(file, np.zeros((4, 64), dtype=np.float32))
    os.utime(file, (1, 1))
    DivergenceSum(file, tiny_reference.model)
    assert time.time() - file.stat().st_mtime < 60
    file.unlink()
    with pytest.raises(CacheError, match="have left the cache"):
        DivergenceSum(file, tiny_reference.model)


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
    found = divergence.values()
    assert found["kld_mean"] == pytest.approx(total / 447, rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(
        agreed / 447, abs=1 / 447
    )  # near ties may fall either way
    assert found["kld_mean"] > 1e-3


def test_states_of_a_sixteen_bit_reference_are_kept_in_float32(tiny_reference, story, tmp_path):
    one = replace(PROTOCOLS["edgelab-512"], window=80)
    model = copy.deepcopy(tiny_reference.model).bfloat16()
    recorder = StateRecorder(tmp_path / "states.npy")
    evaluate(model, tiny_reference.tokenizer, story, one, 1, track=[recorder])
    recorder.values()
    kept = np.load(tmp_path / "states.npy")
    assert (kept.dtype, kept.shape) == (np.float32, (79, 64))
    assert np.isfinite(kept).all() and np.abs(kept).max(1).min() > 0  # every position was written


def test_an_interrupted_recording_leaves_no_file(tmp_path, monkeypatch):
    recorder = StateRecorder(tmp_path / "a" / "states.npy")
    recorder.add(SimpleNamespace(hidden=torch.zeros(3, 4)))
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recorder.values()
    assert list((tmp_path / "a").iterdir()) == []


def subject(tiny, tokenizer, session, story, tmp_path, baseline=None):
    """Two windows of 100 tokens of the tiny model, as a measurement is asked."""
    rules = replace(PROTOCOLS["edgelab-512"], window=100)
    cut = windows(story, rules, tokenizer, 2)
    return SimpleNamespace(
        asked=Asked(states=str(tmp_path / "states.npy"), baseline=baseline),
        source=resolve(str(tiny)),
        session=session,
        text=story,
        rules=rules,
        cut=cut,
        reference_cut=cut,
        report=lambda done, total: None,
    )


def test_the_baseline_keeps_its_states_and_others_are_compared_with_them(
    tiny, tiny_reference, story, tmp_path
):
    chosen = [MEASUREMENTS["perplexity"], MEASUREMENTS["divergence"]]
    rest = (story, tmp_path)
    tokenizer = tiny_reference.tokenizer
    in_torch = SimpleNamespace(model=tiny_reference.model)
    baseline = score(subject(tiny, tokenizer, in_torch, *rest), chosen)
    assert "kld_mean" not in baseline and "delta_nll" not in baseline

    def logits(ids):
        with torch.no_grad():
            return tiny_reference.model(torch.tensor([ids])).logits[0]

    engine = SimpleNamespace(model=None, logits=logits)
    same = score(subject(tiny, tokenizer, engine, *rest, baseline), chosen)
    assert same["ppl"] == pytest.approx(baseline["ppl"], rel=1e-5)
    assert (same["kld_mean"], same["top1_agreement"]) == (pytest.approx(0, abs=1e-6), 1)
    assert same["delta_nll"] == pytest.approx(0, abs=1e-5)

    coarse = RoundToNearest(bits=2, group_size=32).apply(tiny_reference.model, Context())
    moved = score(subject(tiny, tokenizer, SimpleNamespace(model=coarse), *rest, baseline), chosen)
    difference = [a - b for a, b in zip(moved["window_nll"], baseline["window_nll"], strict=True)]
    assert moved["delta_nll"] == pytest.approx(sum(difference) / 2)
    assert moved["delta_nll_low"] < moved["delta_nll"] < moved["delta_nll_high"]
    assert moved["kld_mean"] > 0.01
    bits = moved["bits_per_byte"] - baseline["bits_per_byte"]
    assert moved["delta_bits_per_byte"] == pytest.approx(bits)
    assert moved["delta_bits_per_byte_low"] < bits < moved["delta_bits_per_byte_high"]
