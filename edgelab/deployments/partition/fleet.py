"""Fleets: devices of the catalogue and the links between them, as `data/fleets/*.csv` or a file of the reader's own.

Columns: kind (device or link), name, to, what, count, room_gb, slow_down, source. A device line names a device of the
catalogue or This machine, how many there are (called name 1, name 2, ...), what a model may fill where that differs
from the catalogue, and how many times slower than the catalogue's it is. A link line connects `name` to `to`; * is
every device, and later lines win. `what` is a link of `data/links.csv` or a number of Mbps. The first device is the
source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgelab import csv_files
from edgelab.assets import data_dir
from edgelab.devices.catalogue import HERE, Device, catalogue, this_machine
from edgelab.errors import EdgeLabError
from edgelab.keys import key
from edgelab.network import Link, LinkError, find

COLUMNS = ("kind", "name", "to", "what", "count", "room_gb", "slow_down", "source")


class FleetError(EdgeLabError):
    """A fleet file that cannot be read; says the line and the column."""


@dataclass(frozen=True)
class Member:
    """A device of a fleet. room_gb: for a model. slow_down: times slower than the catalogue's."""

    name: str
    device: Device
    room_gb: float
    slow_down: float = 1.0


@dataclass(frozen=True, eq=False)
class Fleet:
    """bandwidth: (members, members), bytes per second from row to column, 0 without a link; delay: one way, in s."""

    name: str
    members: tuple[Member, ...]
    bandwidth: np.ndarray
    delay: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)

    def index(self, name: str) -> int:
        """Place of a member. Raises FleetError with those there are."""
        if name not in self.names:
            raise FleetError(f"The fleet {self.name} has no {name!r}; it has {', '.join(self.names)}.")
        return self.names.index(name)

    def linked(self, one: str, other: str, link: Link) -> Fleet:
        """The same with another link between two members: up from the first one, down to it."""
        i, j = self.index(one), self.index(other)
        bandwidth, delay = self.bandwidth.copy(), self.delay.copy()
        bandwidth[i, j], bandwidth[j, i] = link.up_mbps * 1e6 / 8, link.down_mbps * 1e6 / 8
        delay[i, j] = delay[j, i] = link.round_trip_ms / 2e3
        return replace(self, bandwidth=bandwidth, delay=delay)

    def only(self, names: Sequence[str]) -> Fleet:
        """A fleet of some of the members, in the order asked for."""
        places = [self.index(name) for name in names]
        square = np.ix_(places, places)
        return Fleet(
            self.name, tuple(self.members[one] for one in places), self.bandwidth[square], self.delay[square]
        )


def fleets() -> dict[str, Path]:
    """The fleets of `data/fleets/` by name."""
    return {path.stem: path for path in sorted((data_dir() / "fleets").glob("*.csv"))}


def load(name: str | Path) -> Fleet:
    """A fleet of `data/fleets/` by name, or a file. Raises FleetError."""
    known = fleets()
    path = known.get(str(name), Path(name))
    if not path.is_file():
        raise FleetError(f"{name} is no file and no fleet of edgelab; there are {', '.join(known)}.")
    rows = list(csv_files.lines(path, FleetError, COLUMNS, needed=COLUMNS[:4]))
    members = [member for where, row in rows if row["kind"] == "device" for member in _members(where, row)]
    if not members:
        raise FleetError(f"{path.name} has no device; a line begins device,NAME,,DEVICE OF THE CATALOGUE.")
    names = [member.name for member in members]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise FleetError(f"{path.name}: two devices are called {doubled!r}; give the second another name.")
    count = len(members)
    fleet = Fleet(path.stem, tuple(members), np.diag(np.full(count, np.inf)), np.zeros((count, count)))
    for where, row in rows:
        if row["kind"] == "link":
            fleet = _linked(fleet, where, row)
        elif row["kind"] != "device":
            raise _wrong(where, "kind", row["kind"], "device or link")
    return fleet


def identity(name: str) -> str:
    """A fleet and what its file and its links say now. What is free on this machine just now is no part of it."""
    fleet = load(name)
    said = [(one.name, one.device.name, _stated_gb(one), one.slow_down) for one in fleet.members]
    return f"fleet {fleet.name} {key('fleet', said, fleet.bandwidth.tolist(), fleet.delay.tolist())}"


def _stated_gb(member: Member) -> float | None:
    free = member.device.name == HERE and member.room_gb == member.device.room_gb
    return None if free else member.room_gb


def _wrong(where: str, column: str, value: object, right: str) -> FleetError:
    return FleetError(f"{where}, column {column}: {value!r} should be {right}.")


def _number(where: str, row: dict[str, str], column: str, otherwise: float | None) -> float | None:
    if not row.get(column):
        return otherwise
    value = csv_files.number(row, column, where, FleetError)
    if value <= 0:
        raise _wrong(where, column, row[column], "a number above 0")
    return value


def _members(where: str, row: dict[str, str]) -> list[Member]:
    if not row["name"]:
        raise _wrong(where, "name", "", "a name of its own")
    known = {device.name: device for device in (this_machine(), *catalogue())}
    if row["what"] not in known:
        raise _wrong(where, "what", row["what"], f"a device of the catalogue: {', '.join(known)}")
    device = known[row["what"]]
    count = _number(where, row, "count", 1)
    if count != int(count):
        raise _wrong(where, "count", row["count"], "a whole number")
    room = _number(where, row, "room_gb", device.room_gb)
    if room is None:
        raise _wrong(where, "room_gb", row.get("room_gb"), "given, as the catalogue does not know it")
    slow = _number(where, row, "slow_down", 1.0)
    names = [row["name"]] if count == 1 else [f"{row['name']} {place + 1}" for place in range(int(count))]
    return [Member(name, device, room, slow) for name in names]


def _linked(fleet: Fleet, where: str, row: dict[str, str]) -> Fleet:
    if not row["what"]:
        raise _wrong(where, "what", "", "a link of data/links.csv or a number of Mbps")
    try:
        mbps = csv_files.figure(row["what"])
        link = find(row["what"]) if mbps is None else Link(row["what"], mbps, mbps)
    except LinkError as error:
        raise FleetError(f"{where}, column what: {error}") from None
    ends = []
    for column in ("name", "to"):
        wanted = row[column]
        found = [
            one
            for one in fleet.names
            if wanted == "*" or one == wanted or (wanted and one.rpartition(" ")[0] == wanted)
        ]
        if not found:
            raise _wrong(where, column, wanted, f"one of {', '.join(fleet.names)}, or *")
        ends.append(found)
    least = min(link.up_mbps, link.down_mbps)
    alike = replace(link, up_mbps=least, down_mbps=least)  # of two stations, the sender's way up decides
    for one in ends[0]:
        for other in ends[1]:
            if one != other:
                peers = {one, other} <= {*ends[0]} & {*ends[1]}
                fleet = fleet.linked(one, other, alike if peers else link)
    return fleet
