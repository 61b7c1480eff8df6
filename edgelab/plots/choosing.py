"""Which of many rows a picture draws and names, so that its message can be read at a glance."""

from __future__ import annotations

import numpy as np
import pandas as pd

from edgelab.plots.style import inner, label
from edgelab.rows import BASELINE, find_metric

FAR = 3.0  # times the next value, behind which a few rows would stretch the axis
FEW = 0.2  # of the rows, at most, are left off an axis
NARROW = 1.8  # the baseline's bytes over the next: above it, nothing is drawn out there
MOST_LABELS = 12


def far_off(values: pd.Series) -> pd.Series:
    """Which of `values`, lower being better, lie behind a gap of more than FAR times; at most a FEW of them.

    A model at perplexity 400 beside models at 20 to 70 would take most of an axis and say nothing.
    """
    ordered = values.sort_values(ascending=False)
    beyond = np.arange(1, int(FEW * len(ordered)) + 1)  # how many lie behind each gap
    high, low = ordered.to_numpy(float)[beyond - 1], ordered.to_numpy(float)[beyond]
    gaps = beyond[(low > 0) & (high > FAR * low)]
    return values.index.isin(ordered.index[: gaps.max(initial=0)])


def within_sense(drawn: pd.DataFrame, x: str, y: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows that a picture of the fields `x` and `y` shows, and sentences that name those it does not.

    Left out are rows far off, rows as large as the baseline where all others are much smaller (the line of the
    baseline shows where it is), and the project's rows of an engine whose integers PyTorch has too, unless speed is
    asked for. A row with `ring` is always drawn.
    """
    notes = []
    metrics = {name: find_metric(name) for name in (x, y)}
    if not any(about.within == "machine" for about in metrics.values()):
        on_torch = set(drawn.loc[drawn["runtime"] == "torch", "recipe"])
        twin = drawn["recipe"].str.partition(" @ ")[0].isin(on_torch) & (drawn["runtime"] != "torch")
        drawn = drawn[~twin | drawn["reader"] | drawn["ring"]]
    for name, about in metrics.items():
        if about.better == "lower" and about.within in ("protocol", "text"):
            away = far_off(drawn[name]) & ~drawn["ring"]
            if away.any():
                notes.append(f"Far off, not drawn: {_named(drawn[away], name)}.")
            drawn = drawn[~away]
    if metrics[x].group == "size":
        baseline = drawn.loc[drawn["recipe"] == BASELINE, x]
        large = (drawn[x] > 0.99 * baseline.min()) & ~drawn["ring"]
        rest = drawn.loc[~large, x]
        if not baseline.empty and len(rest) and baseline.min() > NARROW * rest.max():
            others = drawn[large & (drawn["recipe"] != BASELINE)]
            if not others.empty:
                notes.append(f"As large as the baseline, not drawn: {_named(others, y)}.")
            drawn = drawn[~large]
    return drawn, notes


def named(drawn: pd.DataFrame) -> pd.Series:
    """Which rows get a label: all of a few; of many the ring, then the front, then the reader's, a dozen at most."""
    if len(drawn) <= MOST_LABELS:
        return pd.Series(True, drawn.index)
    order = drawn.sort_values(["ring", "front", "reader"], ascending=False, kind="stable")
    chosen = order[order["ring"] | order["front"] | order["reader"]].index[:MOST_LABELS]
    return pd.Series(drawn.index.isin(chosen), drawn.index)


def _named(rows: pd.DataFrame, name: str) -> str:
    about = find_metric(name)
    rows = rows.drop_duplicates("recipe").sort_values(name)
    texts = [f"{label(row['recipe'])} ({row[name]:{about.form or ',.3g'}})" for _, row in rows.iterrows()]
    return f"{inner(about.label)} of " + ", ".join(texts)
