"""The devices that a model may run on: `data/devices.csv`, with the source of every figure."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from edgelab.devices.tables import table

if TYPE_CHECKING:
    from edgelab.devices.memory import MemoryNeed


@dataclass(frozen=True)
class Device:
    """What a model runs on. A figure that no source gives is None.

    memory_gb is the size as sold. Memory sold as 8 GB holds 8 x 2^30 = 8.59 x 10^9 bytes; the difference of 7
    % is left to the operating system, which usually takes more.
    """

    name: str
    device_class: str
    memory_gb: float | None
    memory_bandwidth_gb_s: float | None = None  # peak
    memory_source: str = ""
    bandwidth_source: str = ""

    def holds(self, need: MemoryNeed) -> bool:
        """Whether the memory is at least as large as the need."""
        return self.memory_gb is not None and need.total_gb <= self.memory_gb


def catalogue() -> list[Device]:
    """The devices of `data/devices.csv`, from the smallest memory to the largest."""
    devices = [
        Device(
            name=row["name"],
            device_class=row["class"],
            memory_gb=float(row["memory_gb"]) if row["memory_gb"] else None,
            memory_bandwidth_gb_s=float(row["memory_bandwidth_gb_s"])
            if row["memory_bandwidth_gb_s"]
            else None,
            memory_source=row["memory_source"],
            bandwidth_source=row["bandwidth_source"],
        )
        for row in table("devices.csv")
    ]
    return sorted(
        devices, key=lambda device: (device.memory_gb or math.inf, device.memory_bandwidth_gb_s or 0)
    )


def this_machine() -> Device:
    """The machine this runs on, with the memory its system reports; its bandwidth is not measured here."""
    return Device(
        name="This machine",
        device_class=platform.machine(),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        memory_source="psutil",
    )
