"""Engines calibrated on rates that were measured here: one rate each sets the engine, its others check the roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from edgelab.devices.catalogue import Device
from edgelab.devices.roofline import PRECISIONS, Engine, Precision, calibrate, choose_split, decode_tok_s
from edgelab.devices.shapes import ModelShape

# What engines store of 4-bit weights in groups of 64, of 8-bit ones by row, and of float32, the head in 8 bits
STORED_AS = {
    "onnxruntime": (
        Precision("4 bits", 4.56, 8.5, "int8"),
        Precision("8 bits", 8.5, 8.5, "int8"),
        PRECISIONS["float32"],
    ),
    "llamacpp": (PRECISIONS["Q4_1"], PRECISIONS["Q8_0"], PRECISIONS["float32"]),
}


@dataclass(frozen=True)
class Fit:
    """Calibrated engines by name, the split they share, and how well they predict.

    split: which part of the time beyond the limit every step pays, however many bytes it reads. check: a row for each
    rate, with engine, weights, measured, predicted, and error = predicted / measured - 1.
    """

    engines: dict[str, Engine]
    split: float
    check: pd.DataFrame


def fit_engines(
    shape: ModelShape,
    measured: Mapping[str, Mapping[Precision, float]],
    read_gb_s: float,
    context: int = 512,
) -> Fit:
    """Calibrate every engine on the first of its decoding rates, with the one split that predicts the others best.

    measured: tokens per second by precision, by engine. read_gb_s: what this machine reads. An engine with one rate is
    predicted by nothing but itself, and one with none is left out. Raises ShapeError for rates or a bandwidth that are
    not positive.
    """
    rates = {name: list(by_precision.items()) for name, by_precision in measured.items() if by_precision}
    split = choose_split(shape, rates.values(), read_gb_s, context=context)
    engines = {name: calibrate(shape, *pairs[0], read_gb_s, split, context) for name, pairs in rates.items()}
    here = Device("this machine", "", None, memory_bandwidth_gb_s=read_gb_s)
    rows = [
        {
            "engine": name,
            "weights": precision.name,
            "measured": tok_s,
            "predicted": decode_tok_s(here, shape, precision, context, engine=engines[name]),
        }
        for name, pairs in rates.items()
        for precision, tok_s in pairs
    ]
    check = pd.DataFrame(rows, columns=["engine", "weights", "measured", "predicted"])
    return Fit(engines, split, check.assign(error=check["predicted"] / check["measured"] - 1))
