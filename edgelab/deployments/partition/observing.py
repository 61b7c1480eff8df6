"""Links of a running partition: what they take, which of them have slowed down, and what a new plan would gain."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgelab.deployments.partition import wire
from edgelab.deployments.partition.problem import Plan

if TYPE_CHECKING:
    from edgelab.deployments.partition.cluster import Cluster

SLOWER = 1.5  # times the predicted time of a link from which it is said to have slowed down
SLOWER_S = 0.002  # and at least so much longer
STEPS = 8  # whose median counts


@dataclass(frozen=True)
class Slowed:
    """A link that takes longer than it should, and what a new plan would gain there. gain: share of the latency."""

    source: str
    target: str
    predicted_mbps: float
    measured_mbps: float
    plan: Plan
    gain: float


def hops(cluster: Cluster) -> dict[tuple[str, str], list[float]]:
    """Of every hand-over between stages, seconds from the end of each decoding step to its arrival."""
    found = {}
    for (name, steps), (following, theirs) in itertools.pairwise(cluster.spent().items()):
        done = {(one.request, one.step): one.done for one in steps}
        found[name, following] = [
            one.arrived - done[one.request, one.step]
            for one in theirs
            if one.tokens == 1 and (one.request, one.step) in done
        ]
    return found


def slowed(cluster: Cluster) -> list[Slowed]:
    """Links whose last steps took clearly longer than planned, with the plan that would be best now."""
    found, planned = [], cluster.problem
    for (name, following), seconds in hops(cluster).items():
        if len(seconds) < STEPS:
            continue
        i, j = cluster.device(name), cluster.device(following)
        size = planned.handed[cluster.runs()[name].last - 1]
        delay = cluster.pace * (planned.delay[i, j] + planned.hand_over_s)
        predicted = cluster.pace * size / planned.bandwidth[i, j] + delay
        measured = float(np.median(seconds[-STEPS:]))
        if measured < max(SLOWER * predicted, predicted + SLOWER_S):
            continue
        rate = cluster.pace * (size + wire.FRAME_BYTES) / max(measured - delay, 1e-6)
        slower = cluster.problem_now().with_bandwidth(i, j, rate)
        plan = cluster.planned(slower)
        gain = 1 - plan.cost / slower.cost(cluster.plan.placement, plan.objective)
        mbps = 8 / 1e6
        found.append(Slowed(name, following, planned.bandwidth[i, j] * mbps, rate * mbps, plan, gain))
    return found
