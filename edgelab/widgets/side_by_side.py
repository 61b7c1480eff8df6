"""The budget slider: how much memory there is, and the best recipe that stays within it."""

import html

import ipywidgets
import pandas as pd

from edgelab.plots import tradeoff
from edgelab.rows import comparable, find_metric, recommend
from edgelab.widgets import WIDE, Picture

BUDGETS = ("weights_mb", "peak_rss_mb")
QUALITIES = ("ppl", "last_word", "story_cloze")


def budget_slider(rows: pd.DataFrame, budget_mb: float = 200) -> ipywidgets.VBox:
    """Turn the budget in MB, of weights or of the whole process; the best recipe within it answers at once.

    What is best depends on the measure: perplexity, or a task where the rows have one.

    rows: a frame of the ledger. Only rows of one protocol, text and number of tokens have an order in perplexity:
    the most frequent ones count. Raises NotMeasured where no row has perplexity and size.
    """
    rows = comparable(rows)
    largest = rows[list(BUDGETS)].max().max()
    budget = ipywidgets.IntSlider(
        min=20,
        max=int(largest * 1.1),
        value=int(budget_mb),
        step=5,
        description="Budget (MB)",
        **WIDE,
    )
    of, by = (
        ipywidgets.ToggleButtons(
            options=[(find_metric(name).label, name) for name in names if rows[name].notna().any()],
            style={"button_width": "240px"},
        )
        for names in (BUDGETS, QUALITIES)
    )
    answer, image = ipywidgets.HTML(), Picture(800)

    def redraw(change: dict | None = None) -> None:
        best, sentence = recommend(rows, budget.value, of.value, by.value)
        answer.value = html.escape(sentence)
        figure = tradeoff(rows, of.value, by.value, None if best is None else best["recipe"])
        axes = figure.axes[0]
        axes.set_xlim(axes.get_xlim())  # the beam below must not widen the picture
        axes.axvspan(budget.value, 10 * largest, color="#000000", alpha=0.07, linewidth=0, zorder=0)
        axes.axvline(budget.value, color="#000000", linewidth=1.2, zorder=1)
        image.draw(figure)

    for control in (budget, of, by):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([of, by, budget, answer, image])
