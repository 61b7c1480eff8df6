"""`make bench`: measure the measuring, about an hour and a half on two cores. Writes results/bench.md and prints it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

from benchmarks import adapters, evaluation, hybrid, partition, processes, removing, road, sessions, training
from edgelab import ledger


def main() -> None:
    rows = [
        *evaluation.rows(),
        *processes.rows(),
        *sessions.rows(),
        *training.rows(),
        *removing.rows(),
        *adapters.rows(),
        *partition.rows(),
        *hybrid.rows(),
        *road.rows(),
    ]
    machine = ledger.provenance(threads=2)
    versions = ", ".join(f"{name} {number}" for name, number in json.loads(machine["versions"]).items())
    lines = [
        f"# Benchmarks, {datetime.date.today()}",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, {machine['ram_gb']} GB, {versions}, "
        f"commit {machine['git_sha']}.",
        "",
        "| what | value | bound |",
        "| --- | --- | --- |",
        *(f"| {what} | {value} | {bound} |" for what, value, bound in rows),
    ]
    text = "\n".join(lines) + "\n"
    place = Path("results/bench.md")
    place.parent.mkdir(exist_ok=True)
    place.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
