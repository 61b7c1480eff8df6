"""What a student of few means makes of a teacher's next-token distribution, and how fast students learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from edgelab.plots.labels import Mark, label_marks
from edgelab.plots.methods import METHOD_COLOURS
from edgelab.plots.style import GREY, Chart, NothingToDraw, new_chart, stamp, style_axes

REST = 0.01  # of its probability a student leaves to the tokens that it does not choose
MOST = 10_000  # tokens of the widest student that is looked at
NAMES = {"kl": "KL(teacher ‖ student)", "reverse_kl": "KL(student ‖ teacher)"}


def even_students(teacher: np.ndarray, sizes: Sequence[int], rest: float = REST) -> pd.DataFrame:
    """Both KL divergences, in nats, of students that spread evenly over the teacher's likeliest tokens.

    teacher: probabilities (vocabulary,). sizes: how many tokens each student chooses, fewer than there are; it leaves
    the share `rest` to all others, evenly. Columns kl and reverse_kl, a row for each size.
    """
    p = np.sort(np.asarray(teacher, dtype=np.float64))[::-1]
    p = np.maximum(p, np.finfo(np.float64).tiny)
    log_p, found = np.log(p), pd.DataFrame(index=pd.Index(sizes, name="tokens"))
    for size in sizes:
        chosen, others = (1 - rest) / size, rest / (len(p) - size)
        q = np.where(np.arange(len(p)) < size, chosen, others)
        found.loc[size, "kl"] = (p * (log_p - np.log(q))).sum()
        found.loc[size, "reverse_kl"] = (q * (np.log(q) - log_p)).sum()
    return found


def sizes_of(vocabulary: int) -> np.ndarray:
    """The numbers of tokens of the students that are looked at, evenly in their logarithm."""
    return np.unique(np.geomspace(1, min(MOST, vocabulary - 1), 80).astype(int))


def covering_and_seeking(teacher: np.ndarray, tokens: Sequence[str]) -> Chart:
    """The students that spread evenly over the teacher's likeliest tokens, and which of them each KL prefers.

    teacher: probabilities (vocabulary,). tokens: the texts of the likeliest, likeliest first.
    Raises NothingToDraw for a vocabulary of fewer than two tokens.
    """
    if len(teacher) < 2:
        raise NothingToDraw("a distribution of one token has nothing to cover")
    divergence = even_students(teacher, sizes_of(len(teacher)))
    best = {name: int(divergence[name].idxmin()) for name in NAMES}
    figure = new_chart(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    p, places = np.sort(teacher)[::-1][: len(tokens)], np.arange(len(tokens))
    left.barh(places, p, color="#d9d9d9", height=0.8, zorder=2)
    for colour, name in zip(METHOD_COLOURS, NAMES, strict=False):
        q = np.where(places < best[name], (1 - REST) / best[name], REST / (len(teacher) - best[name]))
        left.plot(q, places, "o", color=colour, markersize=5, zorder=3)
        right.plot(divergence.index, divergence[name], color=colour, linewidth=2, label=NAMES[name])
        right.plot(best[name], divergence[name].min(), "o", color=colour, markersize=8)
    left.set_yticks(places, [repr(token)[1:-1] for token in tokens], fontsize=8)
    left.set_ylim(len(tokens) - 0.4, -0.6)
    left.set_xlabel("Probability of the next token")
    style_axes(left, "The teacher (bars) and both students (dots)")
    right.set_xscale("log")
    right.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_xlabel("Tokens over which the student spreads")
    right.set_ylabel("Divergence (nats), lower is better")
    title = f"One KL prefers {best['kl']:,} tokens, the other {best['reverse_kl']:,}"
    style_axes(right, title, right.get_lines()[::2], columns=2)
    right.axhline(0, color=GREY, linewidth=0.6)
    return stamp(figure)


def learned_over_seconds(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Chart:
    """Cross-entropy on held-out text over the seconds of training, a line for each student.

    curves: by name, as `variant.json` keeps them, of runs that look at held-out text (validate=10). What a student was
    trained on, a teacher or the text, they are all judged by the text. Raises NothingToDraw where none of them looks.
    """
    looks = {
        name: [(point["seconds"], point.get("validation_nll", point["validation_loss"])) for point in curve
               if "validation_loss" in point]
        for name, curve in curves.items()
    }  # fmt: skip
    looks = {name: points for name, points in looks.items() if points}
    if not looks:
        raise NothingToDraw("no run has looked at held-out text: train with validate=10")
    figure = new_chart(8.5, 4.2)
    axes = figure.subplots()
    marks, lines = [], []
    for tint, (name, points) in zip(METHOD_COLOURS, looks.items(), strict=False):
        seconds, nll = zip(*points, strict=True)
        axes.plot(seconds, nll, "o-", color=tint, linewidth=2, markersize=5)
        marks.append(Mark(seconds[-1], nll[-1], name, tint))
        lines.append(np.column_stack([seconds, nll]))
    axes.set_xlim(left=0)
    axes.margins(0.1)
    axes.set_xlabel("Seconds of training, those of the teacher included")
    axes.set_ylabel("Held-out NLL (nats per token), lower is better")
    style_axes(axes, "What students have learned after the same time")
    label_marks(axes, marks, lines)
    return stamp(figure)
