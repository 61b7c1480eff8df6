"""Plans: the worked relay, the exact planner against every plan and against integer programming, published plans."""

import dataclasses

import numpy as np
import pytest

from edgelab.deployments.partition import planners
from edgelab.deployments.partition.problem import NoPlan, Problem, every_plan, returns, stages

BOTH = ("latency", "throughput")


def drawn(seed: int, layers: int = 6, devices: int = 4) -> Problem:
    """Random times, links and memory that binds: all devices together hold between once and twice the model."""
    random = np.random.default_rng(seed)
    memory = random.integers(1, 6, layers).astype(float)
    shares = random.dirichlet(np.ones(devices)) * memory.sum() * random.uniform(1, 2)
    room = np.maximum(shares.round(), memory[0] * (np.arange(devices) == 0))
    bandwidth = random.uniform(0.2, 5, (devices, devices))
    bandwidth[random.random((devices, devices)) < 0.1] = 0
    return Problem(
        seconds=random.uniform(0.5, 10, (layers, devices)),
        handed=random.uniform(1, 10, layers),
        memory=memory,
        room=room,
        bandwidth=bandwidth,
        delay=random.uniform(0, 1, (devices, devices)),
        watts=random.uniform(1, 10, devices),
    )


def cost_of(planner, problem, objective):
    try:
        return planner(problem, objective).cost
    except NoPlan:
        return np.inf


def cheapest(problem, objective):
    return min((problem.cost(one, objective) for one in every_plan(problem)), default=np.inf)


def test_relay_that_wins(relay):
    problem = relay
    best = planners.exact(problem, "latency")
    assert best.placement == (0, 1, 2, 2, 2, 2)
    assert best.cost == pytest.approx(29.0)
    assert planners.edge_solo(problem, "latency").cost == pytest.approx(60)
    assert problem.cost((0, 2, 2, 2, 2, 2), "latency") == pytest.approx(143)
    assert planners.exact(problem, "throughput").cost == pytest.approx(10)
    assert planners.edgeshard(problem, "latency").cost == pytest.approx(29.0)
    assert planners.edgeshard(problem, "throughput").cost == pytest.approx(10)
    assert planners.cloud_edge_even(problem, "latency").cost == pytest.approx(30 + 128 + 3)
    assert planners.cloud_edge_opt(problem, "latency").cost == pytest.approx(
        60
    )  # the slow link is worth no cut


def test_exact_equals_every_plan():
    for seed in range(300):
        problem = drawn(seed)
        for objective in BOTH:
            assert cost_of(planners.exact, problem, objective) == pytest.approx(cheapest(problem, objective))


@pytest.mark.parametrize("objective", ["energy", "slow_bytes"])
def test_exact_equals_every_plan_in_other_objectives(objective):
    for seed in range(30):
        problem = drawn(seed)
        assert cost_of(planners.exact, problem, objective) == pytest.approx(cheapest(problem, objective))


def with_head_home(problem: Problem, objective: str) -> float:
    """The best of all plans whose last layer may be on the source, whatever is before it."""
    stay = dataclasses.replace(
        problem,
        seconds=problem.seconds[:-1],
        handed=problem.handed[:-1],
        memory=problem.memory[:-1],
        allowed=problem.allowed[:-1],
    )
    at_home = [(*one, 0) for one in every_plan(stay)]
    fitting = [one for one in at_home if problem.fits(one)]
    return min([problem.cost(one, objective) for one in fitting] + [cheapest(problem, objective)])


@pytest.mark.parametrize("objective", [*BOTH, "energy", "slow_bytes"])
def test_the_head_may_come_back_to_the_source(objective):
    returned = 0
    for seed in range(60):
        problem = dataclasses.replace(drawn(seed, layers=5, devices=3), returning=1)
        expected = with_head_home(problem, objective)
        for planner in (planners.exact, planners.PLANNERS["milp"]):
            if planner is planners.exact or seed < 10:
                assert cost_of(planner, problem, objective) == pytest.approx(expected)
        if np.isfinite(expected):
            returned += returns(planners.exact(problem, objective).placement)
    assert returned > 3


