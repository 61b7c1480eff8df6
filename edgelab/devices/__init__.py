"""What a model needs, what a device has, and how fast the one runs on the other: *analytic*, none measured.

`data/models.csv` and `data/devices.csv` hold the figures and where they come from.
"""

from edgelab.devices.catalogue import Device, catalogue, this_machine, with_room
from edgelab.devices.fitting import STORED_AS, Fit, fit_engines
from edgelab.devices.memory import (
    OPTIMIZER_MOMENTS,
    SCALE_BITS,
    MemoryNeed,
    context_table,
    head_cache_bytes,
    inference_memory,
    kv_cache_bytes,
    kv_cache_mb_per_1k,
    longest_context,
    stored_bits,
    training_memory,
)
from edgelab.devices.power import PowerError, battery_percent, estimated_j, tokens_per_charge
from edgelab.devices.published import Published, class_engine, published, published_check
from edgelab.devices.roofline import (
    PRECISIONS,
    Engine,
    Operation,
    Precision,
    calibrate,
    choose_split,
    decode_tok_s,
    operations,
    step,
    time_to_first_token_ms,
    token_bytes,
)
from edgelab.devices.shapes import ModelShape, ShapeError, models
from edgelab.devices.speed import estimate, fits_and_speed

__all__ = [
    "OPTIMIZER_MOMENTS",
    "PRECISIONS",
    "SCALE_BITS",
    "STORED_AS",
    "Device",
    "Engine",
    "Fit",
    "MemoryNeed",
    "ModelShape",
    "Operation",
    "PowerError",
    "Precision",
    "Published",
    "ShapeError",
    "battery_percent",
    "calibrate",
    "catalogue",
    "choose_split",
    "class_engine",
    "context_table",
    "decode_tok_s",
    "estimate",
    "estimated_j",
    "fit_engines",
    "fits_and_speed",
    "head_cache_bytes",
    "inference_memory",
    "kv_cache_bytes",
    "kv_cache_mb_per_1k",
    "longest_context",
    "models",
    "operations",
    "published",
    "published_check",
    "step",
    "stored_bits",
    "this_machine",
    "time_to_first_token_ms",
    "token_bytes",
    "tokens_per_charge",
    "training_memory",
    "with_room",
]
