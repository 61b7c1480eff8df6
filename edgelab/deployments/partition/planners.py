"""Planners: from a problem and an objective to a placement.

exact                 the best plan that gives each device one run, under memory limits
edgeshard             the two recurrences as published
edge_solo, cloud_edge_even, cloud_edge_opt      what EdgeShard compares with

Exact, over segments: the best way to have the first `last` layers done, with `used` devices of each type, the last of
them of type t, is a best way to have the first `first` done, one more hand-over, and one more run:

    best(last, used + t, t) = min over first, k of
        best(first, used, k) (+) handing(first - 1, k, t) (+) run(first, last, t)

where (+) is a sum, and for throughput the maximum. Devices of one type change nothing but a number in `used`, so that
fleets of dozens work (PipeEdge: Hu et al. 2022, arXiv:2110.14895).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from edgelab.deployments.partition.problem import NoPlan, Objective, Problem, returns, stages

Placement = tuple[int, ...]
STATES = 60_000  # numbers of devices in use that the exact planner looks at; some seconds for 80 layers
SUBSETS = 14  # devices of the published throughput recurrence, whose work doubles with each
SMALL = 1e-12


@dataclass(frozen=True)
class Plan:
    """A placement and what it costs. bound: what no plan can be below; equal to the cost where the plan is exact."""

    placement: Placement
    objective: Objective
    cost: float
    planner: str
    bound: float | None = None


def planned(problem: Problem, placement: Placement, objective: Objective, planner: str) -> Plan:
    return Plan(placement, objective, problem.cost(placement, objective), planner)


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


def exact(problem: Problem, objective: Objective) -> Plan:
    """The best plan that gives each device one run. Raises NoPlan where none fits, and for too many types."""
    members = types(problem)
    count = np.prod([len(one) + 1 for one in members], dtype=float)
    if count > STATES:
        raise NoPlan(
            f"{problem.devices} devices of {len(members)} types are {count:,.0f} fleets to look at, above {STATES:,}; "
            "use the planner 'greedy', which says how far from the best it may be."
        )
    joined = np.maximum if objective == "throughput" else np.add
    first_of = [one[0] for one in members]
    second_of = [one[min(1, len(one) - 1)] for one in members]
    moving = problem.handing(objective)
    run = [_run_costs(problem, device, objective) for device in first_of]
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
    return Plan(
        placement, objective, problem.cost(placement, objective), "exact", problem.cost(placement, objective)
    )


def _run_costs(problem: Problem, device: int, objective: Objective) -> np.ndarray:
    """Of layers first to last - 1 on a device, (layers, layers + 1), infinite where they do not fit."""
    total = np.concatenate([[0], np.cumsum(problem.own(objective)[:, device])])
    return np.where(problem.runs(device), total[None] - total[:-1, None], np.inf)


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


def why_none(problem: Problem) -> str:
    """One sentence: what is missing, and the smallest change that would help."""
    need, room = problem.memory.sum(), problem.room[problem.allowed.any(0)].sum()
    largest = int(problem.memory.argmax())
    roomiest = problem.room[problem.allowed[largest]].max(initial=0)
    if problem.memory[largest] > roomiest:
        return (
            f"Layer {largest} takes {problem.memory[largest] / 1e6:,.1f} MB, and the roomiest device that may hold it "
            f"has {roomiest / 1e6:,.1f} MB; it needs {(problem.memory[largest] - roomiest) / 1e6:,.1f} MB more."
        )
    if need > room:
        return (
            f"The model takes {need / 1e6:,.1f} MB, and all devices together have {room / 1e6:,.1f} MB; add "
            f"{(need - room) / 1e6:,.1f} MB, or quantize to {room / need:.0%} of the bytes."
        )
    return (
        f"The model takes {need / 1e6:,.1f} MB and all devices together have {room / 1e6:,.1f} MB, but no chain of "
        "runs keeps every limit: layers do not divide, links are missing, or a device that has to take part cannot."
    )


# Large fleets of many types


def greedy(problem: Problem, objective: Objective) -> Plan:
    """A plan found by remembering one best way for each layer and device, with a bound below which none can be.

    The bound is that of placements that may come back to a device and whose runs, each by itself, fit.
    """
    joined = np.maximum if objective == "throughput" else np.add
    moving = problem.handing(objective)
    run = [_run_costs(problem, device, objective) for device in range(problem.devices)]
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


# As published


def edgeshard(problem: Problem, objective: Objective) -> Plan:
    """EdgeShard's recurrence for latency or for throughput. Raises NoPlan where it finds no placement."""
    if objective not in ("latency", "throughput"):
        raise NoPlan(
            f"EdgeShard plans for latency and for throughput, not for {objective}; use the exact planner."
        )
    placement = (_published_latency if objective == "latency" else _published_throughput)(problem)
    if placement is None:
        raise NoPlan("EdgeShard's recurrence finds no placement that fits; the exact planner may.")
    return planned(problem, placement, objective, "edgeshard")


