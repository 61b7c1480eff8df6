"""Pictures: functions to a matplotlib `Figure`, without pyplot state; from rows, from weights, from devices."""

from edgelab.plot_style import (
    BADGE_MARKERS,
    FAMILY_COLOURS,
    METRICS,
    NothingToDraw,
    UnknownMetric,
    label,
)
from edgelab.plots.memory import NEED_PARTS, gigabytes, memory_bars
from edgelab.plots.rows import latency, pareto_front, protocols, size_bars, tradeoff, window_delta
from edgelab.plots.weights import weight_grid

__all__ = [
    "BADGE_MARKERS",
    "FAMILY_COLOURS",
    "METRICS",
    "NEED_PARTS",
    "NothingToDraw",
    "UnknownMetric",
    "gigabytes",
    "label",
    "latency",
    "memory_bars",
    "pareto_front",
    "protocols",
    "size_bars",
    "tradeoff",
    "weight_grid",
    "window_delta",
]
