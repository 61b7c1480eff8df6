"""EdgeShard's table, and what the planners make of its testbed.

Every time comes from bytes and memory bandwidth at one efficiency, fitted on one cell: Llama-2-7B on the source alone.

Throughput has one number more, fitted on the same line: 24.36 tokens/s at 140.3 ms for each are 3.4 requests that share
every reading of the weights. So many hidden states travel together, and the tokens of a batch come when all stages are
through, one after the other. A pipeline that is always full would give several times what was published.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from edgelab.deployments.partition import planners
from edgelab.deployments.partition.fleet import load
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


def fitted_batch() -> float:
    """The requests that share a reading of the weights, from both figures that were published for the source alone."""
    ms, tok_s = TABLE[FITTED[0]][FITTED[1]]
    return tok_s * ms / 1e3


def compared() -> pd.DataFrame:
    """A row for each cell of the published table: NaN where it does not fit.

    Columns model, planner, published_ms, planned_ms, error_percent (signed), published_tok_s, planned_tok_s,
    tok_s_error_percent, full_pipeline_tok_s (of the best plan for throughput, in every stage of which a batch is always
    at work), devices, confirmed, fitted.
    """
    fleet, efficiency, batch, rows = load("edgeshard"), fitted_efficiency(), fitted_batch(), []
    for model, cells in TABLE.items():
        problem = problem_of(from_shape(models()[model], fleet, efficiency), fleet)
        together = replace(problem, handed=batch * problem.handed)
        for planner, cell in cells.items():
            published_ms, published_tok_s = cell or (np.nan, np.nan)
            own = "exact" if planner == "edgeshard" else planner
            plan = planners.plan_or_none(own, problem, "latency")
            planned_ms = 1e3 * plan.cost if plan else np.nan
            tok_s, full = (
                batch / found.cost if (found := planners.plan_or_none(own, together, objective)) else np.nan
                for objective in ("latency", "throughput")
            )
            rows.append(
                {
                    "model": model,
                    "planner": planner,
                    "published_ms": published_ms,
                    "planned_ms": planned_ms,
                    "error_percent": 100 * (planned_ms / published_ms - 1),
                    "published_tok_s": published_tok_s,
                    "planned_tok_s": tok_s,
                    "tok_s_error_percent": 100 * (tok_s / published_tok_s - 1),
                    "full_pipeline_tok_s": full,
                    "devices": len(set(plan.placement)) if plan else 0,
                    "confirmed": (model, planner) in CONFIRMED,
                    "fitted": (model, planner) == FITTED,
                }
            )
    return pd.DataFrame(rows)
