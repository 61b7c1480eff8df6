"""Pictures: functions to a matplotlib `Figure`, without pyplot state; from rows, from weights, from devices."""

from edgelab.plots.activations import activation_outliers, channel_magnitudes
from edgelab.plots.adapters import held_by_rank, rank_lines, rank_sweep, rate_lines
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
from edgelab.plots.devices import (
    bench_roofline,
    device_rates,
    published_rates,
    rates_that_fit,
    step_operations,
)
from edgelab.plots.distilling import covering_and_seeking, even_students, learned_over_seconds
from edgelab.plots.engines import engines
from edgelab.plots.hybrid import (
    deferral,
    draft_break_even,
    exposed,
    outage,
    reliability,
    time_line,
)
from edgelab.plots.memory import NEED_PARTS, gigabytes, memory_bars, training_bars
from edgelab.plots.methods import method_lines
from edgelab.plots.partition import (
    every_cut,
    gantt,
    over_bandwidth,
    part_times,
    predicted_executed,
    published_cells,
)
from edgelab.plots.pruning import break_even, kept_weights, sparsity_lines, what_zeros_buy
from edgelab.plots.removing import chosen_and_random, influence_and_loss, truth_table, width_times
from edgelab.plots.roofline import decode_limit, limit_tok_s, roofline
from edgelab.plots.rows import latency, protocols, size_bars, tradeoff, window_delta
from edgelab.plots.style import BADGE_MARKERS, FAMILY_COLOURS, NothingToDraw, label
from edgelab.plots.training import training_curve
from edgelab.plots.ways import policies, ways
from edgelab.plots.weights import weight_grid

__all__ = [
    "BADGE_MARKERS",
    "FAMILY_COLOURS",
    "NEED_PARTS",
    "NothingToDraw",
    "activation_outliers",
    "bench_roofline",
    "bit_allocation",
    "break_even",
    "channel_magnitudes",
    "chosen_and_random",
    "context_reach",
    "covering_and_seeking",
    "decode_limit",
    "deferral",
    "device_rates",
    "draft_break_even",
    "engines",
    "even_students",
    "every_cut",
    "exposed",
    "gantt",
    "gigabytes",
    "held_by_rank",
    "influence_and_loss",
    "kept_weights",
    "label",
    "largest_factor",
    "latency",
    "learned_over_seconds",
    "limit_tok_s",
    "memory_bars",
    "method_lines",
    "outage",
    "over_bandwidth",
    "part_times",
    "policies",
    "predicted_executed",
    "predicted_measured",
    "predictions",
    "predictors_measured",
    "protocols",
    "published_cells",
    "published_rates",
    "rank_correlations",
    "rank_lines",
    "rank_sweep",
    "rate_lines",
    "rates_that_fit",
    "reliability",
    "roofline",
    "size_bars",
    "sparsity_allocation",
    "sparsity_lines",
    "step_operations",
    "time_line",
    "tradeoff",
    "training_bars",
    "training_curve",
    "truth_table",
    "ways",
    "weight_grid",
    "what_zeros_buy",
    "width_times",
    "window_delta",
]
