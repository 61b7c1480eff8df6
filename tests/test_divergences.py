"""Divergences of a student from a teacher: worked values, ends, gradients by autograd, and buckets of top-k."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from edgelab.model.divergences import DIVERGENCES, TopK, jsd, kl, over_buckets, reverse_kl, scaled_jsd

P, Q = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()


def random_logits(seed: int, positions: int = 5, tokens: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(positions, tokens, generator=generator).double() for _ in range(2))


def value(divergence, p, q) -> float:
    return divergence(p, q)[0].item()


def test_two_tokens_by_hand():
    assert value(kl, P, Q) == pytest.approx(0.334795, abs=1e-6)
    assert value(reverse_kl, P, Q) == pytest.approx(0.381909, abs=1e-6)
    assert value(DIVERGENCES["jsd"](0.5), P, Q) == pytest.approx(0.086305, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "beta", "expected"),
    [
        ("jsd", 0.1, 0.030179),
        ("jsd", 0.9, 0.033417),
        ("jsd", 0.0, 0.0),
        ("jsd", 1.0, 0.0),
        ("scaled_jsd", 0.1, 0.335323),
        ("scaled_jsd", 0.5, 0.345218),
        ("scaled_jsd", 0.9, 0.371295),
        ("scaled_jsd", 0.0, 0.334795),
        ("scaled_jsd", 1.0, 0.381909),
    ],
)
def test_two_readings_of_the_generalised_jsd(name, beta, expected):
    assert value(DIVERGENCES[name](beta), P, Q) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("beta", [1e-6, 1 - 1e-6])
def test_the_scaled_one_tends_to_its_ends(beta):
    logits, others = random_logits(0)
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    torch.testing.assert_close(scaled_jsd(p, q, beta)[0], scaled_jsd(p, q, round(beta))[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(
        scaled_jsd(p, q, beta)[1], scaled_jsd(p, q, round(beta))[1], rtol=0.02, atol=1e-3
    )


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("weight", [0.0, 0.1, 0.5, 0.9])
def test_gradients_are_those_of_autograd(name, weight):
    teacher, student = random_logits(1)
    log_p = teacher.log_softmax(-1)
    student.requires_grad_()
    log_q = student.log_softmax(-1)
    loss, gradient = DIVERGENCES[name](weight)(log_p, log_q)
    (expected,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient.detach(), expected, rtol=1e-8, atol=1e-10)


def test_kl_is_that_of_torch():
    teacher, student = random_logits(2)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl(p, q)[0], expected)
    torch.testing.assert_close(reverse_kl(q, p)[0], expected)
    middle = jsd(p, q, 0.5)[0]
    torch.testing.assert_close(middle, jsd(q, p, 0.5)[0])
    assert (middle < math.log(2)).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_to_learn_from_oneself(name):
    logits, _ = random_logits(3)
    log_p = logits.log_softmax(-1)
    loss, gradient = DIVERGENCES[name](0.3)(log_p, log_p)
    assert loss.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_a_skewed_one_is_finite_where_the_student_rules_out_what_the_teacher_says():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert value(kl, p, q) == math.inf
    assert value(DIVERGENCES["skew_kl"](0.1), p, q) == pytest.approx(
        0.5 * math.log(0.5 / 0.95) + 0.5 * math.log(0.5 / 0.05)
    )


# Top-k


FIVE = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]]).log(), torch.tensor([[0.6, 0.25, 0.05, 0.05, 0.05]]).log()


@pytest.mark.parametrize(("k", "truncated", "bucketed"), [(1, -0.0912, 0.0204), (2, -0.1358, 0.0722)])
def test_a_truncated_sum_goes_below_zero_and_buckets_do_not(k, truncated, bucketed):
    p, q = FIVE
    teacher = TopK.of(p, k)
    cut = (p.exp() * (p - q))[:, :k].sum()
    assert cut.item() == pytest.approx(truncated, abs=1e-4)
    assert over_buckets(kl, teacher, q)[0].item() == pytest.approx(bucketed, abs=1e-4)
    assert value(kl, p, q) == pytest.approx(0.0722, abs=1e-4)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 10), name=st.sampled_from(["kl", "reverse_kl", "jsd"]))
def test_buckets_are_between_zero_and_all_tokens(seed, k, name):
    teacher, student = random_logits(seed)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    divergence = DIVERGENCES[name](0.3)
    found, whole = over_buckets(divergence, TopK.of(log_p, k), log_q)[0], divergence(log_p, log_q)[0]
    assert (found >= -1e-12).all() and (found <= whole + 1e-12).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_of_buckets_are_those_of_autograd(name):
    teacher, student = random_logits(4)
    student.requires_grad_()
    log_q = student.log_softmax(-1)
    loss, gradient = over_buckets(DIVERGENCES[name](0.3), TopK.of(teacher.log_softmax(-1), 3), log_q)
    (expected,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient.detach(), expected, rtol=1e-8, atol=1e-10)
