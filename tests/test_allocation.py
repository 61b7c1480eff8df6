"""The allocation: worked by hand, by trying all for each of its users, and against a bound for many layers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelab.recipes import Context
from edgelab.techniques.allocation import AllocationError, allocate
from edgelab.techniques.lowrank import RankTable
from edgelab.techniques.pruning.measured import SparsityTable
from edgelab.techniques.quantization.mixed import SensitivityTable


def test_allocation_by_hand():
    # Equal layers of 2 or 4 bytes. With 8 bytes one layer may have 4: the one that gains 9, not 5 or 1.
    cost = np.array([[5.0, 0.0], [10.0, 1.0], [2.0, 1.0]])
    n_bytes = np.array([[2, 4]] * 3)
    assert allocate(cost, n_bytes, 8).tolist() == [0, 1, 0]
    assert allocate(cost, n_bytes, 7.9).tolist() == [0, 0, 0]
    assert allocate(cost, n_bytes, 10).tolist() == [1, 1, 0]
    assert allocate(cost, n_bytes, 100).tolist() == [1, 1, 1]


def test_greedy_choice_would_be_wrong():
    # Best gain per byte first takes layer 0 (3 for 1 byte), and then nothing fits; 4 for 3 bytes is better.
    cost, n_bytes = np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([[1, 2], [1, 4]])
    assert allocate(cost, n_bytes, 5).tolist() == [0, 1]


@settings(max_examples=40)
@given(st.data())
def test_allocation_equals_trying_all(data):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    cost = data.draw(arrays(float, shape, elements=st.floats(-1, 1).map(lambda value: round(value, 6))))
    n_bytes = data.draw(arrays(np.int64, shape, elements=st.integers(1, 12).map(lambda value: value * 1000)))
    budget = data.draw(st.integers(int(n_bytes.min(1).sum()), int(n_bytes.max(1).sum())))
    rows = np.arange(shape[0])
    every = [np.array(choice) for choice in itertools.product(range(shape[1]), repeat=shape[0])]
    best = min(cost[rows, choice].sum() for choice in every if n_bytes[rows, choice].sum() <= budget)
    choice = allocate(cost, n_bytes, budget)
    assert n_bytes[rows, choice].sum() <= budget
    assert cost[rows, choice].sum() == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("budget", [2.6, 3, 4, 5.5])
def test_two_hundred_layers_are_within_a_thousandth_of_the_relaxed_bound(budget):
    random = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 5, 6, 8])
    weights = random.choice([110_592, 331_776, 884_736], 210)
    cost = random.lognormal(-6, 1.5, (210, 1)) * 4.0 ** -(bits - 2) * random.lognormal(0, 0.2, (210, 6))
    n_bytes = weights[:, None] * bits // 8
    choice = allocate(cost, n_bytes, weights.sum() * budget / 8)
    rows = np.arange(210)
    total, spent = cost[rows, choice].sum(), n_bytes[rows, choice].sum()
    # Lagrange: for any price of a byte, min over choices of cost + price * (bytes - budget) bounds the optimum below.
    bound = max(
        (cost + price * n_bytes).min(1).sum() - price * weights.sum() * budget / 8
        for price in np.logspace(-12, -5, 2000)
    )
    assert spent <= weights.sum() * budget / 8
    assert bound <= total * (1 + 1e-9) and total <= bound * 1.001


def test_a_budget_that_nothing_fits_is_answered_with_what_is_needed():
    with pytest.raises(AllocationError, match=r"^A budget of 3 bytes is too small; the layers need 4\.$"):
        allocate(np.ones((2, 2)), np.array([[2, 4]] * 2), 3)
    with pytest.raises(AllocationError, match="no finite number"):
        allocate(np.array([[np.nan, 1.0]]), np.array([[2, 4]]), 3)


# Three users of one allocation

SHAPES = [(8, 20), (4, 8), (12, 20), (20, 12)]  # uneven, as pruning leaves them
NAMES = [f"model.layers.{place}.mlp.up_proj" for place in range(4)]


def bits(cost):
    return SensitivityTable(NAMES, SHAPES, cost, 1, [(2, 4), (3, 4), (4, 4), (8, 0)])


def sparsities(cost):
    return SparsityTable(NAMES, SHAPES, cost, 1, [0.0, 0.25, 0.5, 0.75])


def shares(cost):
    return RankTable(NAMES, SHAPES, cost, 1, [0.25, 0.5, 0.75, 1.0])


USERS = {"bits": bits, "sparsity": sparsities, "ranks": shares}


def test_amounts_by_hand():
    none = np.zeros((4, 4))
    # 32 weights at 2 bits are 8 bytes, with 8 scales of 2 bytes and 8 zero-points of 2 bits; at 8 bits 4 rows of both.
    assert bits(none).amounts[1].tolist() == [8 + 16 + 2, 12 + 16 + 3, 16 + 16 + 4, 32 + 8 + 4]
    assert sparsities(none).amounts[0].tolist() == [160, 120, 80, 40]
    # 8 x 20: a rank holds 28 numbers, a quarter of 160 is one of them, 80 two, 120 four.
    assert shares(none).amounts[0].tolist() == [28, 56, 112, 160]
    assert shares(none).amounts[1].tolist() == [12, 12, 24, 32]  # no layer has less than one rank


@pytest.mark.parametrize("user", USERS)
@settings(max_examples=25)
@given(data=st.data())
def test_each_user_gets_what_trying_all_finds(user, data):
    cost = data.draw(arrays(float, (4, 4), elements=st.floats(0, 1).map(lambda value: round(value, 6))))
    table = USERS[user](cost)
    amounts = table.amounts
    budget = data.draw(st.integers(int(amounts.min(1).sum()), int(amounts.max(1).sum())))
    rows = np.arange(4)
    every = [np.array(choice) for choice in itertools.product(range(4), repeat=4)]
    best = min(table.predicted(choice) for choice in every if amounts[rows, choice].sum() <= budget)
    choice = table.choose(budget)
    assert amounts[rows, choice].sum() <= budget
    assert table.predicted(choice) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("make", [sparsities, shares])
@given(seed=st.integers(0, 1000), share=st.floats(0.3, 0.95))
def test_what_a_choice_leaves_is_spent_to_less_than_a_step(make, seed, share):
    cost = np.sort(np.random.default_rng(seed).random((4, 4)), axis=1)
    table = make(cost if make is sparsities else cost[:, ::-1])
    steps = np.array([out for out, _ in SHAPES] if make is sparsities else [sum(shape) for shape in SHAPES])
    budget = int(share * table.amounts.max(1).sum())
    spent = table.spend(budget, steps)
    assert (spent >= table.amounts.min(1)).all() and (spent <= table.amounts.max(1)).all()
    grows = spent + steps <= table.amounts.max(1)
    left = budget - spent.sum()
    assert left >= 0 and (steps[grows] > left).all()
    assert (spent % steps == 0)[spent < table.amounts.max(1)].all()
    assert table.costs_at(spent).sum() <= table.predicted(table.choose(budget)) + 1e-12


def test_what_is_left_goes_where_it_gains_most():
    cost = np.array([[0.0, 1.0], [0.0, 3.0]])
    table = SparsityTable(NAMES[:2], [(4, 10), (4, 10)], cost, 1, [0.0, 0.5])
    # 50 of 80 stay: both keep 20; of the 10 that are left the second gets two for each of its rows, and 2 remain.
    assert table.spend(50, np.array([4, 4])).tolist() == [20, 28]
    # At 62 the second is whole and the first has 20; 2 are left, too few for its 4 rows.
    assert table.spend(62, np.array([4, 4])).tolist() == [20, 40]
    assert table.spend(70, np.array([4, 4])).tolist() == [28, 40]
    assert table.costs_at(np.array([28, 30])).tolist() == pytest.approx([0.6, 1.5])  # on a straight line


@pytest.mark.parametrize("make", [sparsities, shares])
def test_layers_that_cost_the_same_are_treated_alike(make):
    size = np.prod(SHAPES, axis=1)[:, None]
    each = np.array([0.0, 1, 4, 9]) if make is sparsities else np.array([9.0, 4, 1, 0])
    table = make(size * each)
    assert table.allocate(0.5).tolist() == table.amounts[:, 2 if make is sparsities else 1].tolist()


def test_a_layer_that_does_not_mind_gets_the_zeros_and_the_least_rank():
    cost = np.array([[0.0, 1, 4, 9]] * 4)
    cost[2] = 0
    # A quarter of 672 weights are 168 zeros, all of them in the 240 weights of that layer.
    assert sparsities(cost).allocate(0.25).tolist() == [160, 32, 240 - 168, 240]
    assert shares(cost[:, ::-1]).allocate(0.5).tolist()[2] < 0.5 * 12 * 20


def test_a_table_is_read_as_it_was_written(home):
    layers = {name: torch.nn.Linear(*shape[::-1]) for name, shape in zip(NAMES, SHAPES, strict=True)}
    costs = {name: [float(place), 0.1 + 0.2, 1e-9, 0.0] for place, name in enumerate(NAMES)}
    costs[NAMES[1]] = []  # never ran

    def kept(context):
        return SensitivityTable.kept(
            "a", layers, 7, costs.copy, context, formats=[(2, 4), (3, 4), (4, 4), (8, 0)]
        )

    context = Context()
    first, again = kept(Context()), kept(context)
    assert context.record.notes == ["Sensitivities were read from an earlier run."]
    assert first.names == again.names == [NAMES[0], NAMES[2], NAMES[3]]
    assert first.shapes == again.shapes == [SHAPES[0], SHAPES[2], SHAPES[3]]
    assert first.formats == again.formats and again.tokens == 7
    assert np.array_equal(first.cost, again.cost)