def _published_latency(problem: Problem) -> Placement | None:
    """DP(i, j) = min over k of DP(i - 1, k) + t(i, j) + tc(i - 1, k, j), where layer i fits on j behind that way.

    Each state keeps the one way that is quickest so far, and the memory of that way only: it is not exact once memory
    binds, and may come back to a device that it has left.
    """
    moving = problem.handing("latency")
    ways: dict[int, tuple[float, Placement]] = {}
    for j in range(problem.devices):
        if problem.allowed[0, j] and problem.memory[0] <= problem.room[j] * (1 + SMALL):
            ways[j] = problem.seconds[0, j], (j,)
    for layer in range(1, problem.layers):
        longer: dict[int, tuple[float, Placement]] = {}
        for j in range(problem.devices):
            if not problem.allowed[layer, j]:
                continue
            for k, (so_far, placement) in ways.items():
                used = problem.memory[:layer][np.asarray(placement) == j].sum()
                if used + problem.memory[layer] > problem.room[j] * (1 + SMALL):
                    continue
                whole = so_far + moving[layer - 1, k, j] + problem.seconds[layer, j]
                if whole < longer.get(j, (np.inf,))[0]:
                    longer[j] = whole, (*placement, j)
        ways = longer
    ends = {k: so_far + moving[-1, k, 0] for k, (so_far, _) in ways.items()}
    if not ends or not np.isfinite(min(ends.values())):
        return None
    return ways[min(ends, key=ends.__getitem__)][1]


def _published_throughput(problem: Problem) -> Placement | None:
    """g(m, S + j, j) = min over i, k in S of max(g(i, S, k), tc(i - 1, k, j), time of layers i to m - 1 on j)."""
    if problem.devices > SUBSETS:
        raise NoPlan(
            f"The published recurrence looks at every set of {problem.devices} devices, 2^{problem.devices} of them, "
            f"and {SUBSETS} devices are the most here; the exact planner takes devices of one type together."
        )
    moving = problem.handing("throughput")
    run = [_run_costs(problem, device, "throughput") for device in range(problem.devices)]
    best: dict[tuple[frozenset[int], int], list[tuple[float, Placement]]] = {}
    nothing = (np.inf, ())
    for j in range(problem.devices):
        best[frozenset({j}), j] = [(run[j][0, last], (j,) * last) for last in range(problem.layers + 1)]
    for size in range(2, problem.devices + 1):
        for chosen in map(frozenset, itertools.combinations(range(problem.devices), size)):
            for j in chosen:
                ways = [nothing] * (problem.layers + 1)
                for k in chosen - {j}:
                    for first, (so_far, placement) in enumerate(best[chosen - {j}, k]):
                        if not 0 < first < problem.layers or not np.isfinite(so_far):
                            continue
                        arriving = max(so_far, moving[first - 1, k, j])
                        for last in range(first + 1, problem.layers + 1):
                            whole = max(arriving, run[j][first, last])
                            if whole < ways[last][0]:
                                ways[last] = whole, placement + (j,) * (last - first)
                best[chosen, j] = ways
    ends = [(max(ways[-1][0], moving[-1, j, 0]), ways[-1][1]) for (_, j), ways in best.items()]
    ends = [end for end in ends if np.isfinite(end[0]) and problem.needed <= set(end[1])]
    return min(ends)[1] if ends else None


# What EdgeShard compares with


def edge_solo(problem: Problem, objective: Objective) -> Plan:
    """Every layer on the source."""
    return _if_it_fits(problem, (0,) * problem.layers, objective, "edge_solo")


