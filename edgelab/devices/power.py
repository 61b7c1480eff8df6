"""Energy from power and time, and what it means for a battery."""

from __future__ import annotations

from edgelab.errors import EdgeLabError

JOULES_PER_WH = 3600


class PowerError(EdgeLabError):
    """A power, a time or a battery that is not positive."""


def estimated_j(power_w: float, seconds: float) -> tuple[float, str]:
    """Joules of `seconds` at `power_w`, and the basis in words: "estimated: 15 W x 10.3 ms"."""
    _positive(power_w=power_w, seconds=seconds)
    return power_w * seconds, f"estimated: {power_w:.3g} W x {1e3 * seconds:.3g} ms"


def tokens_per_charge(j_per_token: float, battery_wh: float) -> float:
    """Tokens that a full battery pays for, if nothing else draws from it."""
    _positive(j_per_token=j_per_token, battery_wh=battery_wh)
    return battery_wh * JOULES_PER_WH / j_per_token


def battery_percent(j_per_token: float, battery_wh: float, tokens: int = 1000) -> float:
    """Percent of a full battery that `tokens` take."""
    return 100 * tokens / tokens_per_charge(j_per_token, battery_wh)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise PowerError(f"{name} is {value:g}, but must be larger than 0.")
