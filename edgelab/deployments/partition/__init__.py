"""A model cut into runs of layers, each on a device of its own: planned, simulated, run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from edgelab.assets import sha256
from edgelab.recipes import RecipeError, deployment


@deployment("partition", shown=("fleet",))
@dataclass(frozen=True, kw_only=True)
class Partition:
    """Several devices, each with a run of consecutive layers: planned from measured times, run by workers.

    fleet: devices and links, of data/fleets or a CSV file. objective: latency, throughput, energy, or slow_bytes, the
    bytes over links below 10 Mbps. planner: exact, edgeshard as published, its baselines edge_solo, cloud_edge_even and
    cloud_edge_opt, or greedy for large fleets. wire: format of the hidden states on links. first: parts at the
    beginning that stay on the source, 1 is the embedding. last: parts at the end that stay there, 1 is the head. avoid:
    devices that may not be used, joined by a slash. use: devices that have to be. cut: part at which the next device of
    the fleet begins, in place of a planner; 16/24 are two. plan: file of a plan that `edgelab plan` saved, in place
    of a planner. requests: in flight, for the throughput. threads: of each stage. address: of a running Ray cluster,
    or auto, whose machines and links are the fleet's; empty runs the fleet on this machine.
    """

    fleet: str = "edge_and_cloud"
    objective: Literal["latency", "throughput", "energy", "slow_bytes"] = "latency"
    planner: Literal["exact", "edgeshard", "edge_solo", "cloud_edge_even", "cloud_edge_opt", "greedy"] = (
        "exact"
    )
    wire: Literal["float32", "float16", "int8", "int4"] = "float32"
    first: int = 1
    last: int = 0
    avoid: str = ""
    use: str = ""
    cut: str = ""
    plan: str = ""
    requests: int = 2
    threads: int = 1
    address: str = ""

    engine: ClassVar[str] = "edgelab.deployments.partition.session:Partitioned"
    packages: ClassVar[tuple[str, ...]] = ("ray",)
    extra: ClassVar[str] = "cluster"
    in_torch: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.last < 0 or min(self.first, self.requests, self.threads) < 1:
            raise RecipeError(
                f"last={self.last} should be at least 0, and first={self.first},requests={self.requests},"
                f"threads={self.threads} at least 1: the text is on the source."
            )
        if not all(place.isdecimal() for place in self.cut.split("/") if self.cut):
            raise RecipeError(f"cut={self.cut} is no list of parts such as 16 or 16/24.")
        if self.cut and self.plan:
            raise RecipeError(
                f"cut={self.cut} and plan={self.plan} both say where stages begin; give one of the two."
            )

    def reads(self) -> list[str]:
        """What the fleet is, and the plan, as their files say now."""
        from edgelab.deployments.partition.fleet import (
            identity,
        )  # with all devices: to write a recipe needs none

        return [identity(self.fleet), *([sha256(Path(self.plan).expanduser())] if self.plan else [])]
