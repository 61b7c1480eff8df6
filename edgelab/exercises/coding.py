"""Exercises in which the reader writes a function: it runs on a small tensor and is compared with ours."""

import copy
import html
import linecache
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NOTHING_YET = "Your function returned nothing yet: replace the lines marked with ... ."
MOST = 16  # rows and columns that are drawn
TABLE = "display:inline-table;margin:4px 24px 4px 0;border-collapse:collapse"
CELL = "text-align:right;padding:2px 8px;border:1px solid #b0b0b0"
DIFFERS = f"{CELL};background:#f6d5c3;color:#000000"


@dataclass(frozen=True)
class CodeExercise:
    """The reader's function is called with `inputs` and has to return what `solution` returns.

    inputs: a tuple of arguments, or the one argument. solution and mistakes return a number, a tensor or an array, or a
    tuple of those; `returns` names the parts of a tuple. `mistakes` pair a wrong function with its hint. Results that
    are not whole numbers are equal within the relative `tolerance`.
    """

    inputs: Any
    solution: Callable[..., Any]
    why: str  # shown with the right answer
    hint: str  # for results that no mistake explains
    mistakes: list[tuple[Callable[..., Any], str]] = field(default_factory=list)
    returns: Sequence[str] = ()
    tolerance: float = 1e-4


class _NotNumbers(Exception):
    """What is wrong with a result, as the end of a sentence."""


def compared(asked: CodeExercise, function: Any) -> tuple[bool, str, str]:
    """Whether the function is right, the sentence that says so, and HTML of its result next to the expected one."""
    if not callable(function):
        return False, "A function is needed: write its name without parentheses and arguments.", ""
    expected = _parts(_called(asked.solution, asked.inputs))
    try:
        result = _called(function, asked.inputs)
    except Exception as error:
        return False, NOTHING_YET if "ellipsis" in str(error) else _stopped(error), ""
    if _has_gaps(result):
        return False, NOTHING_YET, ""
    try:
        own = _parts(result, len(expected))
    except _NotNumbers as wrong:
        return False, f"Not yet: {wrong}", ""
    drawing = _drawing(own, expected, asked)
    if _equal(own, expected, asked.tolerance):
        return True, f"Right. {asked.why}", drawing
    for mistake, hint in asked.mistakes:
        if _equal(own, _parts(_called(mistake, asked.inputs), len(expected)), asked.tolerance):
            return False, f"Not yet: {hint}", drawing
    return False, f"Not yet: {_first_difference(own, expected, asked)} {asked.hint}", drawing


def _called(function: Callable[..., Any], inputs: Any) -> Any:
    """What a function returns for a copy of the inputs, which it may change."""
    arguments = copy.deepcopy(inputs)
    return function(*arguments) if isinstance(arguments, tuple) else function(arguments)


def _stopped(error: Exception) -> str:
    """One sentence: what was raised, and the line of the reader's that raised it."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
        if code.co_filename != __file__ and line and not place.startswith(" in "):
            place = f" in the line `{textwrap.shorten(line, 80, placeholder=' …')}`"
        trace = trace.tb_next
    said = textwrap.shorten(str(error), 300, placeholder=" …").rstrip(".")
    return f"Your function stopped{place} with {type(error).__name__}{': ' if said else ''}{said}."


def _has_gaps(result: Any) -> bool:
    """Whether a result is, or holds, None or an ellipsis."""
    if isinstance(result, list | tuple):
        return any(map(_has_gaps, result))
    return result is None or result is ...


def _parts(result: Any, count: int | None = None) -> list[np.ndarray]:
    """A result as arrays: of a tuple each part, of anything else the one.

    count: how many parts there have to be. Raises _NotNumbers.
    """
    if not (isinstance(result, tuple) if count is None else count > 1):
        return [_array(result)]
    row = getattr(result, "ndim", 0) == 1
    parts = list(result) if row or isinstance(result, list | tuple) else [result]
    if count is not None and len(parts) != count:
        raise _NotNumbers(f"{count} results are expected, and your function returns {len(parts)}.")
    return [_array(part) for part in parts]


def _array(value: Any) -> np.ndarray:
    """A number, list, array or tensor, as float64: uint8 would wrap around when two are subtracted."""
    try:
        array = np.asarray(_plain(value))
        if array.dtype.kind in "biufO":
            return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        pass
    kind = type(value).__name__
    raise _NotNumbers(f"numbers or a tensor are expected, and your function returns a {kind}.")


def _plain(value: Any) -> Any:
    """The same in what numpy knows: it has no gradients and no bfloat16."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _equal(own: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> bool:
    if len(own) != len(expected):
        return False
    pairs = zip(own, expected, strict=True)
    return all(_same_shape(a, b) and not _differing(a, b, tolerance).any() for a, b in pairs)


