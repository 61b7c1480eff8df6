"""The budget slider: how much memory there is, and the best recipe that stays within it."""

import ipywidgets
import pandas as pd

from edgelab.plot_style import PROTOCOL
from edgelab.plots import METRICS, NothingToDraw, tradeoff
from edgelab.widgets import figure_png

BUDGETS = ("weights_mb", "peak_rss_mb")


def budget_slider(rows: pd.DataFrame, budget_mb: float = 200) -> ipywidgets.VBox:
    """Turn the budget in MB, of weights or of the whole process; the best recipe within it answers at once.

    rows: a frame of the ledger. Only rows of one protocol, text and number of tokens have an order in perplexity:
    the most frequent ones count. Raises NothingToDraw where no row has perplexity and size.
    """
    rows = comparable(rows)
    largest = rows[list(BUDGETS)].max().max()
    budget = ipywidgets.IntSlider(
        min=20,
        max=int(largest * 1.1),
        value=int(budget_mb),
        step=5,
        description="Budget (MB)",
        layout=ipywidgets.Layout(width="auto", max_width="560px"),
        style={"description_width": "90px"},
    )
    measured = [name for name in BUDGETS if rows[name].notna().any()]
    of = ipywidgets.ToggleButtons(
        options=[(METRICS[name].label, name) for name in measured], style={"button_width": "240px"}
    )
    answer = ipywidgets.HTML()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", width="800px"))

    def redraw(change: dict | None = None) -> None:
        best = best_within(rows, budget.value, of.value)
        answer.value = budget_sentence(rows, best, budget.value, of.value)
        figure = tradeoff(rows, x=of.value, y="ppl", highlight=None if best is None else best["recipe"])
        axes = figure.axes[0]
        axes.set_xlim(axes.get_xlim())  # the beam below must not widen the picture
        axes.axvspan(budget.value, 10 * largest, color="#000000", alpha=0.07, linewidth=0, zorder=0)
        axes.axvline(budget.value, color="#000000", linewidth=1.2, zorder=1)
        picture.value = figure_png(figure)

    for control in (budget, of):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([of, budget, answer, picture])


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """The successful rows of one model, protocol, text and number of tokens: those for which most recipes have a speed.

    Rows of quality alone, as notebooks leave many on a few windows, decide only where that is a tie.
    Raises NothingToDraw where no row has perplexity and size.
    """
    rows = rows[(rows["status"] == "ok") & rows["ppl"].notna() & rows["weights_mb"].notna()]
    if rows.empty:
        raise NothingToDraw('no row has ppl and weights_mb: measure first, for instance el.measure("none")')
    timed = rows["recipe"].where(rows["decode_tok_s"].notna())
    sets = rows.assign(timed=timed).groupby(PROTOCOL, dropna=False)[["timed", "recipe"]].nunique()
    chosen = sets.sort_values(["timed", "recipe"], kind="stable").index[-1]
    return rows[(rows[PROTOCOL] == list(chosen)).all(axis=1)]


def best_within(rows: pd.DataFrame, budget_mb: float, of: str = "weights_mb") -> pd.Series | None:
    """The row with the lowest perplexity whose `of` is at most `budget_mb`; None where none is.

    Simulated rows keep dense floats in memory whatever they store, so that they are never within a budget.
    """
    within = rows[(rows[of] <= budget_mb) & (rows["badge"] != "simulated")]
    return None if within.empty else within.loc[within["ppl"].idxmin()]


def budget_sentence(rows: pd.DataFrame, best: pd.Series | None, budget_mb: float, of: str) -> str:
    """HTML: the best recipe within the budget, what it costs, and what the next better one would need."""
    known = rows[rows[of].notna() & (rows["badge"] != "simulated")]
    if best is None:
        small = known.loc[known[of].idxmin()]
        return (
            f"Nothing measured fits <b>{budget_mb:,.0f} MB</b>; the smallest is "
            f"<code>{small['recipe']}</code> with {small[of]:,.1f} MB."
        )
    text = (
        f"Within <b>{budget_mb:,.0f} MB</b>: <code>{best['recipe']}</code>, <b>perplexity {best['ppl']:.2f}</b>, "
        f"{best[of]:,.1f} MB."
    )
    better = known[known["ppl"] < best["ppl"]]
    if better.empty:
        return f"{text} Nothing measured has a lower perplexity."
    following = better.loc[better[of].idxmin()]
    return (
        f"{text} The next better one needs {following[of]:,.1f} MB "
        f"(<code>{following['recipe']}</code>, perplexity {following['ppl']:.2f})."
    )
