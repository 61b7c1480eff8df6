"""Recipes to explore: method, bits, groups and embedding, over saved rows and one measured live."""

import ipywidgets
import pandas as pd

from edgelab import ledger, rows
from edgelab.ledger import Row
from edgelab.plots import NothingToDraw, label, method_lines, tradeoff
from edgelab.widgets import BITS, GROUP_SIZES, WIDE, Picture, group_words
from edgelab.widgets.live import Live

BROKEN_PPL = 1000  # a row above is drawn only where it is the chosen one: it presses all others into a line
FIRST = "quantize.rtn"
OVER = [("stored MB, all recipes", "weights_mb"), ("bits, by method", "bits")]


def explorer(
    saved: pd.DataFrame | None = None, windows: int = 4, over: str = "weights_mb"
) -> ipywidgets.VBox:
    """Choose method, bits, group size and embedding, see the point among the rows of the ledger, or measure it live.

    saved: as `ledger.frame()`, which is the default: the project's rows and the reader's own. Its methods can be
    chosen. Perplexity compares on the same text only, so all rows are cut to their first `windows` windows of `wiki`;
    shorter rows are left out. over: what the picture has along x, "weights_mb" or "bits".
    """
    saved = ledger.frame() if saved is None else saved
    methods = sorted({FIRST, *rows.by_method(saved)["method"]})
    method = ipywidgets.Dropdown(options=methods, value=FIRST, description="Method", **WIDE)
    bits = ipywidgets.Dropdown(options=BITS, value=4, description="Bits", **WIDE)
    sizes = [(group_words(size), size) for size in GROUP_SIZES]
    group_size = ipywidgets.Dropdown(options=sizes, value=64, description="Group size", **WIDE)
    widths = [("32 bits, as it is", 0), *((f"{width} bits", width) for width in BITS)]
    embedding = ipywidgets.Dropdown(options=widths, description="Embedding", **WIDE)
    x = ipywidgets.ToggleButtons(options=OVER, value=over, description="Over", **WIDE)
    answer, image = ipywidgets.HTML(), Picture()
    measured = []  # rows of this widget

    def chosen() -> str:
        return recipe_of(method.value, bits.value, group_size.value, embedding.value)

    def redraw(change: dict | None = None) -> None:
        recipe = chosen()
        known = [part for part in (saved, ledger.frame(measured)) if len(part)] or [saved]
        frame = rows.first_windows(pd.concat(known, ignore_index=True), windows)
        found = frame[frame["recipe"] == recipe]
        answer.value = (
            point_sentence(found.iloc[-1]) if len(found) else f"{recipe} has not been measured yet."
        )
        try:
            shown = frame[(frame["ppl"] < BROKEN_PPL) | (frame["recipe"] == recipe)]
            if x.value == "bits":
                baseline = frame.loc[frame["recipe"] == rows.BASELINE, "ppl"].tail(1)
                level = baseline.item() if len(baseline) else None
                figure = method_lines(rows.by_method(shown), level, recipe)
            else:
                figure = tradeoff(shown, highlight=recipe if len(found) else None)
            image.draw(figure)
        except NothingToDraw:
            answer.value += " Nor has anything else; the button measures it and the baseline."

    controls = (method, bits, group_size, embedding, x)

    def add(new: list[Row]) -> None:
        measured.extend(new)
        redraw()

    live = Live(lambda: [rows.BASELINE, chosen()], add, controls, only="quality", windows=windows)
    for control in controls:
        control.observe(redraw, "value")
    for control in controls[:-1]:
        control.observe(lambda change: live.offer(), "value")
    redraw()
    live.offer()
    return ipywidgets.VBox([*controls, live.box, answer, image])


def recipe_of(method: str, bits: int, group_size: int, embedding_bits: int = 0) -> str:
    """The canonical text of a method with these settings, and of the embedding where it is rounded as well."""
    text = f"{method}:bits={bits},group_size={group_size}"
    return f"{text} + quantize.embedding:bits={embedding_bits}" if embedding_bits else text


def point_sentence(row: pd.Series) -> str:
    """HTML: quality, size and badge of a measured row. The perplexity is in `data-ppl`, too."""
    words = f"{row['last_word']:.1%} of last words right, " if pd.notna(row["last_word"]) else ""
    return (
        f'<span class="edgelab-point" data-ppl="{row["ppl"]:.6f}"><b>{label(row["recipe"])}</b>: perplexity '
        f"<b>{row['ppl']:,.2f}</b> on {len(row['window_nll'])} windows, {words}{row['weights_mb']:,.1f} MB, "
        f"{row['bits_per_weight']:.2f} bits per weight ({row['badge']}).</span>"
    )
