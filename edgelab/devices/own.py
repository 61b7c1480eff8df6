"""Devices of the reader's own: lines of `devices.csv` in EDGELAB_HOME, beside those of the project's catalogue.

name,memory_gb,memory_bandwidth_gb_s,float32_gflop_s
My phone,8,51.2,
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from edgelab import csv_files
from edgelab.assets import home, staged
from edgelab.devices.device import COLUMNS, FILE, Device, DeviceFileError, device_of, project_devices

NEEDED = ("name", "memory_gb", "memory_bandwidth_gb_s")
WRITTEN = (*NEEDED, "usable_gb", "float32_gflop_s", "runs_on")


def own_file() -> Path:
    """Where the reader's devices are kept: `devices.csv` in EDGELAB_HOME."""
    return home() / FILE


def own_devices(file: Path | None = None) -> list[Device]:
    """The devices of a CSV file, by default `own_file()`; none where there is no such file.

    Its first line names columns of `data/devices.csv`, at least name, memory_gb and memory_bandwidth_gb_s; a figure
    that is left out is not known. runs_on, "CPU", "phone" or "GPU", says whose published share of the bandwidth is
    expected, by default that of phones. Raises DeviceFileError, naming line and column, for what cannot be one.
    """
    file = own_file() if file is None else file
    if not file.exists():
        return []
    rows = csv_files.lines(file, DeviceFileError, COLUMNS, NEEDED, unique="name")
    return [_device(cells, where) for where, cells in rows]


def own_device(
    name: str,
    memory_bandwidth_gb_s: float,
    memory_gb: float,
    gflop_s: float | None = None,
    usable_gb: float | None = None,
    runs_on: str = "phone",
) -> Device:
    """A device from figures: peak bandwidth in GB/s, memory as sold in GB, and peak GFLOP/s where it is known.

    Raises DeviceFileError for figures that are not positive, a name of the catalogue, or another runs_on.
    """
    given = {"name": name, "memory_gb": memory_gb, "memory_bandwidth_gb_s": memory_bandwidth_gb_s}
    given |= {"usable_gb": usable_gb, "float32_gflop_s": gflop_s, "runs_on": runs_on}
    return _device(
        {column: "" if value is None else str(value) for column, value in given.items()}, "The device"
    )


def keep_device(device: Device, file: Path | None = None) -> Path:
    """Add a device to the reader's own, or replace the one of that name; returns the file.

    Raises DeviceFileError where a line that is there makes no sense, and AssetError where it cannot be written.
    """
    file = own_file() if file is None else file
    kept = {one.name: one for one in own_devices(file)} | {device.name: device}
    text = io.StringIO()
    more = [
        name for name in COLUMNS if name not in WRITTEN and any(_cell(one, name) for one in kept.values())
    ]
    columns = [*WRITTEN, *more]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(one, name) for name in columns] for one in kept.values())
    with staged(file) as draft:
        draft.write_text(text.getvalue(), encoding="utf-8")
    return file


def _cell(device: Device, column: str) -> str:
    value = getattr(device, "device_class" if column == "class" else column)
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _device(cells: Mapping[str, str], where: str) -> Device:
    if not cells["name"].strip():
        raise DeviceFileError(f"{where}, column name: it is empty; give the device a name.")
    if cells["name"] in {one.name for one in project_devices()}:
        raise DeviceFileError(
            f"{where}, column name: {cells['name']!r} is a device of the catalogue; choose another name."
        )
    return device_of({**cells, "runs_on": cells.get("runs_on") or "phone"}, where, NEEDED[1:])
