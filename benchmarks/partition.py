"""Planning: seconds for fleets of dozens, how EdgeShard's recurrence fares under memory limits, and its table."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from edgelab.deployments.partition import planners, published
from edgelab.deployments.partition.problem import NoPlan, Plan, Problem

FLEETS = {
    "15 devices, a source and 3 types": (1, 11, 2, 1),
    "32 devices, a source and 4 types": (1, 8, 8, 8, 7),
}
BOUNDS = dict(zip(FLEETS, ("below 2 s", "below 20 s"), strict=True))
INSTANCES, LAYERS = 300, 80


def fleet_of(counts: tuple[int, ...], layers: int) -> Problem:
    """Devices of some types, the first of which is the source; no type holds the model alone."""
    kinds = np.repeat(np.arange(len(counts)), counts)
    bandwidth = np.full((len(kinds), len(kinds)), 50.0)
    bandwidth[0, kinds == 2] = bandwidth[kinds == 2, 0] = 1.0
    return Problem(
        seconds=np.tile(np.array([10.0, 4.0, 1.0, 6.0, 2.0])[kinds], (layers, 1)),
        handed=np.full(layers, 8.0),
        memory=np.ones(layers),
        room=np.array([0.3, 0.4, 0.35, 0.2, 0.25])[kinds] * layers,
        bandwidth=bandwidth,
    )


def drawn(seed: int, layers: int = 7, devices: int = 4) -> Problem:
    """Random times and links, and memory that binds: all devices hold between once and twice the model."""
    random = np.random.default_rng(seed)
    memory = random.integers(1, 6, layers).astype(float)
    room = (random.dirichlet(np.ones(devices)) * memory.sum() * random.uniform(1, 2)).round()
    room[0] = max(room[0], memory[0])
    return Problem(
        seconds=random.uniform(0.5, 10, (layers, devices)),
        handed=random.uniform(1, 10, layers),
        memory=memory,
        room=room,
        bandwidth=random.uniform(0.2, 5, (devices, devices)),
        delay=random.uniform(0, 1, (devices, devices)),
    )


def _plan(planner: str, problem: Problem) -> Plan | None:
    try:
        return planners.PLANNERS[planner](problem, "latency")
    except NoPlan:
        return None


def rows() -> Iterator[tuple[str, str, str]]:
    for name, counts in FLEETS.items():
        for objective in ("latency", "throughput"):
            started = time.perf_counter()
            planners.exact(fleet_of(counts, LAYERS), objective)
            yield (
                f"{name}, {LAYERS} layers, {objective}, s",
                f"{time.perf_counter() - started:.2f}",
                BOUNDS[name],
            )
    kinds, more = Counter(), {"worse": [], "returning": []}
    for seed in range(INSTANCES):
        problem = drawn(seed)
        best, theirs = _plan("exact", problem), _plan("edgeshard", problem)
        if best is None or theirs is None:
            kinds["no plan of one run fits" if best is None else "the recurrence finds none"] += 1
            continue
        kind = planners.verdict(problem, theirs, best)
        kinds[kind] += 1
        if kind in more:
            more[kind].append(100 * (theirs.cost / best.cost - 1))
    for kind, count in kinds.most_common():
        amount = f", median {statistics.median(more[kind]):+.1f} %" if more.get(kind) else ""
        yield f"EdgeShard's latency plan, {INSTANCES} instances: {kind}", f"{count}{amount}", ""
    for cell in published.compared().itertuples():
        bound = "within 35 %" if cell.confirmed and cell.model == "Llama-2-7B" and not cell.fitted else ""
        said = (
            f"{cell.planned_ms:.1f} ({cell.error_percent:+.0f} %)" if cell.planned_ms > 0 else "does not fit"
        )
        yield f"{cell.model}, {cell.planner}: ms per token, published {cell.published_ms:.1f}", said, bound


if __name__ == "__main__":
    for what, value, bound in rows():
        print(what, "|", value, "|", bound)
