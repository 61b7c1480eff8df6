"""What a device is, and those of the project: `data/devices.csv`, with the source of every figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

from edgelab import csv_files
from edgelab.devices.tables import table
from edgelab.errors import EdgeLabError

if TYPE_CHECKING:
    from edgelab.devices.memory import MemoryNeed


class DeviceFileError(EdgeLabError):
    """A device that makes no sense, named by line and column."""


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


FILE = "devices.csv"
COLUMNS = ["class" if one.name == "device_class" else one.name for one in fields(Device)]
NUMBERS = (
    *("memory_gb", "usable_gb", "memory_bandwidth_gb_s"),
    *("float32_gflop_s", "float16_gflop_s", "int8_gop_s", "power_w", "battery_wh"),
)
RUNS_ON = ("CPU", "phone", "GPU")


def device_of(cells: Mapping[str, str], where: str, needed: tuple[str, ...] = ()) -> Device:
    """The device that cells of a line describe. Raises DeviceFileError, with line and column, where they cannot.

    needed: figures that may not be left out.
    """

    def wrong(column: str, sentence: str) -> DeviceFileError:
        return DeviceFileError(f"{where}, column {column}: {sentence}")

    figures: dict[str, float] = {}
    for column in NUMBERS:
        if not cells.get(column) and column not in needed:
            continue
        figures[column] = csv_files.number(cells, column, where, DeviceFileError)
        if not figures[column] > 0:
            raise wrong(
                column,
                f"{cells[column]} is not positive; write the figure of the data sheet, or leave it empty.",
            )
    if figures.get("usable_gb", 0) > figures.get("memory_gb", float("inf")):
        raise wrong(
            "usable_gb",
            f"{figures['usable_gb']:g} GB are more than the {figures['memory_gb']:g} GB there are.",
        )
    if cells["runs_on"] not in RUNS_ON:
        raise wrong("runs_on", f"{cells['runs_on']!r} is none of {', '.join(RUNS_ON)}.")
    texts = {column: text for column, text in cells.items() if column.endswith("_source")}
    return Device(
        name=cells["name"],
        device_class=cells.get("class") or cells["runs_on"],
        runs_on=cells["runs_on"],
        **{"memory_gb": None} | figures,
        **texts,
    )


def project_devices() -> list[Device]:
    """The devices of `data/devices.csv`, as they stand there. Raises DeviceFileError for a line that is none."""
    needed = ("name", "class", "runs_on", "memory_gb")
    rows = table(FILE, DeviceFileError, COLUMNS, needed, unique="name")
    return [device_of(cells, where) for where, cells in rows]


@cache
def _usable_shares() -> dict[str, float]:
    """Of each class among the project's devices, the smallest share of its memory that is usable."""
    shares: dict[str, float] = {}
    for device in project_devices():
        if device.memory_gb and device.usable_gb:
            share = device.usable_gb / device.memory_gb
            shares[device.device_class] = min(share, shares.get(device.device_class, share))
    return shares
