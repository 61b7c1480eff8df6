"""Will it fit, and how fast: every model in every precision on every device, all *analytic*."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd

from edgelab.devices.catalogue import Device, catalogue
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.power import estimated_j, tokens_per_charge
from edgelab.devices.published import class_engine
from edgelab.devices.roofline import PRECISIONS, Engine, Precision, decode_tok_s, time_to_first_token_ms
from edgelab.devices.shapes import ModelShape, models

SHOWN = ("float16", "Q8_0", "Q4_0")


def fits_and_speed(
    shapes: Mapping[str, ModelShape] | Iterable[str] | None = None,
    precisions: Iterable[str | Precision] = SHOWN,
    devices: Iterable[Device] | None = None,
    context: int = 2048,
    prompt: int = 512,
    kv_bits: int = 16,
    engines: Mapping[str, Engine] | None = None,
) -> pd.DataFrame:
    """A row for each model, precision and device; shapes and devices are by default the catalogues.

    Fits means that weights and the cache of `context` tokens are no larger than what system and other programs leave of
    the memory. Rates are for that full context, and for a prompt of `prompt` tokens; they are empty where the model
    does not fit or no source gives the bandwidth (for the prompt, the compute). Energy needs a published power, and
    tokens per charge a battery too. engines: by name of device, where it was calibrated; else that of its class.
    """
    if shapes is None or not isinstance(shapes, Mapping):
        names = list(models() if shapes is None else shapes)
        shapes = {name: models()[name] for name in names}
    chosen = [PRECISIONS[each] if isinstance(each, str) else each for each in precisions]
    places = list(catalogue() if devices is None else devices)
    rows = [
        estimate(device, shape, precision, context, prompt, kv_bits, (engines or {}).get(device.name))
        for shape in shapes.values()
        for precision in chosen
        for device in places
    ]
    return pd.DataFrame(rows)


def estimate(
    device: Device,
    shape: ModelShape,
    precision: Precision,
    context: int = 2048,
    prompt: int = 512,
    kv_bits: int = 16,
    engine: Engine | None = None,
) -> dict[str, str | float | bool | None]:
    """One row of `fits_and_speed`."""
    weights_mb = precision.weight_bytes(shape) / 1e6
    cache_mb = kv_cache_bytes(shape, context, kv_bits) / 1e6
    fits = device.room_gb is not None and weights_mb + cache_mb <= 1000 * device.room_gb
    rate = first = joules = charge = None
    basis = energy_basis = ""
    if fits and device.memory_bandwidth_gb_s:
        engine = engine or class_engine(device.runs_on)
        rate, basis = decode_tok_s(device, shape, precision, context, kv_bits, engine), engine.basis
        first = time_to_first_token_ms(device, shape, precision, prompt, kv_bits, engine)
        if device.power_w:
            joules, energy_basis = estimated_j(device.power_w, 1 / rate)
        if joules and device.battery_wh:
            charge = tokens_per_charge(joules, device.battery_wh)
    return {
        "model": shape.name,
        "precision": precision.name,
        "device": device.name,
        "weights_mb": weights_mb,
        "kv_cache_mb": cache_mb,
        "fits": fits,
        "decode_tok_s": rate,
        "ttft_ms": first,
        "energy_j_per_token": joules,
        "energy_basis": energy_basis,
        "tokens_per_charge": charge,
        "basis": basis,
        "badge": "analytic",
    }