def _same_shape(own: np.ndarray, expected: np.ndarray) -> bool:
    return own.shape == expected.shape or own.size == expected.size == 1


def _differing(own: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """Which numbers differ: whole ones as such, others by more than rounding makes of the largest of them."""
    own = own.reshape(expected.shape)
    if np.array_equal(own, np.rint(own)) and np.array_equal(expected, np.rint(expected)):
        return own != expected
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    return ~np.isclose(own, expected, tolerance, 1e-6 * largest, equal_nan=True)


def _first_difference(own: list[np.ndarray], expected: list[np.ndarray], asked: CodeExercise) -> str:
    for number, (a, b) in enumerate(zip(own, expected, strict=True)):
        name = _name(asked, number, len(expected)) or "the result"
        if not _same_shape(a, b):
            return f"{name} has the shape {a.shape}, and {b.shape} is expected."
        differs = _differing(a, b, asked.tolerance)
        if differs.any():
            first = np.unravel_index(differs.argmax(), differs.shape)
            mine, right = _told_apart(a.reshape(b.shape)[first], b[first])
            index = ", ".join(str(int(i)) for i in first)
            place = f" at [{index}]" if index else ""
            count = f" ({differs.sum()} of {b.size} numbers differ)" if b.size > 1 else ""
            return f"{name}{place} is {mine} where {right} is expected{count}."
    raise AssertionError("the results are equal")


def _name(asked: CodeExercise, number: int, count: int) -> str:
    if number < len(asked.returns):
        return asked.returns[number]
    return f"result {number + 1}" if count > 1 else ""


def _told_apart(own: float, expected: float) -> tuple[str, str]:
    """Both numbers, in as many digits as it takes."""
    for digits in (4, 7, 17):
        texts = _text(own, digits), _text(expected, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _text(value: float, digits: int = 4) -> str:
    whole = float(value).is_integer() and abs(value) < 1e9
    return f"{value + 0.0:.0f}" if whole else f"{value:.{digits}g}"  # + 0.0 makes -0 a 0


def _drawing(own: list[np.ndarray], expected: list[np.ndarray], asked: CodeExercise) -> str:
    """HTML: of each part two tables of numbers, yours and the expected one, with the differing cells marked."""
    rows = []
    for number, (a, b) in enumerate(zip(own, expected, strict=True)):
        name = _name(asked, number, len(expected))
        if _same_shape(a, b):
            differs = _differing(a, b, asked.tolerance)
            sides = ("Yours", a.reshape(b.shape), b, differs), ("Expected", b, a.reshape(b.shape), differs)
        else:
            sides = [(side, x, x, np.zeros(x.shape, bool)) for side, x in (("Yours", a), ("Expected", b))]
        rows.append("".join(_table(f"{side}{name and f', {name}'}", *grids) for side, *grids in sides))
    return f"<div>{'<br>'.join(rows)}</div>"


def _table(title: str, values: np.ndarray, others: np.ndarray, differs: np.ndarray) -> str:
    """One table; what differs is bold and has a sign, too, for pages that leave out colours."""
    size = f", shape {values.shape}" if values.ndim else ""
    body = ""
    for cells in zip(*map(_grid, (values, others, differs)), strict=True):
        body += "<tr>"
        for value, other, differ in zip(*cells, strict=True):
            if differ:
                body += f'<td style="{DIFFERS}"><b>{_told_apart(value, other)[0]} ≠</b></td>'
            else:
                body += f'<td style="{CELL}">{_text(value)}</td>'
        body += "</tr>"
    caption = f'<caption style="white-space:nowrap">{html.escape(title + size)}</caption>'
    return f'<table style="{TABLE}">{caption}{body}</table>'


def _grid(values: np.ndarray) -> list[list[float]]:
    """An array of any shape as rows and columns, at most MOST of each."""
    return values.reshape(-1, values.shape[-1] if values.ndim else 1)[:MOST, :MOST].tolist()
