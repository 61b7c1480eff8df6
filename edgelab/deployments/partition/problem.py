"""Which layer runs where: what each would cost, what handing on costs, and what fits.

A placement names a device for every layer. A plan gives each device at most one run of consecutive layers: what a real
chain of stages can do. Device 0 is the source, which has the prompt and wants the token; where the problem says so, the
last layers, such as the head, may come back to it.

    latency     sum of the layers' seconds, of handing on between runs, and of the way back       seconds per token
    throughput  the slowest of stages and links, which no pipeline can beat                       seconds per token
    energy      joules of the layers, and of the devices that send                                joules per token
    slow_bytes  bytes over links below SLOW_MBPS                                                  bytes per token

Zhang et al. 2024 (EdgeShard), arXiv:2405.14371.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import numpy as np

from edgelab.errors import EdgeLabError

Objective = Literal["latency", "throughput", "energy", "slow_bytes"]
OBJECTIVES = get_args(Objective)
SLOW_MBPS = 10.0
ROUNDING = 1e-9  # of a memory: sums of floats that fill it exactly fit


class NoPlan(EdgeLabError):
    """No placement keeps the limits."""


class TooManyTypes(NoPlan):
    """A fleet of more kinds of devices than the exact planner looks at."""


Placement = tuple[int, ...]  # the device of each layer


class Stage(NamedTuple):
    """Layers first to last - 1 of a model, on one device."""

    device: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Problem:
    """What every layer costs on every device, and what lies between devices.

    seconds: (layers, devices), of a token. handed: (layers,), bytes that a layer gives to the next one, the last one's
    those that go back to the source. memory: (layers,), bytes of each with its share of the cache. room: (devices,),
    bytes. bandwidth: (devices, devices), bytes per second from row to column; 0 where no link is. delay: one way, in
    seconds. watts: (devices,), while a device computes or sends. allowed: (layers, devices), what may run where; the
    first layer is on the source unless it says otherwise. needed: devices that have to take part. returning: layers at
    the end that may run on the source although others before them do not. hand_over_s: what every hand-over between
    devices takes beside its link.
    """

    seconds: np.ndarray
    handed: np.ndarray
    memory: np.ndarray
    room: np.ndarray
    bandwidth: np.ndarray
    delay: np.ndarray | None = None
    watts: np.ndarray | None = None
    allowed: np.ndarray | None = None
    needed: frozenset[int] = frozenset()
    returning: int = 0
    hand_over_s: float = 0.0
    names: tuple[str, ...] = ()
    _kept: dict[str, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        layers, devices = np.shape(self.seconds)
        if not layers or not devices:
            raise NoPlan("A plan needs at least one layer and one device.")
        free = np.ones((layers, devices), dtype=bool)
        free[0, 1:] = False
        given = {
            "delay": np.zeros((devices, devices)) if self.delay is None else self.delay,
            "watts": np.zeros(devices) if self.watts is None else self.watts,
            "allowed": free if self.allowed is None else self.allowed,
            "names": self.names or tuple(f"device {place}" for place in range(devices)),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        for name, shape in {"handed": (layers,), "memory": (layers,), "room": (devices,), "watts": (devices,),
                            "bandwidth": (devices, devices), "delay": (devices, devices),
                            "allowed": (layers, devices)}.items():  # fmt: skip
            if np.shape(getattr(self, name)) != shape:
                raise NoPlan(f"{name} has the shape {np.shape(getattr(self, name))} and should have {shape}.")
        for name in ("seconds", "handed", "memory", "room", "bandwidth", "delay", "watts"):
            if not (np.asarray(getattr(self, name)) >= 0).all():
                raise NoPlan(f"{name} should hold numbers from 0 on; it has one below, or one that is none.")

    @property
    def layers(self) -> int:
        return len(self.seconds)

    @property
    def devices(self) -> int:
        return len(self.room)

    def with_bandwidth(self, source: int, target: int, bytes_per_s: float) -> Problem:
        """The same with one link changed, both ways."""
        bandwidth = self.bandwidth.copy()
        bandwidth[source, target] = bandwidth[target, source] = bytes_per_s
        return replace(self, bandwidth=bandwidth)

    def without(self, device: int) -> Problem:
        """The same, and a device that may not be used."""
        allowed = self.allowed.copy()
        allowed[:, device] = False
        return replace(self, allowed=allowed, needed=self.needed - {device})

    def head_home(self) -> Problem:
        """The same without the returning layers, which the source runs beside the first one: their time and memory
        count there, and what the layer before them hands on is what comes back.
        """
        stay = self.layers - self.returning
        seconds, memory = self.seconds[:stay].copy(), self.memory[:stay].copy()
        seconds[0, 0] += self.seconds[stay:, 0].sum()
        memory[0] += self.memory[stay:].sum()
        allowed = self.allowed[:stay].copy()
        allowed[0, 1:] = False
        allowed[0, 0] &= self.allowed[stay:, 0].all()
        return replace(
            self, seconds=seconds, memory=memory, handed=self.handed[:stay], allowed=allowed, returning=0
        )

    def handing(self, objective: Objective) -> np.ndarray:
        """What it costs to hand on after each layer, (layers, devices, devices) from one device to another.

        Nothing within a device; infinite where no link is. After the last layer: the way back to the source.
        """
        if objective not in self._kept:
            self._kept[objective] = self._handing(objective)
        return self._kept[objective]

    def _handing(self, objective: Objective) -> np.ndarray:
        there = self.bandwidth > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            sending = np.where(there, self.handed[:, None, None] / self.bandwidth, np.inf)
        if objective == "latency":
            cost = sending + self.delay + self.hand_over_s
        elif objective == "energy":
            cost = np.where(there, sending, 0) * self.watts[:, None]
        elif objective == "slow_bytes":
            cost = self.handed[:, None, None] * (self.bandwidth < SLOW_MBPS * 1e6 / 8)
        else:
            cost = sending
        cost = np.where(there, cost, np.inf)
        cost[:, range(self.devices), range(self.devices)] = 0
        cost[-1, self.handed[-1] == 0] = 0  # nothing goes back
        return cost

    def own(self, objective: Objective) -> np.ndarray:
        """What every layer costs by itself on every device, (layers, devices)."""
        if objective == "energy":
            return self.seconds * self.watts
        return np.zeros_like(self.seconds) if objective == "slow_bytes" else self.seconds

    def runs(self, device: int) -> np.ndarray:
        """Whether layers first to last - 1 fit on a device and are allowed there, (layers, layers + 1)."""
        total = np.concatenate([[0], np.cumsum(self.memory)])
        refused = np.concatenate([[0], np.cumsum(~self.allowed[:, device])])
        first, last = np.ogrid[: self.layers, : self.layers + 1]
        fits = total[last] - total[first] <= self.room[device] * (1 + ROUNDING)
        return fits & (refused[last] == refused[first]) & (last > first)

    def run_costs(self, device: int, objective: Objective) -> np.ndarray:
        """Of layers first to last - 1 on a device, (layers, layers + 1), infinite where they do not fit."""
        total = np.concatenate([[0], np.cumsum(self.own(objective)[:, device])])
        return np.where(self.runs(device), total[None] - total[:-1, None], np.inf)

    def cost(self, placement: Placement, objective: Objective) -> float:
        """Of any placement, also of one that returns to a device. Raises NoPlan for a wrong number of layers."""
        if len(placement) != self.layers:
            raise NoPlan(f"A placement of {len(placement)} layers is not one of {self.layers}.")
        places = np.asarray(placement)
        own = self.own(objective)[np.arange(self.layers), places]
        after = np.append(places[1:], 0)
        moves = self.handing(objective)[np.arange(self.layers), places, after]
        if objective != "throughput":
            return float(own.sum() + moves.sum())
        per_device = np.bincount(places, weights=own)
        return float(max(per_device.max(), moves.max()))

    def fits(self, placement: Placement) -> bool:
        """Whether memory, permission and the devices that have to take part are all kept."""
        places = np.asarray(placement)
        used = np.bincount(places, weights=self.memory, minlength=self.devices)
        inside = (used <= self.room * (1 + ROUNDING)).all()
        return bool(
            inside and self.allowed[np.arange(self.layers), places].all() and self.needed <= set(placement)
        )


def stages(placement: Placement) -> list[Stage]:
    """The runs of a placement, in order."""
    found: list[Stage] = []
    for layer, device in enumerate(placement):
        if found and found[-1].device == device:
            found[-1] = found[-1]._replace(last=layer + 1)
        else:
            found.append(Stage(device, layer, layer + 1))
    return found


def returns(placement: Placement) -> bool:
    """Whether some device has two runs."""
    devices = [stage.device for stage in stages(placement)]
    return len(devices) != len(set(devices))


def every_plan(problem: Problem) -> Iterator[Placement]:
    """All placements that fit and give each device one run: a thousand times more with every device."""

    def go_on(placement: Placement) -> Iterator[Placement]:
        if len(placement) == problem.layers:
            if problem.fits(placement):
                yield placement
            return
        for device in range(problem.devices):
            if (device not in placement or placement[-1] == device) and problem.allowed[
                len(placement), device
            ]:
                yield from go_on((*placement, device))

    return go_on(())


@dataclass(frozen=True)
class Plan:
    """A placement and what it costs. bound: what no plan can be below; equal to the cost where the plan is exact."""

    placement: Placement
    objective: Objective
    cost: float
    planner: str
    bound: float | None = None


def described(problem: Problem, plan: Plan) -> str:
    """The stages in one line."""
    return " > ".join(
        f"{problem.names[run.device]} {run.first}-{run.last - 1}" for run in stages(plan.placement)
    )


def planned(problem: Problem, placement: Placement, objective: Objective, planner: str) -> Plan:
    return Plan(placement, objective, problem.cost(placement, objective), planner)


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
