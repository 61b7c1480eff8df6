"""The devices that a model may run on: `data/devices.csv`, with the source of every figure."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import psutil

from edgelab.devices.tables import table

if TYPE_CHECKING:
    from edgelab.devices.memory import MemoryNeed

HERE = "This machine"


@dataclass(frozen=True)
class Device:
    """What a model runs on. A figure that no source gives is None.

    memory_gb is the size as sold, usable_gb what of it system and other programs leave to a model; 8 GB as sold are
    8 x 2^30 = 8.59 x 10^9 bytes, so that usable_gb can come close to it. Bandwidth and compute are peaks, dense;
    runs_on is the part that engines use, "CPU", "phone" or "GPU". power_w is drawn while running: measured where a
    source did, else the limit of board or mode; its source says which.
    """

    name: str
    device_class: str
    memory_gb: float | None
    memory_bandwidth_gb_s: float | None = None  # peak
    usable_gb: float | None = None
    memory_source: str = ""
    usable_source: str = ""
    bandwidth_source: str = ""
    runs_on: str = ""
    float32_gflop_s: float | None = None
    float16_gflop_s: float | None = None
    int8_gop_s: float | None = None
    compute_source: str = ""
    power_w: float | None = None
    power_source: str = ""
    battery_wh: float | None = None
    battery_source: str = ""

    @property
    def room_gb(self) -> float | None:
        """Memory for a model: usable_gb, or the share of memory_gb that devices of the same class leave.

        All of memory_gb where the catalogue has no such class; None where memory_gb is not known either.
        """
        if self.usable_gb is not None or self.memory_gb is None:
            return self.usable_gb
        return self.memory_gb * _usable_shares().get(self.device_class, 1.0)

    def holds(self, need: MemoryNeed) -> bool:
        """Whether the memory for a model is at least as large as the need."""
        return self.room_gb is not None and need.total_gb <= self.room_gb

    def compute_gflop_s(self, multiply: str) -> float | None:
        """Peak of products in `multiply` (int8, float16 or float32), or of the next wider format that has a figure."""
        peaks = {"int8": self.int8_gop_s, "float16": self.float16_gflop_s, "float32": self.float32_gflop_s}
        wider = list(peaks)[list(peaks).index(multiply) :]
        return next((peaks[name] for name in wider if peaks[name]), None)


NUMBERS = (
    *("memory_gb", "usable_gb", "memory_bandwidth_gb_s"),
    *("float32_gflop_s", "float16_gflop_s", "int8_gop_s", "power_w", "battery_wh"),
)


def catalogue() -> list[Device]:
    """The devices of `data/devices.csv`, from the smallest memory to the largest."""
    devices = []
    for row in table("devices.csv"):
        figures = {name: float(text) if (text := row.pop(name)) else None for name in NUMBERS}
        devices.append(Device(device_class=row.pop("class"), **row, **figures))
    return sorted(
        devices, key=lambda device: (device.memory_gb or math.inf, device.memory_bandwidth_gb_s or 0)
    )


def with_room(need_gb: float, devices: list[Device] | None = None) -> list[Device]:
    """The devices, by default those of the catalogue, that have at least so many GB for a model."""
    known = catalogue() if devices is None else devices
    return [device for device in known if device.room_gb is not None and device.room_gb >= need_gb]


@cache
def _usable_shares() -> dict[str, float]:
    """Of each class in the catalogue, the smallest share of its memory that is usable."""
    shares: dict[str, float] = {}
    for device in catalogue():
        if device.memory_gb and device.usable_gb:
            share = device.usable_gb / device.memory_gb
            shares[device.device_class] = min(share, shares.get(device.device_class, share))
    return shares


def this_machine() -> Device:
    """The machine this runs on, with the memory its system reports; its bandwidth is not measured here."""
    memory = psutil.virtual_memory()
    return Device(
        name=HERE,
        device_class=platform.machine(),
        memory_gb=round(memory.total / 1e9, 1),
        usable_gb=round(memory.available / 1e9, 1),
        memory_source="psutil",
        usable_source="psutil: available now",
        runs_on="CPU",
    )
