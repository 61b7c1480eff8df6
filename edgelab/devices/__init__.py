"""What a model needs, what a device has, and how fast the one runs on the other: *analytic*, none measured.

`data/models.csv` and `data/devices.csv` hold the figures and where they come from; the reader's own devices are in
`devices.csv` of EDGELAB_HOME, and what llama-bench measured on one calibrates it.
"""

from edgelab.devices.bench_lines import BenchLine, BenchTextError, read_bench, saved_bench
from edgelab.devices.catalogue import catalogue, this_machine, with_room
from edgelab.devices.device import Device
from edgelab.devices.file_sizes import (
    MIXTURES,
    TensorFile,
    file_sizes,
    gguf_bytes,
    gguf_tensors,
    gguf_token_bytes,
    gguf_weight_bytes,
    header_bytes,
)
from edgelab.devices.fitting import STORED_AS, Fit, fit_engines
from edgelab.devices.llama_bench import BenchFit, Spread, fit_bench, settings_of, what_fits
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
from edgelab.devices.own import DeviceFileError, keep_device, own_device, own_devices, own_file
from edgelab.devices.power import PowerError, battery_percent, estimated_j, tokens_per_charge
from edgelab.devices.published import Published, class_engine, class_range, published, published_check
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
from edgelab.devices.speed import estimate, fits_and_range, fits_and_speed

__all__ = [
    "MIXTURES",
    "OPTIMIZER_MOMENTS",
    "PRECISIONS",
    "SCALE_BITS",
    "STORED_AS",
    "BenchFit",
    "BenchLine",
    "BenchTextError",
    "Device",
    "DeviceFileError",
    "Engine",
    "Fit",
    "MemoryNeed",
    "ModelShape",
    "Operation",
    "PowerError",
    "Precision",
    "Published",
    "ShapeError",
    "Spread",
    "TensorFile",
    "battery_percent",
    "calibrate",
    "catalogue",
    "choose_split",
    "class_engine",
    "class_range",
    "context_table",
    "decode_tok_s",
    "estimate",
    "estimated_j",
    "file_sizes",
    "fit_bench",
    "fit_engines",
    "fits_and_range",
    "fits_and_speed",
    "gguf_bytes",
    "gguf_tensors",
    "gguf_token_bytes",
    "gguf_weight_bytes",
    "head_cache_bytes",
    "header_bytes",
    "inference_memory",
    "keep_device",
    "kv_cache_bytes",
    "kv_cache_mb_per_1k",
    "longest_context",
    "models",
    "operations",
    "own_device",
    "own_devices",
    "own_file",
    "published",
    "published_check",
    "read_bench",
    "saved_bench",
    "settings_of",
    "step",
    "stored_bits",
    "this_machine",
    "time_to_first_token_ms",
    "token_bytes",
    "tokens_per_charge",
    "training_memory",
    "what_fits",
    "with_room",
]
