"""Will it fit, and how fast: every model in every precision on every device, all *analytic*."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from statistics import median

import pandas as pd

from edgelab.devices.catalogue import Device, catalogue
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.power import estimated_j, tokens_per_charge
from edgelab.devices.published import class_engine, class_range, published
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
    tokens per charge a battery too. engines: by name of device, where it was calibrated; else `likely_engine`.
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
        engine = engine or likely_engine(device)
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


@cache
def likely_engine(device: Device) -> Engine:
    """What engines reach on a device: the median of the rates published of it, and where there are none, of its class.

    Only rates with weights below 8 bits count, as in `class_engine`, which also says what share of the compute counts.
    """
    of_class = class_engine(device.runs_on)
    own = [row for row in published() if row.device == device.name and row.quantized]
    if not own:
        return of_class
    share = median(row.decode_tok_s / row.predicted_tok_s(device, Engine()) for row in own)
    basis = f"the median of its {len(own)} published rates" if len(own) > 1 else "its own published rate"
    return replace(of_class, bandwidth_share=share, basis=f"from {basis}")


def fits_and_range(
    device: Device,
    shapes: Iterable[str | ModelShape],
    precisions: Iterable[str | Precision] = SHOWN,
    context: int = 2048,
    prompt: int = 512,
) -> pd.DataFrame:
    """`fits_and_speed` of one device, with the rates that its class has shown: slow_tok_s and fast_tok_s.

    Those two are for the lowest and the highest share of the bandwidth published of its class, decode_tok_s for the
    share of `likely_engine`. They are empty where the model does not fit.
    """
    named = [models()[each] if isinstance(each, str) else each for each in shapes]
    by_name = {shape.name: shape for shape in named}
    ends = dict(zip(("slow_tok_s", "fast_tok_s"), class_range(device.runs_on), strict=True))
    tables = {
        column: fits_and_speed(by_name, precisions, [device], context, prompt, engines={device.name: engine})
        for column, engine in ends.items()
    }
    rows = fits_and_speed(by_name, precisions, [device], context, prompt)
    return rows.assign(**{column: found["decode_tok_s"] for column, found in tables.items()})
