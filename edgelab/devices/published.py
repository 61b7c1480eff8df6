"""Rates that others measured and published, the share of the hardware they reach, and how well the roofline predicts.

A class of devices (CPU, phone, GPU) has one share of its peak bandwidth: the median of what published decoding rates
with weights below 8 bits reach, the case this workbench is about. To check a device, its own board is left out.
Weights of 8 and more bits reach more, on GPUs about 0.8, so for them the share is cautious. Taking the median over all
widths instead (0.76 on GPUs other than the Orin Nano) predicts Gemma-2-2B there 62 % too fast, against 28 % now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import pandas as pd

from edgelab.devices.device import Device, project_devices
from edgelab.devices.roofline import PRECISIONS, Engine, decode_tok_s, operations
from edgelab.devices.shapes import ShapeError, models
from edgelab.devices.tables import table
from edgelab.errors import listed

CONTEXT = 128  # tokens in the cache: most of these rates are means over the first 128 or so
RANGES = {"phone": ("phone", "CPU")}  # of which classes the rates make a range
QUANTIZED_BITS = 8  # a share of bandwidth comes from rates with weights below this


@dataclass(frozen=True)
class Published:
    """One row of `data/measured_elsewhere.csv`. Without a model the file's size stands for the bytes of a token."""

    device: str
    model: str
    precision: str
    model_gb: float | None
    engine: str
    decode_tok_s: float
    prefill_tok_s: float | None
    prompt_tokens: int | None
    source: str

    @property
    def quantized(self) -> bool:
        """Whether the weights are known to have fewer than 8 bits."""
        return bool(self.precision) and PRECISIONS[self.precision].bits < QUANTIZED_BITS

    def predicted_tok_s(self, device: Device, engine: Engine) -> float:
        """Decoding rate that the roofline gives for this row."""
        if self.model:
            return decode_tok_s(
                device, models()[self.model], PRECISIONS[self.precision], CONTEXT, engine=engine
            )
        return device.memory_bandwidth_gb_s * engine.bandwidth_share / self.model_gb

    def compute_share(self, device: Device) -> float | None:
        """Share of the peak compute that the published prefill reaches, None where either is not known."""
        peak = device.compute_gflop_s(PRECISIONS[self.precision].multiply) if self.precision else None
        if not (self.prefill_tok_s and peak):
            return None
        work = operations(
            models()[self.model], PRECISIONS[self.precision], self.prompt_tokens, self.prompt_tokens
        )
        seconds = self.prompt_tokens / self.prefill_tok_s
        return sum(part.operations for part in work) / 1e9 / peak / seconds


@cache
def published() -> tuple[Published, ...]:
    """The rows of `data/measured_elsewhere.csv`."""
    numbers = {
        "model_gb": float,
        "decode_tok_s": float,
        "prefill_tok_s": float,
        "prompt_tokens": int,
    }
    return tuple(
        Published(
            **{
                name: (numbers[name](text) if text else None) if name in numbers else text
                for name, text in row.items()
            }
        )
        for _, row in table("measured_elsewhere.csv")
    )


@cache
def class_engine(runs_on: str, without: str = "") -> Engine:
    """What engines reach on a class of devices, from all published rates but those of the board `without`.

    Compute has a share of 1 where no prefill was published beside a peak.
    Raises ShapeError for a class that is not CPU, phone or GPU.
    """
    rows, shares = _shares(runs_on, without)
    devices = {device.name: device for device in project_devices()}
    compute = [share for row in rows if (share := row.compute_share(devices[row.device])) is not None]
    return Engine(
        bandwidth_share=median(shares),
        compute_share=median(compute) if compute else 1.0,
        basis=f"median of {len(shares)} published rates on {len({row.device for row in rows})} {runs_on} devices",
    )


def class_range(runs_on: str, without: str = "") -> tuple[Engine, Engine]:
    """The slowest and the fastest engine that published rates show on a class of devices, as `class_engine`.

    Between their rates lies what a reader may expect of a device that nobody has measured. On phones most engines run
    on the CPU and few rates are published, so that those of CPUs belong to their range.
    """
    shares = [share for each in RANGES.get(runs_on, (runs_on,)) for share in _shares(each, without)[1]]
    basis = f"of {len(shares)} published rates on {listed(RANGES.get(runs_on, (runs_on,)))} devices"
    middle = class_engine(runs_on, without)
    return (
        replace(middle, bandwidth_share=min(shares), basis=f"lowest {basis}"),
        replace(middle, bandwidth_share=max(shares), basis=f"highest {basis}"),
    )


def _shares(runs_on: str, without: str) -> tuple[list[Published], list[float]]:
    """Published rates with weights below 8 bits on a class of devices, and the share of the bandwidth of each."""
    devices = {device.name: device for device in project_devices()}
    if runs_on not in {device.runs_on for device in devices.values()}:
        raise ShapeError(f"No device runs on {runs_on!r}; there are CPU, phone and GPU.")
    others = [row for row in published() if not _same_board(row.device, without)]
    rows = [row for row in others if devices[row.device].runs_on == runs_on and row.quantized]
    return rows, [row.decode_tok_s / row.predicted_tok_s(devices[row.device], Engine()) for row in rows]


def published_check() -> pd.DataFrame:
    """Every published rate beside the roofline's: device, model, precision, measured, predicted, error, share, source.

    Each is predicted without any rate of its own board. error is predicted / measured - 1.
    """
    devices = {device.name: device for device in project_devices()}
    rows = []
    for row in published():
        device = devices[row.device]
        engine = class_engine(device.runs_on, row.device)
        predicted = row.predicted_tok_s(device, engine)
        rows.append(
            {
                "device": row.device,
                "runs_on": device.runs_on,
                "model": row.model or f"{row.model_gb:g} GB file",
                "precision": row.precision,
                "engine": row.engine,
                "measured": row.decode_tok_s,
                "predicted": predicted,
                "error": predicted / row.decode_tok_s - 1,
                "share": engine.bandwidth_share,
                "source": row.source,
            }
        )
    return pd.DataFrame(rows)


def _same_board(one: str, other: str) -> bool:
    """Whether two names are modes of one board, such as Jetson Orin Nano and Jetson Orin Nano Super."""
    return bool(other) and (one.startswith(other) or other.startswith(one))