def cloud_of(problem: Problem) -> int:
    """The device that is quickest with the whole model, the source apart."""
    if problem.devices < 2:
        raise NoPlan("A fleet of one device has no cloud.")
    return 1 + int(problem.seconds[:, 1:].sum(0).argmin())


def cloud_edge_even(problem: Problem, objective: Objective) -> Plan:
    """Half of the layers on the source, the others in the cloud; where that does not fit, the nearest cut that does."""
    cloud, layers = cloud_of(problem), problem.layers
    for cut in sorted(range(1, layers), key=lambda first: abs(2 * first - layers)):
        placement = (0,) * cut + (cloud,) * (layers - cut)
        if problem.fits(placement) and np.isfinite(problem.cost(placement, objective)):
            return planned(problem, placement, objective, "cloud_edge_even")
    half = layers // 2
    return _if_it_fits(problem, (0,) * half + (cloud,) * (layers - half), objective, "cloud_edge_even")


def cloud_edge_opt(problem: Problem, objective: Objective) -> Plan:
    """The best cut between the source and the cloud, or none."""
    cloud, layers = cloud_of(problem), problem.layers
    cuts = [(0,) * first + (cloud,) * (layers - first) for first in range(layers + 1)]
    fitting = [cut for cut in cuts if problem.fits(cut) and np.isfinite(problem.cost(cut, objective))]
    if not fitting:
        raise NoPlan("No cut between the source and the cloud fits both of them.")
    best = min(fitting, key=lambda cut: problem.cost(cut, objective))
    return planned(problem, best, objective, "cloud_edge_opt")


def _if_it_fits(problem: Problem, placement: Placement, objective: Objective, planner: str) -> Plan:
    if not problem.fits(placement) or not np.isfinite(problem.cost(placement, objective)):
        raise NoPlan(f"{planner} does not fit: {_too_much(problem, placement)}.")
    return planned(problem, placement, objective, planner)


def _too_much(problem: Problem, placement: Placement) -> str:
    used = np.bincount(np.asarray(placement), weights=problem.memory, minlength=problem.devices)
    for device in range(problem.devices):
        if used[device] > problem.room[device]:
            return (
                f"{problem.names[device]} would hold {used[device] / 1e9:.3g} GB and has "
                f"{problem.room[device] / 1e9:.3g} GB"
            )
    return "a layer is not allowed where it would be, or a link is missing"


# An oracle of another kind


