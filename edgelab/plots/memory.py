"""What a model needs in memory, beside the memory of devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from edgelab.devices import Device, MemoryNeed
from edgelab.plots.style import BASELINE_LINE, GREY, new_chart, stamp, style_axes

NEED_PARTS = {  # field of a MemoryNeed: words, colour of the same palette
    "weights_gb": ("weights", "#0072B2"),
    "kv_cache_gb": ("KV cache", "#56B4E9"),
    "gradients_gb": ("gradients", "#E69F00"),
    "optimizer_gb": ("optimizer", "#CC79A7"),
    "activations_gb": ("activations", "#009E73"),
}
TIGHT = 0.1  # a device that has less than this share of the room for a model left is called tight


def memory_bars(
    needs: Mapping[str, MemoryNeed],
    devices: Iterable[Device],
    chosen: str | None = None,
    title: str = "Memory needed",
) -> Figure:
    """Needs by what fills them above the memory of devices; a line carries the `chosen` need down to those.

    `chosen` is a key of `needs`, by default the first. The coloured part of a device's bar is what it leaves to a
    model. Devices without a memory figure are left out. Where the axis is too short for a bar, its label ends in an
    arrow.
    """
    chosen = chosen or next(iter(needs))
    need = needs[chosen]
    known = sorted((device for device in devices if device.memory_gb), key=lambda device: device.room_gb)
    longest = max(need.total_gb, *(device.memory_gb for device in known))
    limit = min(1.32 * longest, 4 * max(each.total_gb for each in needs.values()))

    figure = new_chart(8.5, 2.0 + 0.27 * (len(needs) + len(known)))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[len(needs) + 0.4, len(known) + 0.4])
    parts = {
        field: look
        for field, look in NEED_PARTS.items()
        if any(getattr(each, field) for each in needs.values())
    }
    tints = [tint for _, tint in parts.values()]
    for position, (name, each) in enumerate(needs.items()):
        widths = [getattr(each, field) for field in parts]
        starts = np.cumsum([0, *widths[:-1]])
        alpha, weight = (1, "bold") if name == chosen else (0.35, "normal")
        upper.barh(position, widths, left=starts, height=0.66, color=tints, alpha=alpha, linewidth=0)
        _label_bar(upper, position, each.total_gb, limit, gigabytes(each.total_gb), fontweight=weight)
    for position, device in enumerate(known):
        left = device.room_gb - need.total_gb
        if not device.holds(need):
            verdict, tint, text = f"{gigabytes(-left)} too small", "#D9D9D9", GREY
        elif left < TIGHT * device.room_gb:
            verdict, tint, text = f"tight, {gigabytes(left)} left", "#8FD3BC", "#00664B"
        else:
            verdict, tint, text = f"fits, {gigabytes(left)} left", "#009E73", "#00664B"
        lower.barh(position, device.memory_gb, height=0.66, color="#F0F0F0", linewidth=0)
        lower.barh(position, device.room_gb, height=0.66, color=tint, linewidth=0)
        _label_bar(lower, position, max(device.memory_gb, need.total_gb), limit, verdict, color=text)

    upper.set_yticks(range(len(needs)), list(needs), parse_math=False)
    upper.invert_yaxis()
    lower.set_yticks(
        range(len(known)), [f"{each.name}, {each.memory_gb:g} GB" for each in known], parse_math=False
    )
    for axes, marked in ((upper, chosen), (lower, "This machine")):
        axes.axvline(need.total_gb, **BASELINE_LINE | {"zorder": 3})
        axes.set_xlim(0, limit)
        for tick in axes.get_yticklabels():
            tick.set_fontweight("bold" if tick.get_text().startswith(marked) else "normal")
    legend = [Patch(facecolor=tint, label=words) for words, tint in parts.values()]
    style_axes(upper, f"{title} (analytic: computed from shapes)", legend)
    style_axes(lower, f"Devices: the {gigabytes(need.total_gb)} of {chosen} have to fit the coloured part")
    for axes in (upper, lower):
        axes.grid(axis="y", visible=False)
    lower.set_xlabel("Memory (GB of 10⁹ bytes)", fontsize=9.5)
    return figure


def training_bars(parts: pd.DataFrame, title: str = "Training: memory at the peak") -> Figure:
    """What fills memory at the peak of a step of training, and the peak of a process that ran it.

    parts: a row for each way to train, by name; columns weights_gb, optimizer_gb and working_gb, which is gradients and
    activations, counted from shapes; and measured_gb, NaN where no process ran. GB of 10^9 bytes.
    """
    figure = new_chart(8.5, 1.5 + 0.55 * len(parts))
    axes = figure.subplots()
    looks = {name: NEED_PARTS[name] for name in ("weights_gb", "optimizer_gb")}
    looks["working_gb"] = ("gradients and activations", NEED_PARTS["activations_gb"][1])
    longest = max(parts[list(looks)].sum(axis=1).max(), parts["measured_gb"].max())
    for position, (_, row) in enumerate(parts.iterrows()):
        start = 0.0
        for name, (_, tint) in looks.items():
            axes.barh(position, row[name], left=start, height=0.6, color=tint, linewidth=0)
            start += row[name]
        text = gigabytes(start)
        if np.isfinite(row["measured_gb"]):
            axes.plot(row["measured_gb"], position, "D", color="black", markersize=6, zorder=4)
            text += f", measured {gigabytes(row['measured_gb'])}"
        axes.text(max(start, row["measured_gb"]) + 0.02 * longest, position, text, va="center", fontsize=8.5)
    axes.set_xlim(0, 1.45 * longest)
    axes.set_yticks(range(len(parts)), list(parts.index), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("GB of 10⁹ bytes", fontsize=9.5)
    handles = [Patch(color=tint, label=text) for text, tint in looks.values()]
    handles.append(Line2D([], [], linestyle="", marker="D", color="black", markersize=6, label="measured"))
    style_axes(axes, title, handles)
    return stamp(figure)


def _label_bar(axes: Axes, position: float, length: float, limit: float, text: str, **look: str) -> None:
    """Write `text` behind a bar of `length`, or inside where the axis, which ends at `limit`, has no room."""
    text += " →" if length > limit else ""
    inside = length > limit * (1 - 0.011 * len(text))
    written = axes.text(
        0.995 * limit if inside else length + 0.008 * limit, position, text,
        ha="right" if inside else "left", va="center", fontsize=8, zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if inside else None, **look,
    )  # fmt: skip
    written.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def gigabytes(value_gb: float) -> str:
    """The value with three meaningful digits: 0.210 GB, 3.37 GB, 13.5 GB, 1,112 GB."""
    digits = 3 if value_gb < 1 else 2 if value_gb < 10 else 1 if value_gb < 100 else 0
    return f"{value_gb:,.{digits}f} GB"
