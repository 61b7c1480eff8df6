"""Magnitudes and outliers of activations, by channel."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from edgelab.plots.style import FAMILY_COLOURS, NothingToDraw, new_chart, style_axes

OUTLIERS = "#D55E00"  # what stands out, beside the blue of quantization
NAMED = 3  # channels that get their number


def activation_outliers(
    before: np.ndarray, after: np.ndarray, steps: tuple[float, float], title: str = ""
) -> Figure:
    """Largest magnitude of each input channel of a layer before and after smoothing, on one logarithmic axis.

    before, after: (in_features,), as from `channel_peaks`. steps: of the int8 grid of the whole tensor before and
    after, `ActivationGrid.scale`. A dashed line is the median channel; a channel below half a step is rounded to
    nothing but zeros: the shaded part.
    Raises NothingToDraw where the two are empty or of different length.
    """
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape or before.ndim != 1 or not before.any() or not after.any():
        raise NothingToDraw(
            "An outlier plot takes two rows of as many channels, not all zero; these are "
            f"{before.shape} and {after.shape}."
        )
    channels = np.arange(len(before))
    figure = new_chart(8.5, 5.2)
    panels = figure.subplots(2, 1, sharex=True)
    parts = (before, OUTLIERS, "before smoothing"), (after, FAMILY_COLOURS["quantize"], "after smoothing")
    for axes, (peaks, colour, when), step in zip(panels, parts, steps, strict=True):
        half_step = step / 2
        floor = min(peaks[peaks > 0].min(), half_step) / 1.6
        axes.set_yscale("log")
        axes.axhspan(floor, half_step, color="#eeeeee", zorder=0)
        axes.vlines(channels, floor, np.maximum(peaks, floor), color=colour, linewidth=0.8, zorder=2)
        axes.axhline(np.median(peaks), color="black", linestyle="--", linewidth=0.9, zorder=3)
        axes.set_ylim(floor, peaks.max() * 2.6)
        axes.set_xlim(-1, len(peaks))
        ratio = peaks.max() / max(np.median(peaks), floor)
        lost = int((peaks < half_step).sum())
        for channel in np.argsort(peaks)[-NAMED:]:
            axes.annotate(
                str(channel),
                (channel, peaks[channel]),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_ylabel("Largest |x|", fontsize=9.5)
        legend = [
            Line2D([], [], color=colour, linewidth=1.6, label=f"channel, {when}"),
            Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="median channel"),
            Line2D([], [], color="#dddddd", linewidth=6, label="below half an int8 step"),
        ]
        heading = (
            f"{when.capitalize()}: largest channel {ratio:,.0f} x the median, {lost} of {len(peaks)} lost"
        )
        style_axes(axes, f"{title}\n{heading}" if title and axes is panels[0] else heading, legend)
        axes.grid(visible=False)
    panels[1].set_xlabel("Input channel", fontsize=9.5)
    return figure


def channel_magnitudes(magnitudes: np.ndarray, share: float, title: str = "") -> Figure:
    """Mean magnitude of each input channel of a layer, the largest first; the first `share` of them stand out.

    magnitudes: (in_features,), mean |x| over tokens. Raises NothingToDraw where there are none, or all are zero.
    """
    ordered = np.sort(np.asarray(magnitudes, dtype=float).ravel())[::-1]
    if not ordered.any():
        raise NothingToDraw("Channels are drawn by their magnitudes, which are missing or all zero.")
    count = max(1, round(share * len(ordered)))
    figure = new_chart(8.5, 3.4)
    axes = figure.subplots()
    axes.set_yscale("log")
    floor = ordered[ordered > 0][-1] / 1.6
    tints = [OUTLIERS] * count + [FAMILY_COLOURS["quantize"]] * (len(ordered) - count)
    axes.vlines(np.arange(len(ordered)), floor, np.maximum(ordered, floor), color=tints, linewidth=1.1)
    axes.axhline(np.median(ordered), color="black", linestyle="--", linewidth=0.9)
    axes.set_xlim(-3, len(ordered))
    axes.set_ylim(floor, ordered[0] * 1.6)
    axes.set_xlabel("Input channels, the largest first", fontsize=9.5)
    axes.set_ylabel("Mean |x|", fontsize=9.5)
    legend = [
        Line2D([], [], color=OUTLIERS, linewidth=2, label=f"the largest {count} of {len(ordered)}"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="median channel"),
    ]
    ratio = f"the largest channel is {ordered[0] / max(np.median(ordered), floor):,.0f} times the median"
    style_axes(axes, f"{title}: {ratio}" if title else ratio.capitalize(), legend)
    axes.grid(visible=False)
    return figure
