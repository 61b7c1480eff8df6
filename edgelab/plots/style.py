"""What every plot shares: colours and markers, the look of axes, rows made ready to draw.

The colour says the family, the marker the badge; small and pale means measured by the project, large and full
by the reader; a hollow marker has failed the parity gate.
"""

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from edgelab import ledger
from edgelab.assets import fast
from edgelab.errors import EdgeLabError, listed
from edgelab.ledger import Row, every_field
from edgelab.ledger.row import value_types
from edgelab.ledger.store import NUMBERS
from edgelab.rows import PROTOCOL, compared_by, find_metric, newest

Rows = pd.DataFrame | Iterable[Row | dict[str, Any]]

# Okabe and Ito's palette and two of Tol's, which readers with any kind of colour blindness can tell apart.
FAMILY_COLOURS = {
    "baseline": "#000000",
    "quantize": "#0072B2",
    "qat": "#882255",
    "native": "#999933",  # an engine's own
    "prune": "#D55E00",
    "lowrank": "#44AA99",
    "distill": "#009E73",
    "lora": "#CC79A7",
    "hybrid": "#E69F00",
    "partition": "#56B4E9",
}
BADGE_MARKERS = {"packed": "s", "runtime": "^", "simulated": "o", "analytic": "D"}
# The same, in a line of text.
BADGE_SIGNS = {"packed": "■", "runtime": "▲", "simulated": "●", "analytic": "◆"}
LONGEST_ALT = 1000  # characters
GREY = "#6b6b6b"  # unknown families and notes
PALE = "#b0b0b0"  # frames and helping lines
BASELINE_LINE = {"color": FAMILY_COLOURS["baseline"], "linewidth": 0.9, "linestyle": (0, (5, 3)), "zorder": 1}


SIZE_PARTS = {
    "linear_mb": "linear layers",
    "embedding_mb": "embedding",
    "scales_mb": "scales and zero-points",
}

TEXTS = [name for name, kind in value_types().items() if kind is str] + ["source"]
FILLED = {"status": "ok", "source": "reader"}  # what a row without them counts as
# Rows that agree in all of these measure the same thing. Sizes do not depend on machine or protocol, quality
# not on the machine, times not on the protocol.
SAME_SIZE = ["recipe", "model", "runtime", "badge"]
SAME_QUALITY = ["recipe", "runtime", "badge", "seed", *PROTOCOL]
SAME_SPEED = ["recipe", "model", "runtime", "kernel", "host", "threads", "source"]
SAME_ROW = list(dict.fromkeys([*SAME_QUALITY, *SAME_SPEED]))


class NothingToDraw(EdgeLabError):
    """The rows hold no value that this plot needs; the message says what to measure first."""


class Chart(Figure):
    """A Figure that a notebook shows as a picture by itself, without pyplot or a magic command."""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=110)
        # 256 colours: a third of the bytes in a notebook
        Image.open(drawn).convert("RGB").quantize(256).save(small, "png")
        return small.getvalue(), {"alt": self.alt}

    def __repr__(self) -> str:
        return self.alt  # where a notebook is read without pictures

    @property
    def alt(self) -> str:
        """The picture in words, for readers who do not see it: of each panel the title, the axes and what is named."""
        panels = []
        for axes in self.axes:
            sides = {"across": axes.get_xlabel(), "up": axes.get_ylabel()}
            said = [f"{side}: {text}" for side, text in sides.items() if text]
            names = [text.get_text() for text in (*axes.get_yticklabels(), *axes.texts)]
            names = [name for name in names if re.search("[A-Za-z]", name)]
            said += [f"named: {', '.join(names)}"] if names else []
            panels.append(". ".join(filter(None, [axes.get_title(loc="left").replace("\n", ", "), *said])))
        text = ". ".join(filter(None, [*panels, self.get_supxlabel().replace("\n", " ")]))
        return text if len(text) <= LONGEST_ALT else textwrap.shorten(text, LONGEST_ALT, placeholder=" …")


# Style, shared by all plots


def new_chart(width: float = 8.0, height: float = 5.0) -> Chart:
    """An empty white figure of `width` by `height` inches."""
    return Chart(figsize=(width, height), layout="constrained", facecolor="white")


