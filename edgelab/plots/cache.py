"""How far a key-value cache of few bits reaches in the memory of devices."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from edgelab.plots.style import BASELINE_LINE, GREY, PALE, NothingToDraw, new_chart, style_axes

CACHE_COLOURS = ("#000000", "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7")


def context_reach(
    contexts: pd.DataFrame,
    trained: int = 0,
    title: str = "Longest context that fits, by the bits of the cache",
) -> Figure:
    """Tokens whose keys and values fit each device, a point for each kind of cache; analytic, computed from shapes.

    contexts: as `devices.context_table` makes it, memory_gb and a column of tokens for each kind. trained: a line at
    the context the model was trained on, none for 0. Raises NothingToDraw where no device has room for a token.
    """
    kinds = [name for name in contexts if name != "memory_gb"]
    tokens = contexts[kinds].astype(float).where(lambda count: count > 0)
    if tokens.isna().all(axis=None):
        raise NothingToDraw("no device holds the weights and one token: take fewer bits or a smaller model")
    figure = new_chart(8.5, 1.6 + 0.4 * len(contexts))
    axes = figure.subplots()
    axes.set_xscale("log")
    places = np.arange(len(contexts))
    axes.hlines(places, tokens.min(axis=1), tokens.max(axis=1), color=PALE, linewidth=1.2, zorder=1)
    named = places[tokens.notna().any(axis=1)][-1]
    for kind, tint in zip(kinds, CACHE_COLOURS, strict=False):
        axes.scatter(tokens[kind], places, s=46, color=tint, edgecolor="white", linewidth=0.6, zorder=3)
        above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        axes.annotate(
            kind.removesuffix(" cache"), (tokens[kind].iloc[named], named), color=tint, fontsize=8, **above
        )
    for place in places[tokens.isna().all(axis=1)]:
        left = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
        axes.annotate("does not hold the weights", (0.01, place), color=GREY, fontsize=8, **left)
    if trained:
        axes.axvline(trained, **BASELINE_LINE)
        left = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"trained on {trained:,}", (trained, len(contexts) - 0.55), fontsize=8, **left)
    names = [f"{name}, {memory_gb:g} GB" for name, memory_gb in contexts["memory_gb"].items()]
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(-0.6, len(contexts) - 0.2)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel("Tokens of one sequence (analytic: computed from shapes), higher is better", fontsize=9.5)
    style_axes(axes, title)
    axes.grid(axis="y", visible=False)
    return figure
