"""What the reader expected, over what was measured."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from edgelab.plots.style import FAMILY_COLOURS, PALE, Chart, new_chart, stamp, style_axes

WIDE_SPAN = 30  # times from which an axis is logarithmic
MEASURED, GUESSED = FAMILY_COLOURS["baseline"], FAMILY_COLOURS["prune"]


def guesses_over(
    measured: Mapping[str, float], guesses: Mapping[str, float], question: str, unit: str = ""
) -> Chart:
    """One line for each measured value: a dot where it is, and a diamond where it was expected, if it was.

    The title says by how much the guesses are off. A guess for what is not measured is named in a note.
    """
    guessed = {name: guesses[name] for name in measured if name in guesses}
    figure = new_chart(8, 1.6 + 0.62 * len(measured))
    axes = figure.subplots()
    for place, (name, value) in enumerate(measured.items()):
        if name in guessed:
            axes.plot([guessed[name], value], [place, place], color=PALE, linewidth=1.5, zorder=2)
            look = {"marker": "D", "s": 55, "facecolor": "white", "edgecolor": GUESSED, "linewidth": 1.6}
            axes.scatter(guessed[name], place, zorder=3, **look)
            _write(axes, guessed[name], place, f"you: {_text(guessed[name], unit)}", -17, GUESSED)
        axes.scatter(value, place, s=60, color=MEASURED, zorder=4)
        _write(axes, value, place, f"measured: {_text(value, unit)}", 9, MEASURED)
    values = [*measured.values(), *guessed.values()]
    if min(values) > 0 and max(values) / min(values) > WIDE_SPAN:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) < 1000 * min(values) else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.margins(x=0.18)
    axes.set_ylim(len(measured) - 0.4, -0.6)  # the first on top
    axes.set_yticks(range(len(measured)) if any(measured) else [], list(measured) if any(measured) else [])
    axes.set_xlabel(f"{question[:1].upper()}{question[1:]}" + (f" ({unit})" if unit else ""))
    style_axes(axes, _message(measured, guessed, question, unit))
    missing = [name for name in guesses if name not in measured]
    notes = [f"Expected, but not measured: {', '.join(missing)}."] if missing else []
    return stamp(figure, notes=notes)


def _message(measured: Mapping[str, float], guessed: Mapping[str, float], question: str, unit: str) -> str:
    if not guessed:
        return f"{question[:1].upper()}{question[1:]}, measured"
    if len(measured) == 1:
        ((name, value),) = measured.items()
        return f"You expected {_text(guessed[name], unit)}; measured: {_text(value, unit)}"
    if min(*guessed.values(), *(measured[name] for name in guessed)) > 0:
        off = {name: max(value / measured[name], measured[name] / value) for name, value in guessed.items()}
        worst = max(off, key=off.get)
        if off[worst] < 1.05:
            return "All your guesses are within 5 % of the measurement"
        return f"Your guesses are off by up to {off[worst]:,.{0 if off[worst] >= 10 else 1}f} times, most at {worst}"
    off = {name: abs(value - measured[name]) for name, value in guessed.items()}
    worst = max(off, key=off.get)
    return f"Your guesses are off by up to {_text(off[worst], unit)}, most at {worst}"


def _write(axes: Axes, x: float, y: float, text: str, above: float, colour: str) -> None:
    axes.annotate(text, (x, y), (0, above), textcoords="offset points", ha="center", fontsize=9, color=colour)


def _text(value: float, unit: str = "") -> str:
    number = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{number} {unit}".strip()
