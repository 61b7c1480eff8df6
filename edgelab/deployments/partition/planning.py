"""From a deployment to its plan: what the planner gets, the plan, what it should do, and a file that holds it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgelab.deployments.partition import Partition
from edgelab.deployments.partition.fleet import Fleet, FleetError, load
from edgelab.deployments.partition.formats import FORMATS, WireError
from edgelab.deployments.partition.planners import PLANNERS, explained
from edgelab.deployments.partition.problem import NoPlan, Plan, Problem, described, planned, stages
from edgelab.deployments.partition.profile import Profile, Timings, problem_of, spread
from edgelab.deployments.partition.simulator import Predicted, chain, pipeline_tok_s, predict

PROMPT = 128  # tokens that a measurement reads
CONTEXT = 160  # tokens behind which it decodes, in the middle
FORMAT = "edgelab plan 1"
SHOWN = ("edge_solo", "cloud_edge_even", "cloud_edge_opt", "edgeshard", "exact")


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan with what it was made from. prefill_s: (parts, devices), seconds of the prompt."""

    settings: Partition
    fleet: Fleet
    profile: Profile
    problem: Problem
    plan: Plan

    @property
    def predicted(self) -> Predicted:
        """From the times of the parts and the links."""
        prefill = self.profile.seconds * PROMPT if self.profile.prefill is None else self.profile.prefill
        return predict(self.problem, self.plan.placement, prefill, PROMPT, self.settings.requests)

    def stages(self) -> list[dict[str, Any]]:
        """A row for each stage: device, its first and last part, milliseconds of a token, MB of weights and cache."""
        names, parts = self.problem.names, self.profile.names
        return [
            {
                "device": names[run.device],
                "first": parts[run.first],
                "last": parts[run.last - 1],
                "ms": 1e3 * float(self.problem.seconds[run.first : run.last, run.device].sum()),
                "mb": float(self.problem.memory[run.first : run.last].sum()) / 1e6,
            }
            for run in stages(self.plan.placement)
        ]

    def save(self, path: Path, recipe: str, formats: list[dict[str, Any]] | None = None) -> None:
        """Write it as JSON: for `partition:plan=FILE`, and to be read by people.

        formats: what is known of every format of the wire, as `over_formats` gives it.
        """
        predicted = self.predicted
        about = {
            "format": FORMAT,
            "recipe": recipe,
            "model": self.profile.model,
            "fleet": self.fleet.name,
            "objective": self.plan.objective,
            "planner": self.plan.planner,
            "cost": self.plan.cost,
            "placement": [self.problem.names[device] for device in self.plan.placement],
            "predicted": {
                name: getattr(predicted, name) for name in ("ttft_ms", "tpot_ms", "tok_s", "requests")
            },
            "stages": self.stages(),
            "formats": over_formats(self) if formats is None else formats,
            "explained": explained(self.problem, self.plan, self.profile.names),
        }
        path.write_text(json.dumps(about, indent=1) + "\n")


def against(found: Planned) -> list[dict[str, Any]]:
    """A row for every planner on the same problem: planner, devices, ms per token, tok/s of all requests, placement.

    NaN where a planner finds none that fits.
    """
    rows = []
    for name in SHOWN:
        try:
            plan = PLANNERS[name](found.problem, found.settings.objective)
        except NoPlan as error:
            rows.append({"planner": name, "devices": 0, "ms": np.nan, "tok_s": np.nan, "said": str(error)})
            continue
        line = chain(found.problem, plan.placement)
        rows.append(
            {
                "planner": name,
                "devices": len(set(plan.placement)),
                "ms": 1e3 * line.latency_s,
                "tok_s": pipeline_tok_s(line.busy_s, found.settings.requests, delay_s=line.delay.sum()),
                "said": described(found.problem, plan),
            }
        )
    return rows


