"""What requests cost, by the prices of data/prices.csv, which anybody may edit."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field

from edgelab.assets import data_dir
from edgelab.errors import EdgeLabError

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
    """The prices of data/prices.csv. Raises PriceError for a line that is missing or is no number."""
    with (data_dir() / "prices.csv").open(newline="", encoding="utf-8") as lines:
        found = {row["name"]: row["usd"] for row in csv.DictReader(lines)}
    try:
        numbers = {name: float(usd) for name, usd in found.items()}
        data = {name.removeprefix("data:"): usd for name, usd in numbers.items() if name.startswith("data:")}
        return Prices(numbers["cloud_input"], numbers["cloud_output"], numbers["electricity"], data)
    except (KeyError, TypeError, ValueError) as error:
        raise PriceError(
            f"data/prices.csv: {error}; it has the lines cloud_input, cloud_output, electricity and data:LINK, each "
            "with USD as a number."
        ) from None
