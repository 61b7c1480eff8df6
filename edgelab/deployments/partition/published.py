"""EdgeShard's table, and what the planners make of its testbed.

Every time comes from bytes and memory bandwidth at one efficiency, fitted on one cell: Llama-2-7B on the source alone.
"""

from __future__ import annotations

import pandas as pd

from edgelab.deployments.partition import planners
from edgelab.deployments.partition.fleet import load
from edgelab.deployments.partition.problem import NoPlan
from edgelab.deployments.partition.profile import from_shape, problem_of
from edgelab.devices.shapes import models

# ms per token, and tokens per second; None where it does not fit. arXiv:2405.14371; the cells in CONFIRMED were read in
# copies of the paper, the others in secondary sources.
TABLE: dict[str, dict[str, tuple[float, float] | None]] = {
    "Llama-2-7B": {
        "edge_solo": (140.3, 24.36),
        "cloud_edge_even": (227.35, 7.56),
        "cloud_edge_opt": (140.34, 24.36),
        "edgeshard": (75.88, 52.45),
    },
    "Llama-2-13B": {
        "edge_solo": None,
        "cloud_edge_even": (319.44, 4.68),
        "cloud_edge_opt": (243.45, 4.74),
        "edgeshard": (173.43, 10.45),
    },
    "Llama-2-70B": {
        "edge_solo": None,
        "cloud_edge_even": None,
        "cloud_edge_opt": None,
        "edgeshard": (3086.0, 1.25),
    },
}
CONFIRMED = {("Llama-2-7B", "edge_solo"), ("Llama-2-7B", "cloud_edge_opt"), ("Llama-2-7B", "edgeshard")} | {
    ("Llama-2-70B", planner) for planner in ("edge_solo", "cloud_edge_even", "cloud_edge_opt", "edgeshard")
}
FITTED = ("Llama-2-7B", "edge_solo")


def fitted_efficiency() -> float:
    """The share of peak memory bandwidth at which the source takes what was published for it alone."""
    fleet = load("edgeshard")
    at_peak = from_shape(models()[FITTED[0]], fleet, 1.0).seconds[:, 0].sum()
    return 1e3 * at_peak / TABLE[FITTED[0]][FITTED[1]][0]


def compared() -> pd.DataFrame:
    """A row for each cell: published_ms, planned_ms, error_percent (signed), confirmed, fitted; NaN: does not fit."""
    fleet, efficiency, rows = load("edgeshard"), fitted_efficiency(), []
    for model, cells in TABLE.items():
        problem = problem_of(from_shape(models()[model], fleet, efficiency), fleet)
        for planner, cell in cells.items():
            try:
                plan = planners.PLANNERS["exact" if planner == "edgeshard" else planner](problem, "latency")
                planned_ms, devices = 1e3 * plan.cost, len(set(plan.placement))
            except NoPlan:
                planned_ms, devices = float("nan"), 0
            published_ms = cell[0] if cell else float("nan")
            rows.append(
                {
                    "model": model,
                    "planner": planner,
                    "published_ms": published_ms,
                    "planned_ms": planned_ms,
                    "error_percent": 100 * (planned_ms / published_ms - 1),
                    "devices": devices,
                    "confirmed": (model, planner) in CONFIRMED,
                    "fitted": (model, planner) == FITTED,
                }
            )
    return pd.DataFrame(rows)