def style_axes(axes: Axes, title: str = "", legend: Sequence[Any] = (), columns: int = 8) -> None:
    """The look of every plot: open frame, pale grid under the data, title and legend handles above it."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=PALE)
    axes.set_title(
        title, loc="left", fontsize=11, fontweight="bold", pad=8 + 14 * math.ceil(len(legend) / columns)
    )
    if legend:
        look = {"frameon": False, "fontsize": 8, "borderpad": 0, "columnspacing": 1.2, "handletextpad": 0.4}
        axes.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, **look)


def stamp(figure: Figure, frame: pd.DataFrame | None = None, notes: Iterable[str] = ()) -> Figure:
    """Write FAST above the figure if any row was measured in fast mode, and notes below it. Returns it.

    frame: the rows; None for what this process has computed.
    """
    if fast() if frame is None else frame["fast"].any():
        box = {"facecolor": FAMILY_COLOURS["prune"], "edgecolor": "none", "boxstyle": "round,pad=0.4"}
        text = "FAST: shrunken samples, not for conclusions"
        figure.suptitle(text, x=0.99, ha="right", fontsize=9, fontweight="bold", color="white", bbox=box)
    width = int(figure.get_figwidth() * 16)  # characters in a line of notes
    text = "\n".join(textwrap.fill(note, width) for note in notes)
    if text:
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color=GREY, parse_math=False)
    return figure


def colour(family: str) -> str:
    return FAMILY_COLOURS.get(family, GREY)


def scale_axis(axes: Axes, side: str, values: pd.Series) -> None:
    """Plain numbers along `side`, "x" or "y"; logarithmic where positive values span a factor over twelve."""
    axis = getattr(axes, f"{side}axis")
    if values.min() > 0 and values.max() / values.min() > 12:
        axes.set(**{f"{side}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def draw_point(axes: Axes, x: float, y: float, row: pd.Series) -> None:
    """The marker of one row."""
    tint, size = colour(row["family"]), 70 if row["reader"] else 24
    face, edge, width = ("white", tint, 1.2) if row["hollow"] else (tint, "white", 0.6)
    look = {
        "marker": BADGE_MARKERS.get(row["badge"], "o"),
        "alpha": 1 if row["reader"] else 0.55,
        "zorder": 4,
    }
    axes.scatter(x, y, s=size, facecolor=face, edgecolor=edge, linewidth=width, **look)


def draw_bar(axes: Axes, row: pd.Series, ends: np.ndarray, cap: str) -> np.ndarray:
    """A bar between two `ends`, (2, 2), through the point of one row. Returns the ends."""
    axes.plot(*ends.T, color=colour(row["family"]), linewidth=1, marker=cap, markersize=6,
              alpha=0.9 if row["reader"] else 0.5, zorder=3)  # fmt: skip
    return ends


def legend_handles(drawn: pd.DataFrame) -> list[Line2D]:
    """Handles for the families, badges and sources that occur."""

    def handle(text: str, **look: Any) -> Line2D:
        return Line2D(
            [], [], linestyle="", label=text, **{"color": GREY, "marker": "o", "markersize": 6, **look}
        )

    families = [
        name for name in dict.fromkeys([*FAMILY_COLOURS, *drawn["family"]]) if name in set(drawn["family"])
    ]
    handles = [handle(name, color=colour(name)) for name in families if name]
    badges = [(badge, marker) for badge, marker in BADGE_MARKERS.items() if badge in set(drawn["badge"])]
    handles += [handle(badge, marker=marker, markerfacecolor="none") for badge, marker in badges]
    if drawn["reader"].nunique() > 1:
        handles += [handle("yours", markersize=8), handle("reference", markersize=4, alpha=0.55)]
    return handles


SHORT_NAMES = {"embedding": "emb"}
SHORT_SETTINGS = {
    "bits": "{}-bit",
    "group_size": "g{}",
    "embedding_bits": "emb {}-bit",
    "sparsity": "{} sparse",
    "keep=0": "",
    "drop": "without {}",
    "group_size=0": "per row",
    "symmetric=true": "sym",
    "range": "range {}",
    "scales_only=true": "scales",
    "minutes": "{} min",
    "learning_rate": "lr {}",
}

MANY_LAYERS = re.compile(r"layers without (\d+(?:/\d+){3,})")


def label(recipe: str, width: int = 48) -> str:
    """`recipe` as plots and their tables write it, in at most `width` characters: `rtn 4-bit g64`, `baseline`."""
    if recipe == "none":
        return "baseline"
    techniques, _, runtime = recipe.partition(" @ ")
    short = []
    for technique in _split(techniques, r" \+ "):
        name, _, settings = technique.partition(":")
        words = []
        for setting in filter(None, _split(settings, ",")):
            key, _, value = setting.removesuffix(".0").partition("=")
            words.append(SHORT_SETTINGS.get(setting, SHORT_SETTINGS.get(key, key + "={}").format(value)))
        name = name.rpartition(".")[2]
        short.append(" ".join([SHORT_NAMES.get(name, name), *filter(None, words)]))
    text = " + ".join(short) + (f" @ {runtime}" if runtime else "")
    if len(text) > width:  # how many layers are gone, and not which, so that what follows them is seen
        text = MANY_LAYERS.sub(lambda found: f"without {found[1].count('/') + 1} layers", text)
    return textwrap.shorten(text, width, placeholder=" …")


def inner(title: str) -> str:
    """A label as it is written within a sentence: "KL divergence" keeps its capitals, "Weights" does not."""
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def _split(text: str, sign: str) -> list[str]:
    """Parts of a recipe; a recipe in parentheses is one value."""
    return re.split(rf"{sign}(?![^(]*\))", text)


# Rows


def as_frame(rows: Rows) -> pd.DataFrame:
    """A copy of the rows with every column the plots read; what is missing becomes NaN, or "" in text."""
    if not isinstance(rows, pd.DataFrame):
        rows = list(rows)
        rows = ledger.frame(rows) if all(isinstance(row, Row) for row in rows) else pd.DataFrame(rows)
    declared = every_field()
    measured = [name for name, about in declared.items() if about.better or about.form]
    numbers = list(dict.fromkeys([*NUMBERS, *measured]))
    columns = dict.fromkeys([*rows.columns, *declared, "source"])
    frame = rows.reindex(columns=list(columns)).reset_index(drop=True)
    filled = frame[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    texts = (
        frame[TEXTS].astype(object).fillna(FILLED | dict.fromkeys(set(TEXTS) - FILLED.keys(), "")).astype(str)
    )
    frame = pd.concat([frame.drop(columns=[*numbers, *TEXTS]), filled, texts], axis=1)[list(columns)].copy()
    frame["fast"] = frame["fast"].map(lambda value: value in (True, 1)).astype(bool)  # null is not fast
    frame["reader"] = frame["source"] != "reference"
    frame["hollow"] = frame["parity"].str.lower().isin(["fail", "failed", "false"])
    frame["ungated"] = (frame["badge"] == "runtime") & (frame["parity"] == "")
    return frame


def drawable(
    frame: pd.DataFrame, metrics: Sequence[str], measure: str, same: list[str] = SAME_ROW
) -> tuple[pd.DataFrame, list[str]]:
    """Successful rows that hold all `metrics`, and sentences about those left out.

    Of rows that agree in the columns `same` the newest is taken, the reader's before the project's.
    Raises NothingToDraw, saying that `measure` comes first, where no row is left.
    """
    failed = frame["status"] != "ok"
    complete = np.isfinite(frame[list(metrics)]).all(axis=1)
    drawn = frame[~failed & complete]
    if drawn.empty:
        raise NothingToDraw(
            f"none of the {len(frame)} rows ({failed.sum()} failed) has {listed(metrics)}: measure "
            f'{measure} first, for instance with el.compare(["none", "quantize.rtn:bits=4,group_size=64"])'
        )
    notes = []
    if failed.any():
        kinds = ", ".join(sorted(frame.loc[failed, "status"].unique()))
        notes.append(f"Not drawn, because measuring failed: {failed.sum()} ({kinds}).")
    other_tokens = frame["ppl"].isna() & frame["bits_per_byte"].notna() & ~failed & ~complete
    if per_token := [name for name in metrics if find_metric(name).within == "protocol"]:
        if other_tokens.any():
            notes.append(
                f"Not drawn, because its tokens are others and {listed(per_token)} is per token: "
                f"{', '.join(dict.fromkeys(map(label, frame.loc[other_tokens, 'recipe'])))}."
            )
        complete |= other_tokens
    if missing := int((~failed & ~complete).sum()):
        notes.append(f"Not drawn, because not measured: {missing} without {' or '.join(metrics)}.")
    return newest(drawn, same), notes


def cautions(drawn: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """What must not be compared here: quality across protocols, times across machines or of wrong outputs."""
    notes = []
    within = {find_metric(name).within for name in metrics}
    differ = [name for name in compared_by(metrics) if drawn[name].nunique() > 1]
    if within & {"protocol", "text"} and differ:
        notes.append(
            f"Quality is comparable only between rows of the same {listed(differ)}; here they differ."
        )
    if "machine" in within and drawn["host"].nunique() > 1:
        hosts = ", ".join(drawn["host"].unique())
        notes.append(f"Times come from several machines ({hosts}) and must not be ranked together.")
    if drawn["hollow"].any():
        notes.append("Hollow markers failed the parity gate: their outputs are not the reference's.")
    if "machine" in within and drawn["ungated"].any():
        notes.append("Rows of engines without a parity verdict earn no rank: measure their quality too.")
    return notes


def row_names(drawn: pd.DataFrame, always: str = "") -> list[str]:
    """One name per row: its recipe, and of model, machine and the rest what tells equal recipes apart.

    The column `always` is written on every row as soon as its values differ.
    """
    names = pd.Series([label(recipe) for recipe in drawn["recipe"]], index=drawn.index)
    for column in ["model", "host", "runtime", "kernel", "threads", "corpus", "protocol", "n_tokens", "seed"]:
        marked = names.duplicated(keep=False) | (column == always)
        if drawn.loc[marked, column].nunique() > 1:
            texts = drawn.loc[marked, column].map(plain)
            names[marked] += ", " + texts.map(lambda text: textwrap.shorten(text, 24, placeholder=" …"))
    return names.tolist()


def plain(value: object) -> str:
    """A value of a row as text; whole numbers lose their decimal point, null becomes empty."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
