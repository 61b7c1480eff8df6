"""One HTML file that shows rows to somebody without a notebook: plots, table and what each number means.

The file holds everything it shows (pictures as data, no script, no address), so that it opens offline
and can be mailed.
"""

import io
import json
import math
import re
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from edgelab import assets, plots, tasks
from edgelab.errors import EdgeLabError
from edgelab.ledger import Field, every_field
from edgelab.plots.style import Rows, as_frame, cautions, plain

BADGES = {
    "packed": "really packed weights in PyTorch, on the kernel named with it; everything is measured.",
    "runtime": "an inference engine with its own kernels: measured there.",
    "simulated": "rounded weights or activations in floating point: only the quality is real.",
    "analytic": "computed from shapes, not measured.",
}
PLOTS: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
    "Quality against size": (
        "Perplexity against stored weights; lower left is better, stairs join what nothing beats in both.",
        plots.tradeoff,
    ),
    "Size": ("What the stored weights consist of.", plots.size_bars),
    "Latency": (
        "Time per output token, time to first token, and speed relative to the baseline.",
        plots.latency,
    ),
    "Difference to the baseline": (
        "NLL of each window of text minus the baseline's on the same window; right of zero is worse.",
        plots.window_delta,
    ),
}


class ReportError(EdgeLabError):
    """There is nothing to report, or no file to write it to."""


def write(rows: Rows, path: Path, notes: str = "") -> Path:
    """Write the report of `rows` to `path`, over an older one only once the new one is whole. Returns `path`.

    notes: what a reader has to know about the reference, for instance where its weights come from.
    Raises ReportError where there are no rows or `path` is a folder, AssetError where it cannot be written.
    """
    frame, path = as_frame(rows), Path(path)
    if frame.empty:
        raise ReportError(
            "there are no rows to report; measure something first, for instance `edgelab compare`"
        )
    if path.is_dir():
        raise ReportError(f"{path} is a folder; name a file, such as {path / 'report.html'}")
    # Columns are the fields that have a form, where any row fills them
    columns = {
        name: about for name, about in every_field().items() if about.form and frame[name].notna().any()
    }
    quality = {name: about for name, about in columns.items() if about.group in ("quality", "tasks")}
    costs = {name: about for name, about in columns.items() if name not in quality}
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")
    page = template.render(
        fast=frame["fast"].any(),
        summary=_summary(frame),
        notes=[*filter(None, [notes]), *cautions(frame, ["ppl", "decode_ratio"])],
        machines=_machines(frame),
        plots=[_plot(title, text, draw, frame) for title, (text, draw) in PLOTS.items()],
        columns=[(_title(about), _meaning(about)) for about in columns.values()],
        tables=[
            _table(title, frame, part)
            for title, part in (("Quality", quality), ("Size and speed", costs))
            if part or part is quality  # failed rows are in the first one in any case
        ],
        samples=_samples(frame),
        badges=BADGES,
    )
    with assets.staged(path, "choose a place that can be written") as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _summary(frame: pd.DataFrame) -> str:
    failed = int((frame["status"] != "ok").sum())
    parts = [_counted(len(frame)) + (f", {failed} failed" if failed else "")]
    for title, column in (("model", "model"), ("text", "corpus"), ("protocol", "protocol")):
        if values := sorted(set(frame[column]) - {""}):
            parts.append(f"{title} {', '.join(values)}")
    if days := sorted({moment[:10] for moment in frame["started_at"] if moment}):
        parts.append(" to ".join(dict.fromkeys([days[0], days[-1]])))
    return " · ".join(parts)


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _machines(frame: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """A title and lines for each machine, thread count and set of versions."""
    known = frame[["host", "cpu", "cores", "threads", "ram_gb", "os", "python", "versions"]].map(plain)
    found = []
    for (host, cpu, cores, threads, ram, os, python, versions), count in known.value_counts(
        sort=False
    ).items():
        machine = [cpu, cores and f"{cores} cores", threads and f"{threads} threads"]
        machine += [ram and f"{float(ram):.3g} GB memory"]
        lines = [machine, [os, python and f"Python {python}"], [_versions(versions)]]
        title = f"{host or 'unnamed machine'} ({_counted(count)})"
        found.append((title, [", ".join(filter(None, line)) for line in lines if any(line)]))
    return found


def _versions(text: str) -> str:
    try:
        return ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
    except (ValueError, AttributeError):
        return text


def _plot(title: str, text: str, draw: Callable[[Rows], Figure], frame: pd.DataFrame) -> dict[str, str]:
    found = {"title": title, "text": text, "source": "", "missing": ""}
    try:
        picture = io.BytesIO()
        draw(frame).savefig(picture, format="png", dpi=160)
    except plots.NothingToDraw as missing:
        return found | {"missing": str(missing)}
    return found | {"source": f"data:image/png;base64,{b64encode(picture.getvalue()).decode()}"}


def _title(about: Field) -> str:
    return about.with_unit + (" [95 % interval]" if about.ends else "")


def _meaning(about: Field) -> str:
    return f"{about.meaning} {about.direction.capitalize()}.".strip() if about.better else about.meaning


def _table(title: str, frame: pd.DataFrame, columns: dict[str, Field]) -> dict[str, Any]:
    """Some columns of the rows that fill one of them, and of the failed ones: a table that fits a page."""
    filled = frame[list(columns)].notna().any(axis=1) | (frame["status"] != "ok")
    rows = [_row(row, columns) for _, row in frame[filled].iterrows()]
    return {"title": title, "columns": [_title(about) for about in columns.values()], "rows": rows}


def _row(row: pd.Series, columns: dict[str, Field]) -> dict[str, Any]:
    gate = f"parity gate failed: {row['parity_detail']}".removesuffix(": ") if row["hollow"] else ""
    return {
        "recipe": _breakable(row["recipe"]),
        "reference": row["source"] == "reference",
        "alarms": [*(["FAST"] if row["fast"] else []), *filter(None, [gate])],
        "badge": row["badge"],
        "kernel": row["kernel"],
        "failure": "" if row["status"] == "ok" else f"{row['status']}: {row['error']}".removesuffix(": "),
        "cells": [_cell(row, name, about) for name, about in columns.items()],
    }


def _breakable(recipe: str) -> Markup:
    """A long recipe breaks between settings, not inside words."""
    return Markup(re.sub("([:,.])", r"\1<wbr>", str(escape(recipe))))


def _cell(row: pd.Series, name: str, about: Field) -> tuple[str, str]:
    """A value and its interval, as text; a dash where nothing was measured."""
    if not math.isfinite(row[name]):
        return "–", ""
    ends = [row[end] for end in about.ends or ()]
    known = ends and all(map(math.isfinite, ends))
    return format(
        row[name], about.form
    ), f"[{', '.join(format(end, about.form) for end in ends)}]" if known else ""


def _samples(frame: pd.DataFrame) -> list[tuple[Markup, list[tuple[str, str]]]]:
    """What each recipe writes after each prompt, where a row holds it."""
    found = []
    for _, row in frame[frame["sample"].notna()].drop_duplicates("recipe", keep="last").iterrows():
        found.append((_breakable(row["recipe"]), list(zip(tasks.PROMPTS, row["sample"], strict=False))))
    return found
