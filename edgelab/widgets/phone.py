"""Lines of llama-bench from the reader's own device: what they say of it, and what else would fit."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import ipywidgets
import pandas as pd

from edgelab.devices import (
    MIXTURES,
    BenchFit,
    Device,
    ModelShape,
    Spread,
    catalogue,
    fit_bench,
    models,
    read_bench,
    settings_of,
    what_fits,
)
from edgelab.devices.llama_bench import KINDS
from edgelab.errors import EdgeLabError
from edgelab.plots import NothingToDraw, bench_roofline, rates_that_fit
from edgelab.plots.devices import READING_TOK_S, seconds
from edgelab.widgets import WIDE, Picture

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
OTHER = "another device"
NO_ROOF = "<p>The roofline needs a test of prefill (pp), which gives its upper limit; run llama-bench with -p 512.</p>"


def phone_bench(
    text: str = "",
    room_gb: float = 4.0,
    device: str = "",
    shapes: Mapping[str, ModelShape] | None = None,
    kinds: Sequence[str] = KINDS,
) -> ipywidgets.VBox:
    """Paste what llama-bench printed; the sentence, the table and the pictures answer at once.

    device: the name of one in the catalogue (or of the reader's own), whose room for a model and peak bandwidth are
    then filled in; else room_gb is, without a peak, and both can be changed. Where a peak is given, a second picture
    has the lines under the roofline of the device. shapes default to the catalogue.
    """
    shapes = dict(shapes or models())
    places = {one.name: one for one in catalogue() if one.room_gb}
    pasted = ipywidgets.Textarea(
        value=text,
        description="llama-bench",
        placeholder="Paste here what llama-bench printed on your device",
        continuous_update=False,
        rows=8,
        style={"description_width": "90px"},
        layout={"width": "auto", "max_width": "850px"},
    )
    setting = ipywidgets.Dropdown(description="Ran on", options=[], **WIDE)
    place = ipywidgets.Dropdown(options=[OTHER, *places], value=device or OTHER, description="Device", **WIDE)
    room = ipywidgets.BoundedFloatText(
        value=room_gb, min=0.1, max=2000, step=0.1, description="Room (GB)", **WIDE
    )
    peak = ipywidgets.BoundedFloatText(value=0, min=0, max=20000, step=0.1, description="Peak (GB/s)", **WIDE)
    context = ipywidgets.SelectionSlider(options=CONTEXTS, value=2048, description="Context", **WIDE)
    offered = ipywidgets.SelectMultiple(
        options=list(MIXTURES), value=tuple(kinds), description="Kinds", rows=6, **WIDE
    )
    answer, rows, image, roof = ipywidgets.HTML(), ipywidgets.HTML(), Picture(), Picture()

    def fill(change: dict | None = None) -> None:
        chosen: Device | None = places.get(place.value)
        room.value = chosen.room_gb if chosen else room_gb
        peak.value = (chosen and chosen.memory_bandwidth_gb_s) or 0

    def settle(change: dict | None = None) -> None:
        try:
            found = settings_of(read_bench(pasted.value))
        except EdgeLabError:
            found = []
        if list(setting.options) != found:
            setting.options = found
            setting.value = found[0] if found else None
        redraw()

    def redraw(change: dict | None = None) -> None:
        rows.value = image.value = roof.value = ""
        try:
            fit = fit_bench(read_bench(pasted.value), setting.value or "")
            table = what_fits(fit, room.value, shapes, offered.value or kinds, context.value)
        except EdgeLabError as error:
            answer.value = html.escape(str(error))
            return
        answer.value = said(fit, peak.value)
        rows.value = as_table(table, context.value)
        try:
            image.draw(rates_that_fit(table, room.value))
        except NothingToDraw as error:
            rows.value += f"<p>{html.escape(str(error))}</p>"
        if peak.value and fit.compute_gflop_s:
            prefills = fit.points["test"].str.startswith("pp")
            roof.draw(bench_roofline(fit.points, peak.value, fit.points.loc[prefills, "gflop_s"].max()))
        elif peak.value:
            roof.value = NO_ROOF

    fill()
    place.observe(fill, "value")
    pasted.observe(settle, "value")
    for control in (setting, room, peak, context, offered):
        control.observe(redraw, "value")
    settle()
    return ipywidgets.VBox([pasted, setting, place, room, peak, context, offered, answer, rows, image, roof])


def said(fit: BenchFit, peak_gb_s: float = 0.0) -> str:
    """HTML: what the lines say of the device, in a few sentences."""
    read = fit.read_gb_s
    text = f"<b>{html.escape(fit.setting)}</b>: decoding reads {_range(read, 'GB/s')}"
    if peak_gb_s:
        text += f", {read.value / peak_gb_s:.0%} of the {peak_gb_s:g} GB/s of its memory"
    text += "."
    if fit.compute_gflop_s:
        text += f" Prefill computes {_range(fit.compute_gflop_s, 'GFLOP/s')}."
    else:
        text += " No line of pp: how long the first token takes is not known."
    kinds = {one.kind: fit.read_of(one.kind) for one in fit.lines if one.work == "decode" and one.kind}
    if len(kinds) > 1:
        each = ", ".join(f"{kind} {spread.value:.3g}" for kind, spread in kinds.items())
        text += (
            f" By kind of file, in GB/s: {each}; a kind is predicted by its own lines where there are any."
        )
    if unknown := [one.model for one in fit.lines if one.shape is None]:
        names = ", ".join(html.escape(name) for name in dict.fromkeys(unknown))
        text += f" {names}: not in the catalogue, so that its size stands for the bytes of a token."
    return text


def as_table(table: pd.DataFrame, context: int = 0) -> str:
    """HTML: a row for each model, a column for each kind, with the rate or the reason why there is none.

    context: of the rates; a model that was made for fewer tokens says so.
    """
    head = "".join(f"<th>{html.escape(kind)}</th>" for kind in table["kind"].unique())
    body = ""
    for model, rows in table.groupby("model", sort=False):
        cells = "".join(
            f"<td style='text-align:right;padding:0 12px'>{_cell(row)}</td>" for _, row in rows.iterrows()
        )
        made_for = rows["context_length"].iloc[0]
        label = f"{model} (made for {made_for:,} tokens)" if 0 < made_for < context else str(model)
        body += f"<tr><td>{html.escape(label)}</td>{cells}</tr>"
    note = "Tokens/s, in brackets by the slowest and the fastest line, and seconds to the first token"
    note += f"; a reader needs {READING_TOK_S} tokens/s. Analytic."
    return f"<table><tr><th></th>{head}</tr>{body}</table><p>{note}</p>"


def _cell(row: pd.Series) -> str:
    if not row["fits"]:
        return f"needs {(row['file_mb'] + row['kv_cache_mb']) / 1000:.3g} GB"
    text = f"<b>{row['decode_tok_s']:.3g}</b>"
    if row["slow_tok_s"] < row["fast_tok_s"]:
        text += f" ({row['slow_tok_s']:.3g} to {row['fast_tok_s']:.3g})"
    return text if pd.isna(row["ttft_ms"]) else f"{text}, {seconds(row['ttft_ms'] / 1000)}"


def _range(spread: Spread, unit: str) -> str:
    lines = f"{spread.lines} line{'s' if spread.lines > 1 else ''}"
    between = f"{spread.low:.3g} to {spread.high:.3g}, " if spread.low < spread.high else ""
    return f"<b>{spread.value:.3g} {unit}</b> ({between}{lines})"
