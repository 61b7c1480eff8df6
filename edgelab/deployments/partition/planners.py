"""Planners: from a problem and an objective to a placement.

exact     the best plan that gives each device one run, under memory limits; the head may come back to the source
greedy    for fleets of too many types, with a bound below which no plan can be

Exact, over segments: the best way to have the first `last` layers done, with `used` devices of each type, the last of
them of type t, is a best way to have the first `first` done, one more hand-over, and one more run:

    best(last, used + t, t) = min over first, k of
        best(first, used, k) (+) handing(first - 1, k, t) (+) run(first, last, t)

where (+) is a sum, and for throughput the maximum. Devices of one type change nothing but a number in `used`, so that
fleets of dozens work (PipeEdge: Hu et al. 2022, arXiv:2110.14895).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from edgelab.deployments.partition.baselines import cloud_edge_even, cloud_edge_opt, edge_solo, edgeshard
from edgelab.deployments.partition.oracle import by_milp
from edgelab.deployments.partition.problem import (
    NoPlan,
    Objective,
    Placement,
    Plan,
    Problem,
    Stage,
    TooManyTypes,
    returns,
    stages,
    why_none,
)

Planner = Callable[[Problem, Objective], Plan]
STATES = 60_000  # numbers of devices in use that the exact planner looks at; some seconds for 80 layers


# The head at home


def _or_head_home(planner: Planner) -> Planner:
    """The better of two plans: one run for each device, or that with the returning layers back on the source."""

    @functools.wraps(planner)
    def better(problem: Problem, objective: Objective) -> Plan:
        found: list[Plan] = []
        refused: NoPlan | None = None
        for home in (False, True):
            if home and not 0 < problem.returning < problem.layers:
                continue
            try:
                plan = planner(problem.head_home() if home else problem, objective)
            except NoPlan as error:
                refused = refused or error
                continue
            back = (0,) * problem.returning if home else ()
            placement = plan.placement + back
            found.append(replace(plan, placement=placement, cost=problem.cost(placement, objective)))
        if not found:
            raise refused
        best = min(found, key=lambda plan: plan.cost)
        bounds = [plan.bound for plan in found if plan.bound is not None]
        return replace(best, bound=min(bounds, default=None))

    return better


# Exact, over plans of one run for each device


def types(problem: Problem) -> list[list[int]]:
    """Devices that may stand in for each other: the same times, memory, permission, power and links to all others.

    The source is a type of its own. Devices that have to take part are, too.
    """
    found: list[list[int]] = []
    for device in range(problem.devices):
        for members in found[1:]:
            if not {device, *members} & problem.needed and all(
                _alike(problem, device, member) for member in members
            ):
                members.append(device)
                break
        else:
            found.append([device])
    return found


def _alike(problem: Problem, one: int, other: int) -> bool:
    swap = np.arange(problem.devices)
    swap[[one, other]] = other, one
    links = (problem.bandwidth, problem.delay)
    columns = (problem.seconds, problem.allowed)
    return (
        all(np.array_equal(table[:, one], table[:, other]) for table in columns)
        and problem.room[one] == problem.room[other]
        and problem.watts[one] == problem.watts[other]
        and all(
            np.array_equal(_off_diagonal(link), _off_diagonal(link[np.ix_(swap, swap)])) for link in links
        )
    )


def _off_diagonal(table: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(table), dtype=bool), 0, table)


@_or_head_home
def exact(problem: Problem, objective: Objective) -> Plan:
    """The best plan that gives each device one run. Raises NoPlan where none fits, and for too many types."""
    members = types(problem)
    count = np.prod([len(one) + 1 for one in members], dtype=float)
    if count > STATES:
        raise TooManyTypes(
            f"{problem.devices} devices of {len(members)} types are {count:,.0f} fleets to look at, above {STATES:,}; "
            "use the planner 'greedy', which says how far from the best it may be."
        )
    joined = np.maximum if objective == "throughput" else np.add
    first_of = [one[0] for one in members]
    second_of = [one[min(1, len(one) - 1)] for one in members]
    moving = problem.handing(objective)
    run = [problem.run_costs(device, objective) for device in first_of]
    handing = np.empty((problem.layers, len(members), len(members)))  # between types
    for k, t in itertools.product(range(len(members)), repeat=2):
        handing[:, k, t] = moving[:, first_of[k], second_of[t] if k == t else first_of[t]]
    best: dict[tuple[int, ...], np.ndarray] = {}  # (layers + 1, types)
    came: dict[tuple[int, ...], np.ndarray] = {}  # first layer of the run and type before it
    answer, end = np.inf, None
    for used in itertools.product(*(range(len(one) + 1) for one in members)):
        table = np.full((problem.layers + 1, len(members)), np.inf)
        origin = np.zeros((problem.layers + 1, len(members), 2), dtype=np.int32)
        for t, number in enumerate(used):
            before = (*used[:t], number - 1, *used[t + 1 :])
            if not number:
                continue
            if sum(used) == 1:
                table[:, t] = run[t][0]
                origin[:, t] = 0, -1
                continue
            earlier = best[before]
            if not np.isfinite(earlier).any():
                continue
            arriving = joined(earlier[1:-1], handing[:-1, :, t])  # (first - 1, types)
            k = arriving.argmin(1)
            arriving = arriving[np.arange(len(k)), k]
            whole = joined(arriving[:, None], run[t][1:])  # (first - 1, last)
            if len(whole):
                first = whole.argmin(0)
                table[:, t] = whole[first, np.arange(problem.layers + 1)]
                origin[:, t, 0], origin[:, t, 1] = first + 1, k[first]
        best[used], came[used] = table, origin
        done = joined(table[-1], moving[-1, first_of, 0])
        if all(used[t] for t, one in enumerate(members) if one[0] in problem.needed) and done.min() < answer:
            answer, end = done.min(), (used, int(done.argmin()))
    if end is None:
        raise NoPlan(why_none(problem))
    placement = _walk_back(came, *end, members, problem.layers)
    cost = problem.cost(placement, objective)
    return Plan(placement, objective, cost, "exact", bound=cost)


def _walk_back(
    came: dict[tuple[int, ...], np.ndarray],
    used: tuple[int, ...],
    t: int,
    members: list[list[int]],
    last: int,
) -> Placement:
    left = [list(one) for one in members]
    backwards: list[int] = []
    while t >= 0:
        first, before = came[used][last, t]
        backwards += [left[t].pop(0)] * (last - first)
        used = (*used[:t], used[t] - 1, *used[t + 1 :])
        last, t = int(first), int(before)
    return tuple(reversed(backwards))


# Large fleets of many types


@_or_head_home
def greedy(problem: Problem, objective: Objective) -> Plan:
    """A plan found by remembering one best way for each layer and device, with a bound below which none can be.

    The bound is that of placements that may come back to a device and whose runs, each by itself, fit.
    """
    joined = np.maximum if objective == "throughput" else np.add
    moving = problem.handing(objective)
    run = [problem.run_costs(device, objective) for device in range(problem.devices)]
    relaxed = np.full((problem.layers + 1, problem.devices), np.inf)
    ways: dict[tuple[int, int], tuple[float, Placement]] = {}
    for last in range(1, problem.layers + 1):
        for j in range(problem.devices):
            relaxed[last, j] = run[j][0, last]
            if np.isfinite(run[j][0, last]):
                ways[last, j] = float(run[j][0, last]), (j,) * last
            for first in range(1, last):
                if not np.isfinite(run[j][first, last]):
                    continue
                arriving = joined(joined(relaxed[first], moving[first - 1, :, j]), run[j][first, last])
                relaxed[last, j] = min(relaxed[last, j], arriving.min())
                for k in range(problem.devices):
                    so_far, placement = ways.get((first, k), (np.inf, ()))
                    whole = joined(joined(so_far, moving[first - 1, k, j]), run[j][first, last])
                    if j not in placement and whole < ways.get((last, j), (np.inf,))[0]:
                        ways[last, j] = float(whole), placement + (j,) * (last - first)
    ends = [ways[problem.layers, j][1] for j in range(problem.devices) if (problem.layers, j) in ways]
    ends = [placement for placement in ends if problem.fits(placement)]
    ends = [placement for placement in ends if np.isfinite(problem.cost(placement, objective))]
    if not ends:
        raise NoPlan(why_none(problem))
    placement = min(ends, key=lambda one: problem.cost(one, objective))
    bound = joined(relaxed[-1], moving[-1, :, 0]).min()
    return Plan(placement, objective, problem.cost(placement, objective), "greedy", float(bound))


PLANNERS: dict[str, Planner] = {
    "edge_solo": edge_solo,
    "cloud_edge_even": cloud_edge_even,
    "cloud_edge_opt": cloud_edge_opt,
    "edgeshard": edgeshard,
    "exact": exact,
    "greedy": greedy,
    "milp": _or_head_home(by_milp),
}


def plan_or_none(planner: str, problem: Problem, objective: Objective) -> Plan | None:
    """The plan of a planner by its name, None where it finds none."""
    try:
        return PLANNERS[planner](problem, objective)
    except NoPlan:
        return None


def verdict(problem: Problem, published: Plan | None, best: Plan) -> str:
    """A published plan against the exact one: equal, worse, better, infeasible, not found, or returning to a device."""
    if published is None:
        return "not found"
    if not problem.fits(published.placement):
        return "infeasible"
    if returns(published.placement):
        return "returning"
    if published.cost > best.cost * (1 + 1e-9):
        return "worse"
    return "equal" if published.cost >= best.cost * (1 - 1e-9) else "better"


# A plan in words


def explained(problem: Problem, plan: Plan, parts: Sequence[str] = ()) -> list[str]:
    """A sentence for each stage, and one for every device that was left out. parts: names of the layers."""
    parts = parts or [f"layer {place}" for place in range(problem.layers)]
    said = []
    runs = stages(plan.placement)
    moving = problem.handing("latency")
    for place, stage in enumerate(runs):
        spent = problem.seconds[stage.first : stage.last, stage.device].sum()
        held = problem.memory[stage.first : stage.last].sum()
        following = runs[place + 1].device if place + 1 < len(runs) else 0
        over = moving[stage.last - 1, stage.device, following]
        sentence = (
            f"{problem.names[stage.device]} runs {_from_to(parts, stage)} in {1e3 * spent:,.1f} ms per token and holds "
            f"{held / 1e6:,.1f} of {problem.room[stage.device] / 1e6:,.1f} MB"
        )
        if stage.device != following:
            sentence += f"; handing on to {problem.names[following]} takes {1e3 * over:,.1f} ms"
        said.append(sentence + ".")
    return said + [
        f"{problem.names[device]} is left out: {reason}" for device, reason in left_out(problem, plan)
    ]


def _from_to(parts: Sequence[str], stage: Stage) -> str:
    first, last = parts[stage.first], parts[stage.last - 1]
    return first if first == last else f"{first} to {last}"


def _why(problem: Problem, plan: Plan, other: Plan) -> str:
    """What another plan spends more of, or saves, by milliseconds of a token."""
    layers, said = np.arange(problem.layers), []
    moving = problem.handing("latency")
    for what, of in (
        ("its stages take", lambda places: problem.seconds[layers, places].sum()),
        ("its links", lambda places: moving[layers, places, np.append(places[1:], 0)].sum()),
    ):
        more = 1e3 * float(of(np.array(other.placement)) - of(np.array(plan.placement)))
        said.append(f"{what} {abs(more):,.1f} ms {'more' if more >= 0 else 'less'}")
    return " and ".join(said)


def left_out(problem: Problem, plan: Plan) -> list[tuple[int, str]]:
    """Every device that a plan does not use, and what the best plan that uses it would cost."""
    found = []
    grouped = types(problem)
    for members in grouped:
        if any(device in plan.placement for device in members) or members[0] == 0:
            continue
        forced = replace(problem, needed=problem.needed | {members[0]})
        try:
            other = exact(forced, plan.objective)
        except TooManyTypes:
            reason = "with so many types of devices, no plan with it was looked at."
        except NoPlan:
            reason = "no plan that uses it keeps the limits."
        else:
            more = other.cost / plan.cost - 1 if plan.cost else np.inf
            reason = "it would change nothing."
            if abs(more) > 1e-9:
                than = "worse" if more > 0 else "better"
                reason = f"the best plan with it is {abs(more):.1%} {than}: {_why(problem, plan, other)}."
        found += [(device, reason) for device in members]
    return found
