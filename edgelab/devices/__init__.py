"""What a model needs, what a device has, and how fast the one runs on the other: *analytic*, none measured.

`data/models.csv` and `data/devices.csv` hold the figures and where they come from.
"""

from edgelab.devices.catalogue import Device, catalogue, this_machine
from edgelab.devices.memory import (
    OPTIMIZER_MOMENTS,
    SCALE_BITS,
    MemoryNeed,
    context_table,
    inference_memory,
    kv_cache_mb_per_1k,
    longest_context,
    training_memory,
)
from edgelab.devices.shapes import ModelShape, ShapeError, models

__all__ = [
    "OPTIMIZER_MOMENTS",
    "SCALE_BITS",
    "Device",
    "MemoryNeed",
    "ModelShape",
    "ShapeError",
    "catalogue",
    "context_table",
    "inference_memory",
    "kv_cache_mb_per_1k",
    "longest_context",
    "models",
    "this_machine",
    "training_memory",
]
