"""Plans for a fleet, from a profile that is measured here, read from a file, or counted from a published shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgelab import ledger, recipes
from edgelab.deployments.partition import planning
from edgelab.deployments.partition.fleet import load
from edgelab.deployments.partition.planning import Planned
from edgelab.deployments.partition.profile import from_shape, read
from edgelab.devices.shapes import ShapeError, models
from edgelab.lab.road import profile
from edgelab.reference import EMBEDDED, resolve


def plan(recipe: str = "none @ partition", *, model: str = EMBEDDED, timings: Path | None = None) -> Planned:
    """The plan that a recipe asks for, with times of its own variant.

    timings: a profile; read if the file is there, else measured here and written. Raises an EdgeLabError where nothing
    fits, or the profile is of another model.
    """
    asked = _partition(recipe)
    fleet = load(asked.deployment.fleet)
    if timings is not None and timings.is_file():
        found = read(timings, resolve(model).name, asked.weights)
    else:
        found = profile(asked.weights, model=model)
        if timings is not None:
            found.save(timings)
    return planning.plan_of(asked.deployment, planning.profile_for(asked.deployment, found, fleet), fleet)


def plan_from_shape(recipe: str, shape: str, *, bits: float = 32, efficiency: float = 0.6) -> Planned:
    """*Analytic*: the plan for a model of `devices.models()`, from its bytes and the memory bandwidth of devices.

    bits: of a stored weight. efficiency: share of that bandwidth which decoding reaches.
    """
    asked = _partition(recipe).deployment
    if shape not in models():
        raise ShapeError(f"No model is called {shape!r}; there are {', '.join(models())}.")
    fleet = load(asked.fleet)
    counted = from_shape(
        models()[shape], fleet, efficiency, bits=bits, requests=asked.requests, wire=asked.wire
    )
    return planning.plan_of(asked, counted, fleet)


def formats(found: Planned, recipe: str, model: str = EMBEDDED) -> list[dict[str, Any]]:
    """What every format of the wire costs: bytes and milliseconds of its best plan, and ΔNLL where it was measured.

    delta_nll is that of the newest row, of the project or your own, of the same weights cut in two in this format, with
    its 95 % interval; float32 changes nothing. NaN where there is none: measure it with `--only quality`.
    """
    weights, sha = recipes.parse(recipe).weights, resolve(model).sha
    known = {"float32": (0.0, 0.0, 0.0)}
    for row in (*ledger.reference(), *ledger.own()):
        is_same = row.model_sha == sha and row.runtime == "partition" and row.delta_nll is not None
        if is_same and (asked := recipes.parse(row.recipe)).weights == weights:
            known[asked.deployment.wire] = row.delta_nll, row.delta_nll_low, row.delta_nll_high
    names = ("delta_nll", "delta_nll_low", "delta_nll_high")
    nothing = (math.nan,) * 3
    return [
        one | dict(zip(names, known.get(one["wire"], nothing), strict=True))
        for one in planning.over_formats(found)
    ]


def _partition(recipe: str) -> recipes.Recipe:
    found = recipes.parse(recipe)
    if found.runtime != "partition":
        raise recipes.RecipeError(
            f"{recipe} is no partition; write it as '{found.weights} @ partition:fleet=NAME'."
        )
    return found
