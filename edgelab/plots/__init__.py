"""Pictures: functions to a matplotlib `Figure`, without pyplot state; from rows, from weights, from devices."""

from edgelab.plots.activations import activation_outliers, channel_magnitudes
from edgelab.plots.allocation import (
    bit_allocation,
    largest_factor,
    predicted_measured,
    predictions,
    predictors_measured,
    rank_correlations,
    sparsity_allocation,
)
from edgelab.plots.cache import context_reach
from edgelab.plots.devices import device_rates, published_rates, step_operations
from edgelab.plots.engines import engines
from edgelab.plots.memory import NEED_PARTS, gigabytes, memory_bars
from edgelab.plots.methods import method_lines
from edgelab.plots.roofline import decode_limit, limit_tok_s, roofline
from edgelab.plots.rows import latency, protocols, size_bars, tradeoff, window_delta
from edgelab.plots.style import BADGE_MARKERS, FAMILY_COLOURS, NothingToDraw, label
from edgelab.plots.training import training_curve
from edgelab.plots.weights import weight_grid

__all__ = [
    "BADGE_MARKERS",
    "FAMILY_COLOURS",
    "NEED_PARTS",
    "NothingToDraw",
    "activation_outliers",
    "bit_allocation",
    "channel_magnitudes",
    "context_reach",
    "decode_limit",
    "device_rates",
    "engines",
    "gigabytes",
    "label",
    "largest_factor",
    "latency",
    "limit_tok_s",
    "memory_bars",
    "method_lines",
    "predicted_measured",
    "predictions",
    "predictors_measured",
    "protocols",
    "published_rates",
    "rank_correlations",
    "roofline",
    "size_bars",
    "sparsity_allocation",
    "step_operations",
    "tradeoff",
    "training_curve",
    "weight_grid",
    "window_delta",
]