def test_a_private_head_leaves_the_blocks_to_others(relay):
    """First and last layer on the source: 10, over the slow way, five ms on the fastest, and back at no cost."""
    allowed = relay.allowed.copy()
    allowed[-1, 1:] = False
    private = dataclasses.replace(relay, allowed=allowed, returning=1, room=np.array([2.0, 6, 5]))
    best = planners.exact(private, "latency")
    assert best.placement[0] == best.placement[-1] == 0
    assert set(best.placement[1:-1]) <= {1, 2}
    assert best.cost == pytest.approx(private.cost(best.placement, "latency"))
    assert best.bound == pytest.approx(best.cost)
    with pytest.raises(NoPlan):
        planners.exact(dataclasses.replace(private, returning=0), "latency")


def test_exact_equals_integer_programming():
    for seed in range(30):
        problem = drawn(seed, layers=5, devices=3)
        for objective in BOTH:
            assert cost_of(planners.exact, problem, objective) == pytest.approx(
                cost_of(planners.by_milp, problem, objective)
            )


def test_published_plan_is_never_better_than_exact_among_plans_of_one_run():
    """And each kind of verdict occurs: equal, worse, none found, and one that returns to a device."""
    seen = dict.fromkeys(("equal", "worse", "better", "infeasible", "returning", "none"), 0)
    for seed in range(300):
        problem = drawn(seed, layers=7)
        try:
            best = planners.exact(problem, "latency")
            seen[planners.verdict(problem, planners.edgeshard(problem, "latency"), best)] += 1
        except NoPlan:
            seen["none"] += 1
        published = cost_of(planners.edgeshard, problem, "throughput")
        assert published == pytest.approx(cost_of(planners.exact, problem, "throughput"))
    assert not seen["better"] and not seen["infeasible"]
    assert seen["equal"] and seen["worse"] and seen["returning"]


def test_returning_can_be_cheaper_than_every_plan_of_one_run():
    """A device with room for two layers is quick with the first and the last: it is left and entered again."""
    problem = Problem(
        seconds=np.array([[1.0, 9.0], [9.0, 1.0], [1.0, 9.0]]),
        handed=np.full(3, 1.0),
        memory=np.ones(3),
        room=np.array([2.0, 3.0]),
        bandwidth=np.full((2, 2), 10.0),
    )
    published, best = (one(problem, "latency") for one in (planners.edgeshard, planners.exact))
    assert published.placement == (0, 1, 0)
    assert returns(published.placement)
    assert published.cost == pytest.approx(3.2)
    assert best.cost == pytest.approx(min(1 + 1 + 9 + 0.2, 1 + 9 + 9 + 0.2))
    assert planners.verdict(problem, published, best) == "returning"


def test_devices_of_one_type_are_planned_together():
    """80 layers on 15 devices of three types, as in the published testbed; the plan is that of single devices."""
    small = fleet_of([1, 2, 1], layers=9)
    alone = np.random.default_rng(0).uniform(0.999, 1.001, small.devices)
    for objective in BOTH:
        assert len(planners.types(small)) == 3
        assert planners.exact(small, objective).cost == pytest.approx(cheapest(small, objective))
    apart = dataclasses.replace(small, room=small.room * alone)
    assert len(planners.types(apart)) == 4


def fleet_of(counts, layers):
    kinds = np.repeat(np.arange(len(counts)), counts)
    speed = np.array([10.0, 4.0, 1.0, 6.0, 2.0])[kinds]
    room = np.array([0.3, 0.4, 0.35, 0.2, 0.25])[kinds] * layers
    bandwidth = np.full((len(kinds), len(kinds)), 50.0)
    bandwidth[0, kinds == 2] = bandwidth[kinds == 2, 0] = 1.0
    return Problem(
        seconds=np.tile(speed, (layers, 1)),
        handed=np.full(layers, 8.0),
        memory=np.ones(layers),
        room=room,
        bandwidth=bandwidth,
    )


def test_large_fleets_are_planned():
    for counts, layers in (([1, 11, 2, 1], 80), ([1, 8, 8, 8, 7], 80)):
        problem = fleet_of(counts, layers)
        for objective in BOTH:
            plan = planners.exact(problem, objective)
            assert problem.fits(plan.placement)
            assert not returns(plan.placement)


def test_fleets_of_too_many_types_are_refused_and_greedy_has_a_bound():
    random = np.random.default_rng(1)
    problem = dataclasses.replace(fleet_of([1, 19], 12), seconds=random.uniform(1, 9, (12, 20)))
    with pytest.raises(NoPlan, match="greedy"):
        planners.exact(problem, "latency")
    plan = planners.greedy(problem, "latency")
    assert problem.fits(plan.placement)
    assert 0 < plan.bound <= plan.cost