def over_formats(found: Planned) -> list[dict[str, Any]]:
    """A row for every format of the wire: its own best plan, bytes over links and milliseconds of a token.

    NaN where none fits, and where the format cannot hold the states.
    """
    rows = []
    for wire in FORMATS:
        settings = replace(found.settings, wire=wire)
        try:
            own = plan_of(settings, found.profile.in_format(wire), found.fleet)
        except (NoPlan, WireError) as error:
            rows.append({"wire": wire, "bytes": np.nan, "ms": np.nan, "said": str(error)})
            continue
        predicted = own.predicted
        rows.append(
            {
                "wire": wire,
                "bytes": round(sum(predicted.token_bytes.values())),
                "ms": predicted.tpot_ms,
                "said": described(own.problem, own.plan),
            }
        )
    return rows


def read_plan(path: Path) -> dict[str, Any]:
    """What a file holds that `Planned.save` wrote. Raises NoPlan for any other."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise NoPlan(
            f"{path} cannot be read ({error.strerror}); `edgelab plan --save` writes a plan."
        ) from None
    except json.JSONDecodeError as error:
        raise NoPlan(f"{path.name}, line {error.lineno}, column {error.colno}: {error.msg}.") from None
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not isinstance(found.get("placement"), list)
    ):
        raise NoPlan(f"{path.name} is no plan that `edgelab plan --save` wrote.")
    return found


def plan_of(settings: Partition, profile: Profile, fleet: Fleet | None = None) -> Planned:
    """The plan that a deployment asks for: that of a planner, of a cut, or of a file.

    Raises NoPlan where none fits, and FleetError for what the fleet has not.
    """
    fleet = load(settings.fleet) if fleet is None else fleet
    problem = problem_of(
        profile, fleet, first=settings.first, last=settings.last, use=settings.use, avoid=settings.avoid
    )
    if settings.objective == "energy":
        _check_power(problem, fleet)
    if settings.plan:
        plan = planned(problem, _read(settings, problem, fleet), settings.objective, settings.planner)
    elif settings.cut:
        plan = planned(problem, _cut(settings, problem), settings.objective, settings.planner)
    else:
        plan = PLANNERS[settings.planner](problem, settings.objective)
    runs = [run.device for run in stages(plan.placement)]
    again = len(runs) - len(set(runs)) - (runs[-1] == 0 and 0 in runs[:-1])
    if again:
        raise NoPlan(
            f"{settings.planner} returns to a device that it has left, which a chain of stages cannot do; the planner "
            "'exact' gives each device one run."
        )
    if not problem.fits(plan.placement) or not np.isfinite(plan.cost):
        raise NoPlan(
            "This placement keeps not every limit: a device has too little memory, a part is not allowed there, or a "
            "link is missing; leave out cut and plan, and a planner finds one that does."
        )
    return Planned(settings, fleet, profile, problem, plan)


def _check_power(problem: Problem, fleet: Fleet) -> None:
    for place, member in enumerate(fleet.members):
        if member.device.power_w is None and problem.allowed[:, place].any():
            raise FleetError(
                f"{member.name} has no power in the catalogue, from which energy is counted; avoid it, or choose "
                "another objective."
            )


def profile_for(settings: Partition, timings: Timings, fleet: Fleet) -> Profile:
    """Times measured here, on the devices of a fleet, as a measurement reads and decodes."""
    return spread(
        timings, fleet, context=CONTEXT, prompt=PROMPT, requests=settings.requests, wire=settings.wire
    )


def _read(settings: Partition, problem: Problem, fleet: Fleet) -> tuple[int, ...]:
    names = read_plan(Path(settings.plan).expanduser())["placement"]
    if len(names) != problem.layers:
        raise NoPlan(
            f"{settings.plan} is a plan for {len(names)} parts, and this model has {problem.layers}; plan anew."
        )
    return tuple(fleet.index(name) for name in names)


def _cut(settings: Partition, problem: Problem) -> tuple[int, ...]:
    ends = [0, *map(int, settings.cut.split("/")), problem.layers]
    if ends != sorted(set(ends)) or len(ends) - 1 > problem.devices:
        raise FleetError(
            f"cut={settings.cut} should be growing parts from 1 to {problem.layers - 1}, at most "
            f"{problem.devices - 1} of them, as the fleet has {problem.devices} devices."
        )
    return tuple(device for device, (first, last) in enumerate(pairwise(ends)) for _ in range(first, last))
