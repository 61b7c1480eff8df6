"""Joules of a stretch of work: RAPL's counters where the system lets them be read, else power times time.

RAPL counts the energy of a processor package in microjoules (and of memory, where `dram` is listed); the counter wraps
around at `max_energy_range_uj`, after minutes at full load. Since 2020 Linux lets only root read it (CVE-2020-8694).
Everything that runs on the package is counted, not only the work inside the `with` block.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelab.devices.power import estimated_j
from edgelab.measure import Subject, measurement

POWERCAP = Path("/sys/class/powercap")
RAPL_BASIS = "RAPL package"


@dataclass
class Meter:
    """What `metered` fills: seconds, and joules where RAPL can be read, else None."""

    seconds: float = 0.0
    joules: float | None = None
    started: dict[Path, int] = field(default_factory=dict, repr=False)

    def __add__(self, other: Meter) -> Meter:
        """Both stretches together; their joules are known where both are."""
        known = None not in (self.joules, other.joules)
        return Meter(self.seconds + other.seconds, self.joules + other.joules if known else None)

    def per_token(self, tokens: int, power_w: float | None = None) -> tuple[float | None, str | None]:
        """Joules per token and their basis: RAPL, else estimated from `power_w`, else None and None."""
        if self.joules is not None:
            return self.joules / tokens, RAPL_BASIS
        return estimated_j(power_w, self.seconds / tokens) if power_w else (None, None)


@measurement("energy", part="speed", needs="process", fields=("energy_j_per_token", "energy_basis"))
def energy(subject: Subject) -> dict[str, Any]:
    """Joules per decoded token: RAPL where it can be read, else from the power that the question names."""
    joules, basis = (
        subject.meter.per_token(subject.tokens, subject.asked.power_w) if subject.tokens else (None, None)
    )
    return {"energy_j_per_token": joules, "energy_basis": basis}


def is_of(basis: str | None, power_w: float) -> bool:
    """Whether joules of this basis are what a device of `power_w` watts takes: measured ones, or estimated from it."""
    return basis is not None and (basis == RAPL_BASIS or basis.startswith(f"estimated: {power_w:.3g} W "))


@contextmanager
def metered(root: Path = POWERCAP) -> Iterator[Meter]:
    """Measure a block: `with metered() as meter: ...`, then `meter.joules` and `meter.seconds`."""
    meter = Meter(started=_read(rapl_domains(root)))
    begun = time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = time.perf_counter() - begun
        ended = _read(list(meter.started))
        if ended and ended.keys() == meter.started.keys():
            meter.joules = (
                sum(_spent_uj(domain, meter.started[domain], ended[domain]) for domain in ended) / 1e6
            )


def rapl_domains(root: Path = POWERCAP) -> list[Path]:
    """Folders of processor packages. Their parts (cores, graphics) are within them and not counted again."""
    return sorted(
        folder
        for folder in root.glob("intel-rapl:*")
        if folder.name.count(":") == 1 and _text(folder / "name").startswith("package")
    )


def _read(domains: list[Path]) -> dict[Path, int]:
    """Microjoules of each domain whose counter can be read."""
    texts = {domain: _text(domain / "energy_uj") for domain in domains}
    return {domain: int(text) for domain, text in texts.items() if text.isdigit()}


def _spent_uj(domain: Path, before: int, after: int) -> int:
    """Microjoules between two readings; a smaller second one has wrapped around, once."""
    if after >= before:
        return after - before
    return after - before + int(_text(domain / "max_energy_range_uj"))


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
