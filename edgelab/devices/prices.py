"""What requests cost, by the prices of data/prices.csv, which anybody may edit."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgelab import csv_files
from edgelab.assets import data_dir
from edgelab.devices.tables import table
from edgelab.errors import EdgeLabError

UNITS = {"cloud_input": "million tokens", "cloud_output": "million tokens", "electricity": "kWh"}

JOULES_PER_KWH = 3.6e6


class PriceError(EdgeLabError):
    """A table of prices that cannot be read."""


@dataclass(frozen=True)
class Prices:
    """In USD: of a million tokens that the cloud reads and writes, of a kWh, and of a GB over metered links."""

    cloud_input: float
    cloud_output: float
    electricity: float
    data: dict[str, float] = field(default_factory=dict)

    def of(
        self, *, read: int = 0, written: int = 0, n_bytes: int = 0, link: str = "", joules: float = 0.0
    ) -> float:
        """USD of so many tokens in the cloud, bytes over a link, both ways, and joules at the edge."""
        cloud = (read * self.cloud_input + written * self.cloud_output) / 1e6
        return cloud + n_bytes / 1e9 * self.data.get(link, 0.0) + joules / JOULES_PER_KWH * self.electricity


def prices() -> Prices:
    """The prices of data/prices.csv. Raises PriceError for a line that is missing, or that says no price."""
    metered = {f"data:{cells['name']}": "GB" for _, cells in table("links.csv", needed=("name",))}
    columns, units, found = ("name", "usd", "per", "source"), UNITS | metered, {}
    for where, cells in csv_files.lines(
        data_dir() / "prices.csv", PriceError, columns, needed=columns[:3], unique="name"
    ):
        name = cells["name"]
        if name not in units:
            raise PriceError(
                f"{where}, column name: nothing with a price is called {name!r}; there are {', '.join(units)}."
            )
        if cells["per"] != units[name]:
            raise PriceError(
                f"{where}, column per: {cells['per']!r} should be {units[name]}; give {name} in USD per {units[name]}."
            )
        found[name] = csv_files.number(cells, "usd", where, PriceError)
        if found[name] < 0:
            raise PriceError(f"{where}, column usd: {cells['usd']} should be at least 0.")
    if lacking := [name for name in UNITS if name not in found]:
        raise PriceError(
            f"prices.csv: the line {lacking[0]} is missing; give it in USD per {UNITS[lacking[0]]}."
        )
    data = {name.removeprefix("data:"): usd for name, usd in found.items() if name in metered}
    return Prices(*(found[name] for name in UNITS), data)
