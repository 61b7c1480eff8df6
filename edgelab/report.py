"""One HTML file that shows rows to somebody without a notebook: plots, table and what each number means.

The file holds everything it shows (pictures as data, no script, no address), so that it opens offline
and can be mailed.
"""

import contextlib
import io
import json
import math
import os
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from edgelab import plots
from edgelab.errors import EdgeLabError
from edgelab.plot_style import Rows, as_frame, cautions


class ReportError(EdgeLabError):
    """The report cannot be written where it was asked for."""


class Column(NamedTuple):
    title: str
    format: str  # of one value
    meaning: str


COLUMNS = {
    "ppl": Column(
        "Perplexity", ",.2f", "How surprised the model is by the text, per token; lower is better."
    ),
    "delta_nll": Column(
        "ΔNLL [95 % interval]",
        "+.4f",
        "Negative log-likelihood minus the baseline's on the same windows, in nats per token. Where the "
        "interval holds zero, this text does not tell the two apart.",
    ),
    "kld_mean": Column(
        "KL divergence",
        ".4f",
        "How far the next-token probabilities moved from the reference's; 0 is identical.",
    ),
    "top1_agreement": Column(
        "Top-1 agreement", ".1%", "Share of positions where the most likely token is the reference's."
    ),
    "weights_mb": Column("Weights MB", ",.1f", "Stored weights with scales and embedding; MB is 10⁶ bytes."),
    "bits_per_weight": Column(
        "Bits per weight", ".2f", "Stored bits of all weights over the number of weights."
    ),
    "peak_rss_mb": Column(
        "Peak memory MB",
        ",.0f",
        "Peak of a fresh process that loads and generates, minus the peak of one that loads nothing.",
    ),
    "ttft_ms_p50": Column("First token ms", ",.1f", "Median time from prompt to first token."),
    "decode_tok_s": Column("Decode tokens/s", ",.1f", "Tokens per second after the first, one sequence."),
    "decode_ratio": Column(
        "× baseline [spread]",
        ".2f",
        "Decoding rate over the baseline's in interleaved runs: the number to compare speed by.",
    ),
}
INTERVALS = ("delta_nll", "decode_ratio")
BADGES = {
    "packed": "really packed weights in PyTorch, on the kernel named beside it; everything is measured.",
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


def write(rows: Rows, path: Path, notes: str = "") -> Path:
    """Write the report of `rows` to `path`, over an older one only once the new one is whole. Returns `path`.

    notes: what a reader has to know about the reference, for instance where its weights come from.
    Raises ReportError where there are no rows or the place cannot be written.
    """
    frame = as_frame(rows)
    if frame.empty:
        raise ReportError(
            "there are no rows to report; measure something first, for instance `edgelab compare`"
        )
    path = Path(path)
    page = PAGE.substitute(
        fast='<p class="fast">FAST: shrunken samples, not for conclusions</p>' if frame["fast"].any() else "",
        summary=_summary(frame),
        notes=f'<p class="note">{escape(notes)}</p>' if notes else "",
        cautions="".join(
            f'<p class="note">{escape(note)}</p>' for note in cautions(frame, ["ppl", "decode_ratio"])
        ),
        machines=_machines(frame),
        plots="".join(_plot(title, text, draw, frame) for title, (text, draw) in PLOTS.items()),
        head="".join(f'<th scope="col">{escape(column.title)}</th>' for column in COLUMNS.values()),
        rows="".join(_table_row(row) for _, row in frame.iterrows()),
        columns=_definitions((column.title, column.meaning) for column in COLUMNS.values()),
        badges=_definitions(BADGES.items()),
    )
    try:
        _replace(path, page)
    except OSError as error:
        raise ReportError(f"the report cannot be written to {path}: {error.strerror or error}") from error
    return path


def _replace(path: Path, text: str) -> None:
    """Put `text` at `path` at once: readers see the old file or the new one; nothing half-written stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def _summary(frame: pd.DataFrame) -> str:
    failed = int((frame["status"] != "ok").sum())
    parts = [_counted(len(frame)) + (f", {failed} failed" if failed else "")]
    for title, column in (("model", "model"), ("text", "corpus"), ("protocol", "protocol")):
        if values := sorted(set(frame[column]) - {""}):
            parts.append(f"{title} {', '.join(values)}")
    if days := sorted({moment[:10] for moment in frame["started_at"] if moment}):
        parts.append(" to ".join(dict.fromkeys([days[0], days[-1]])))
    return escape(" · ".join(parts))


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _machines(frame: pd.DataFrame) -> str:
    """A card per machine, thread count and set of versions; `versions` is JSON text or a dictionary."""
    facts = ["host", "cpu", "cores", "threads", "ram_gb", "os", "python", "versions"]
    known = frame.reindex(columns=facts).map(_plain)
    known["versions"] = known["versions"].map(_versions)
    cards = []
    for machine, count in known.value_counts(sort=False).items():
        facts = dict(zip(known.columns, machine, strict=True))
        ram = f"{float(facts['ram_gb']):.3g} GB memory" if facts["ram_gb"] else ""
        cores = f"{facts['cores']} cores" if facts["cores"] else ""
        threads = f"{facts['threads']} threads" if facts["threads"] else ""
        python = f"Python {facts['python']}" if facts["python"] else ""
        lines = [[facts["cpu"], cores, threads, ram], [facts["os"], python], [facts["versions"]]]
        text = "<br>".join(escape(", ".join(filter(None, line))) for line in lines if any(line))
        host = escape(facts["host"] or "unnamed machine")
        cards.append(f'<div class="card"><h3>{host} ({_counted(count)})</h3><p>{text}</p></div>')
    return "".join(cards)


def _plain(value: object) -> str:
    """A value of a row as text; whole numbers lose their decimal point, null becomes empty."""
    if isinstance(value, dict):
        return json.dumps(value)
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _versions(text: str) -> str:
    try:
        return ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
    except (ValueError, AttributeError):
        return text


def _plot(title: str, text: str, draw: Callable[[Rows], Figure], frame: pd.DataFrame) -> str:
    title, text = escape(title), escape(text)
    heading = f"<section><h2>{title}</h2><p>{text}</p>"
    try:
        figure = draw(frame)
    except plots.NothingToDraw as missing:
        return f'{heading}<p class="missing">Nothing to draw: {escape(str(missing))}</p></section>'
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=160)
    source = f"data:image/png;base64,{b64encode(picture.getvalue()).decode()}"
    return f'{heading}<div class="scroll"><img alt="{title}: {text}" src="{source}"></div></section>'


def _table_row(row: pd.Series) -> str:
    recipe = escape(row["recipe"])
    for sign in (":", ",", "."):
        recipe = recipe.replace(sign, f"{sign}<wbr>")  # long recipes break between settings, not inside words
    name = f"<code>{recipe}</code>"
    if row["source"] == "reference":
        name += " <small>reference</small>"
    if row["fast"]:
        name += ' <small class="fast">FAST</small>'
    if row["hollow"]:
        detail = escape(f"parity gate failed: {_plain(row.get('parity_detail'))}".removesuffix(": "))
        name += f' <small class="fast">{detail}</small>'
    badge = escape(row["badge"]) + (f"<br><small>{escape(row['kernel'])}</small>" if row["kernel"] else "")
    head = f'<th scope="row">{name}</th><td class="text">{badge}</td>'
    if row["status"] != "ok":
        reason = escape(f"{row['status']}: {_plain(row.get('error'))}".removesuffix(": "))
        return f'<tr class="failed">{head}<td class="text" colspan="{len(COLUMNS)}">{reason}</td></tr>'
    cells = "".join(f"<td>{_cell(row, name, column.format)}</td>" for name, column in COLUMNS.items())
    return f"<tr>{head}{cells}</tr>"


def _cell(row: pd.Series, name: str, form: str) -> str:
    if not math.isfinite(row[name]):
        return "–"
    text = format(row[name], form)
    low, high = (row[f"{name}_low"], row[f"{name}_high"]) if name in INTERVALS else (math.nan, math.nan)
    if math.isfinite(low) and math.isfinite(high):
        text += f"<br><small>[{low:{form}}, {high:{form}}]</small>"
    return text


def _definitions(pairs: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs) + "</dl>"


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>edgelab report</title>
<style>
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --quiet: #5c5c5c; --line: #dcdcdc;
  --card: #f5f6f7; --note: #fff6dd; --alarm: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --text: #e8e8e8; --quiet: #a5a8ac; --line: #3a3d42;
    --card: #202327; --note: #3a3018; --alarm: #ff9a57; }
}
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; } h2 { margin: 2.2rem 0 .3rem; } h3 { margin: 0; font-size: 1rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; } small, .quiet { color: var(--quiet); }
.fast { color: var(--alarm); font-weight: 700; } .missing { color: var(--quiet); font-style: italic; }
.note { background: var(--note); padding: .6rem .9rem; border-radius: .4rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; }
.card { background: var(--card); padding: .7rem 1rem; border-radius: .4rem; flex: 1 1 20rem; }
.card p { margin: 0; font-size: .875rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
img { display: block; width: 100%; min-width: 38rem; max-width: 60rem; background: #fff;
  border-radius: .4rem; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; }
tbody th, .text, thead th:nth-child(-n+2) { text-align: left; }
tbody th { font-weight: 400; white-space: normal; min-width: 13rem; }
td.text[colspan] { white-space: normal; } .failed td[colspan] { color: var(--alarm); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; } dt { font-weight: 600; }
dd { margin: 0; max-width: 44rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1>edgelab report</h1>
$fast
<p class="quiet">$summary</p>
$notes
$cautions
<h2>Measured on</h2>
<div class="cards">$machines</div>
$plots
<section>
<h2>All rows</h2>
<div class="scroll"><table>
<thead><tr><th scope="col">Recipe</th><th scope="col">Badge, kernel</th>$head</tr></thead>
<tbody>$rows</tbody>
</table></div>
<p class="quiet">A dash means not measured.</p>
</section>
<section><h2>What the columns mean</h2>$columns</section>
<section><h2>What the badges mean</h2>$badges</section>
</body>
</html>
""")
