"""Methods of quantization to compare: bits, group size and method, over saved rows and one measured live."""

import dataclasses
import html

import ipywidgets
import pandas as pd

from edgelab import ledger
from edgelab.errors import EdgeLabError
from edgelab.lab import measure
from edgelab.plots import NothingToDraw, method_lines
from edgelab.recipes import TECHNIQUES, RecipeError, parse
from edgelab.widgets import figure_png
from edgelab.widgets.quantization import (
    BITS,
    BROKEN_PPL,
    GROUP_SIZES,
    WIDE,
    point_sentence,
    same_windows,
)


def methods() -> list[str]:
    """Techniques of quantization that have bits and group_size, by name; those of weights, not of the cache."""
    wanted = {"bits", "group_size"}
    return [
        name
        for name, kind in TECHNIQUES.items()
        if name.startswith("quantize.")
        and name != "quantize.kv"
        and wanted <= {field.name for field in dataclasses.fields(kind)}
    ]


def method_explorer(rows: pd.DataFrame | None = None, windows: int = 4) -> ipywidgets.VBox:
    """Choose method, bits and group size, see the point among the rows of the ledger, or measure it live.

    rows: as `ledger.frame()`, which is the default: the project's rows and the reader's own. Perplexity compares on
    the same text only, so all rows are cut to their first `windows` windows of `wiki`; shorter rows are left out.
    """
    method = ipywidgets.Dropdown(options=methods(), value="quantize.rtn", description="Method", **WIDE)
    bits = ipywidgets.Dropdown(options=BITS, value=4, description="Bits", **WIDE)
    sizes = [(f"groups of {size}" if size else "one group per row", size) for size in GROUP_SIZES]
    group_size = ipywidgets.Dropdown(options=sizes, value=64, description="Group size", **WIDE)
    button = ipywidgets.Button(description="Measure live", button_style="primary")
    answer = ipywidgets.HTML()
    picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", width="850px"))
    measured = []  # rows of this widget

    def redraw(change: dict | None = None) -> None:
        try:
            recipe = recipe_of(method.value, bits.value, group_size.value)
        except RecipeError as error:
            answer.value, button.disabled = html.escape(str(error)), True
            return
        button.disabled = False
        known = [ledger.frame() if rows is None else rows, ledger.frame(measured)]
        frame = same_windows(pd.concat([part for part in known if len(part)] or known[:1]), windows)
        found = frame[frame["recipe"] == recipe]
        answer.value = (
            point_sentence(found.iloc[-1]) if len(found) else f"{recipe} has not been measured yet."
        )
        baseline = frame.loc[frame["recipe"] == "none", "ppl"].tail(1)
        try:
            points = by_method(frame)
            shown = points[(points["ppl"] < BROKEN_PPL) | (points["recipe"] == recipe)]
            level = baseline.item() if len(baseline) else None
            picture.value = figure_png(method_lines(shown, level, recipe))
        except NothingToDraw:
            answer.value += " Nor has anything else; the button measures it and the baseline."

    def measure_live(_: ipywidgets.Button) -> None:
        controls = (method, bits, group_size, button)
        recipe = recipe_of(method.value, bits.value, group_size.value)
        for control in controls:
            control.disabled = True
        try:
            for step in ("none", recipe):
                answer.value = f"Measuring <b>{step}</b> on {windows} windows; calibration may take minutes …"
                measured.append(measure(step, only="quality", windows=windows))
            redraw()
        except EdgeLabError as error:
            answer.value = html.escape(str(error))
        finally:
            for control in controls:
                control.disabled = False

    for control in (method, bits, group_size):
        control.observe(redraw, "value")
    button.on_click(measure_live)
    redraw()
    return ipywidgets.VBox([method, bits, group_size, button, answer, picture])


def recipe_of(method: str, bits: float, group_size: int) -> str:
    """The canonical recipe of a method with these settings. Raises RecipeError where the method refuses them."""
    return str(parse(f"{method}:bits={bits},group_size={group_size}"))


def by_method(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one method with bits and group_size and all else at its default: with columns method, bits, group_size.

    Of several rows of a recipe the last counts.
    """
    known = methods()
    points = []
    for _, row in rows.drop_duplicates("recipe", keep="last").iterrows():
        try:
            techniques = parse(row["recipe"]).techniques
        except RecipeError:  # a technique that this version does not have
            continue
        if len(techniques) == 1 and techniques[0].method in known:
            one = techniques[0]
            if recipe_of(one.method, one.bits, one.group_size) == row["recipe"]:
                points.append(
                    row.to_dict() | {"method": one.method, "bits": one.bits, "group_size": one.group_size}
                )
    return pd.DataFrame(points, columns=[*rows.columns, "method", "bits", "group_size"])
