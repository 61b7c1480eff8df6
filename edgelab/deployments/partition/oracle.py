"""The exact plan by mixed-integer programming: slow, and independent of the planner that it checks."""

from __future__ import annotations

import itertools

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from edgelab.deployments.partition.problem import (
    ROUNDING,
    NoPlan,
    Objective,
    Plan,
    Problem,
    planned,
    why_none,
)


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
        constrain(held, 0, problem.room[j] * (1 + ROUNDING))
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