def test_greedy_lies_between_its_bound_and_the_best_plan():
    for seed in range(60):
        problem = drawn(seed)
        for objective in BOTH:
            best = cost_of(planners.exact, problem, objective)
            try:
                plan = planners.greedy(problem, objective)
            except NoPlan:
                continue
            assert plan.bound <= best * (1 + 1e-9)
            assert best <= plan.cost * (1 + 1e-9)


def test_constraints_are_kept(relay):
    problem = relay
    assert 1 not in planners.exact(problem.without(1), "latency").placement
    needed = dataclasses.replace(problem, needed=frozenset({1}), room=np.array([6.0, 6.0, 6.0]))
    assert 1 in planners.exact(needed, "latency").placement
    home = problem.allowed.copy()
    home[:2, 1:] = False
    kept = planners.exact(dataclasses.replace(problem, allowed=home), "latency").placement
    assert kept[:2] == (0, 0)


def test_what_fits_nowhere_says_what_would_help(relay):
    problem = dataclasses.replace(relay, memory=np.full(6, 10e6))
    with pytest.raises(NoPlan, match=r"takes 60\.0 MB.* have 50\.0 MB; add 10\.0 MB, or quantize to 83%"):
        planners.exact(dataclasses.replace(problem, room=np.array([20e6, 20e6, 10e6])), "latency")
    with pytest.raises(NoPlan, match=r"Layer 0 takes 10\.0 MB.* has 5\.0 MB; it needs 5\.0 MB more"):
        planners.exact(dataclasses.replace(problem, room=np.full(3, 5e6)), "latency")
    with pytest.raises(NoPlan, match=r"device 0 would hold 0\.06 GB and has 0\.05 GB"):
        planners.edge_solo(dataclasses.replace(problem, room=np.array([50e6, 60e6, 60e6])), "latency")
    with pytest.raises(NoPlan, match="bandwidth has the shape"):
        dataclasses.replace(problem, bandwidth=np.ones((2, 2)))


def test_plan_in_words(relay):
    problem = dataclasses.replace(relay, names=("phone", "laptop", "cloud"))
    plan = planners.exact(problem, "latency")
    said = planners.explained(problem, plan)
    assert said[0].startswith("phone runs layer 0 in 10,000.0 ms")
    assert "handing on to laptop" in said[0]
    assert said[2].startswith("cloud runs layer 2 to layer 5 in 4,000.0 ms")
    assert [stage.device for stage in stages(plan.placement)] == [0, 1, 2]
    named = planners.explained(
        problem, plan, ["embedding", *(f"block {place}" for place in range(4)), "head"]
    )
    assert named[2].startswith("cloud runs block 1 to head in")


def test_a_device_that_is_left_out_and_why(relay):
    """All on the source takes 60 s; one layer on the laptop 60 again, 2.5 to get there and nothing back."""
    problem = dataclasses.replace(relay, names=("phone", "laptop", "cloud")).without(2)
    plan = planners.exact(problem, "latency")
    assert set(plan.placement) == {0}
    (said,) = [one for one in planners.explained(problem, plan) if one.startswith("laptop")]
    assert said == (
        "laptop is left out: the best plan with it is 4.2% worse: its stages take 0.0 ms more and its links 2,500.0 ms "
        "more."
    )


def test_a_plan_that_another_device_would_better_says_so(relay):
    problem = dataclasses.replace(relay, names=("phone", "laptop", "cloud"))
    (said,) = [
        one for one in planners.explained(problem, planners.edge_solo(problem, "latency")) if "laptop" in one
    ]
    assert said.startswith(
        "laptop is left out: the best plan with it is 51.7% better: its stages take 36,000.0 ms less"
    )


def test_a_fleet_of_too_many_types_is_not_said_to_fit_nowhere(monkeypatch, relay):
    plan = planners.exact(relay.without(2), "latency")
    monkeypatch.setattr(planners, "STATES", 1)
    assert "no plan with it was looked at" in planners.explained(relay.without(2), plan)[-1]


def test_a_planner_that_finds_none(relay):
    full = dataclasses.replace(relay, room=np.ones(3))
    assert planners.plan_or_none("exact", full, "latency") is None
    assert planners.verdict(relay, None, planners.exact(relay, "latency")) == "not found"