def by_milp(problem: Problem, objective: Objective) -> Plan:
    """The same by mixed-integer programming, to check the exact planner with. Raises NoPlan where none fits.

    x(i, k, j): layer i is handed on from device k to j, one unit of flow from layer to layer. A device starts a run at
    most once. Throughput: the bottleneck is a variable above every device's sum and every hand-over.
    """
    layers, devices = problem.layers, problem.devices
    moving, own = problem.handing(objective), problem.own(objective)
    flow = {}
    for i, k, j in itertools.product(range(layers), range(devices), range(devices)):
        starts = i == 0 and k == j
        if (starts or (i > 0 and np.isfinite(moving[i - 1, k, j]))) and problem.allowed[i, j]:
            flow[i, k, j] = len(flow)
    count = len(flow) + 1  # the last one is the bottleneck
    rows, low, high = [], [], []

    def constrain(terms: dict[int, float], least: float, most: float) -> None:
        rows.append(terms)
        low.append(least)
        high.append(most)

    constrain({place: 1.0 for (i, _, _), place in flow.items() if i == 0}, 1, 1)
    for i, j in itertools.product(range(1, layers), range(devices)):
        into = {place: 1.0 for (layer, _, to), place in flow.items() if (layer, to) == (i - 1, j)}
        out = {place: -1.0 for (layer, source, _), place in flow.items() if (layer, source) == (i, j)}
        constrain(into | out, 0, 0)
    for j in range(devices):
        held = {place: problem.memory[i] for (i, _, to), place in flow.items() if to == j}
        constrain(held, 0, problem.room[j] * (1 + SMALL))
        started = {place: 1.0 for (i, k, to), place in flow.items() if to == j and (k != j or i == 0)}
        constrain(started, int(j in problem.needed), 1)
        if objective == "throughput":
            total = {place: own[i, j] for (i, _, to), place in flow.items() if to == j}
            constrain(total | {count - 1: -1.0}, -np.inf, 0)
    cost = np.zeros(count)
    for (i, k, j), place in flow.items():
        back = moving[-1, j, 0] if i == layers - 1 else 0.0
        over = moving[i - 1, k, j] if i else 0.0
        if not np.isfinite(back):
            constrain({place: 1.0}, 0, 0)
        elif objective == "throughput":
            constrain({place: max(over, back), count - 1: -1.0}, -np.inf, 0)
        else:
            cost[place] = own[i, j] + over + back
    cost[-1] = objective == "throughput"
    matrix = sparse.lil_matrix((len(rows), count))
    for row, terms in enumerate(rows):
        for place, factor in terms.items():
            matrix[row, place] = factor
    upper = np.ones(count)
    upper[-1] = np.inf
    found = milp(
        cost,
        integrality=np.append(np.ones(count - 1), 0),
        bounds=Bounds(np.zeros(count), upper),
        constraints=LinearConstraint(matrix.tocsr(), low, high),
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise NoPlan(why_none(problem))
    placement = [0] * layers
    for (i, _, j), place in flow.items():
        if found.x[place] > 0.5:
            placement[i] = j
    return planned(problem, tuple(placement), objective, "milp")


PLANNERS: dict[str, Callable[[Problem, Objective], Plan]] = {
    "edge_solo": edge_solo,
    "cloud_edge_even": cloud_edge_even,
    "cloud_edge_opt": cloud_edge_opt,
    "edgeshard": edgeshard,
    "exact": exact,
    "greedy": greedy,
    "milp": by_milp,
}


def verdict(problem: Problem, published: Plan, best: Plan) -> str:
    """A published plan against the exact one: equal, worse, better, infeasible, or returning to a device."""
    if not problem.fits(published.placement):
        return "infeasible"
    if returns(published.placement):
        return "returning"
    if published.cost > best.cost * (1 + 1e-9):
        return "worse"
    return "equal" if published.cost >= best.cost * (1 - 1e-9) else "better"


# A plan in words


def explained(problem: Problem, plan: Plan) -> list[str]:
    """A sentence for each stage, one for what was left out, and one on the source alone, where it would do."""
    said = []
    runs = stages(plan.placement)
    moving = problem.handing("latency")
    for place, stage in enumerate(runs):
        spent = problem.seconds[stage.first : stage.last, stage.device].sum()
        held = problem.memory[stage.first : stage.last].sum()
        following = runs[place + 1].device if place + 1 < len(runs) else 0
        over = moving[stage.last - 1, stage.device, following]
        sentence = (
            f"{problem.names[stage.device]} runs layers {stage.first} to {stage.last - 1} in {1e3 * spent:,.1f} ms per "
            f"token and holds {held / 1e6:,.1f} of {problem.room[stage.device] / 1e6:,.1f} MB"
        )
        if stage.device != following:
            sentence += f"; handing on to {problem.names[following]} takes {1e3 * over:,.1f} ms"
        said.append(sentence + ".")
    return said + [
        f"{problem.names[device]} is left out: {reason}" for device, reason in left_out(problem, plan)
    ]


def left_out(problem: Problem, plan: Plan) -> list[tuple[int, str]]:
    """Every device that a plan does not use, and what the best plan that uses it would cost."""
    found = []
    grouped = types(problem)
    for members in grouped:
        if any(device in plan.placement for device in members) or members[0] == 0:
            continue
        forced = Problem(
            **{name: getattr(problem, name) for name in ("seconds", "handed", "memory", "room", "bandwidth",
                                                         "delay", "watts", "allowed", "names")},
            needed=problem.needed | {members[0]},
        )  # fmt: skip
        try:
            other = exact(forced, plan.objective)
        except NoPlan:
            reason = "no plan that uses it keeps the limits."
        else:
            more = other.cost / plan.cost - 1 if plan.cost else np.inf
            reason = (
                f"the best plan with it is {more:.1%} worse." if more > 1e-9 else "it would change nothing."
            )
        found += [(device, reason) for device in members]
    return found
