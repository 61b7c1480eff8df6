"""What the exact planner is compared with: EdgeShard's two recurrences as published, and EdgeShard's own baselines.

Zhang et al. 2024, arXiv:2405.14371.
"""

from __future__ import annotations

import itertools

import numpy as np

from edgelab.deployments.partition.problem import (
    ROUNDING,
    NoPlan,
    Objective,
    Placement,
    Plan,
    Problem,
    planned,
)

SUBSETS = 14  # devices of the published throughput recurrence, whose work doubles with each

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
        if problem.allowed[0, j] and problem.memory[0] <= problem.room[j] * (1 + ROUNDING):
            ways[j] = problem.seconds[0, j], (j,)
    for layer in range(1, problem.layers):
        longer: dict[int, tuple[float, Placement]] = {}
        for j in range(problem.devices):
            if not problem.allowed[layer, j]:
                continue
            for k, (so_far, placement) in ways.items():
                used = problem.memory[:layer][np.asarray(placement) == j].sum()
                if used + problem.memory[layer] > problem.room[j] * (1 + ROUNDING):
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
    run = [problem.run_costs(device, "throughput") for device in range(problem.devices)]
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
    there = np.where(problem.allowed[1:, 1:].any(0), problem.seconds[:, 1:].sum(0), np.inf)
    return 1 + int(there.argmin())


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
