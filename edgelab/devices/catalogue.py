"""The devices that a model may run on: those of `data/devices.csv`, and the reader's own."""

from __future__ import annotations

import math
import platform

import psutil

from edgelab.devices.device import Device, project_devices
from edgelab.devices.own import own_devices

HERE = "This machine"


def catalogue() -> list[Device]:
    """The devices of `data/devices.csv` and of the reader's own file, from the smallest memory to the largest.

    Raises DeviceFileError, naming line and column, where the reader's file makes no sense.
    """
    return sorted(
        [*project_devices(), *own_devices()],
        key=lambda device: (device.memory_gb or math.inf, device.memory_bandwidth_gb_s or 0),
    )


def with_room(need_gb: float, devices: list[Device] | None = None) -> list[Device]:
    """The devices, by default those of the catalogue, that have at least so many GB for a model."""
    known = catalogue() if devices is None else devices
    return [device for device in known if device.room_gb is not None and device.room_gb >= need_gb]


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
