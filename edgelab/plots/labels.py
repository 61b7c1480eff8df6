"""Labels beside points: each at the first of forty places where it touches nothing."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

DIRECTIONS = np.array([(1, 1), (1, 0), (-1, 1), (0, 1), (1, -1), (-1, 0), (0, -1), (-1, -1)])
DISTANCES = (8, 13, 22, 34, 48)  # points; from the third on a thin line leads to the label


class Mark(NamedTuple):
    """A point in data units and the text that belongs to it."""

    x: float
    y: float
    text: str
    colour: str
    rank: tuple = ()  # lower ranks choose their place first
    wanted: bool = True  # written even where it must touch something
    bold: bool = False


def label_marks(axes: Axes, marks: Iterable[Mark], lines: Iterable[np.ndarray] = ()) -> None:
    """Write each text once, beside its point, where it touches no point, no line, no other text and no edge.

    lines: each (corners, 2) in data units. Texts that are not wanted stay away where every place is taken.
    Call it last: the layout is settled here, and places are found in pixels.
    """
    figure = axes.get_figure()
    figure.draw_without_rendering()
    pixel = figure.dpi / 72  # one point
    marks = sorted(marks, key=lambda mark: mark.rank)
    anchors = axes.transData.transform([(mark.x, mark.y) for mark in marks])
    taken = [Bbox.from_bounds(*(anchor - 5 * pixel), 10 * pixel, 10 * pixel) for anchor in anchors]
    taken += [Bbox([place, place + 1]) for line in lines for place in _along(axes, line, 4 * pixel)]
    written = set()
    for mark, anchor in zip(marks, anchors, strict=True):
        if mark.text in written:
            continue
        look = {"fontsize": 8 if mark.wanted else 7, "fontweight": "bold" if mark.bold else "normal"}
        look |= {"color": mark.colour, "parse_math": False}
        probe = axes.text(0, 0, mark.text, **look)
        size = np.array(probe.get_window_extent().size)
        probe.remove()
        place = _free_place(anchor, size, taken, axes.get_window_extent(), pixel, mark.wanted)
        if place is None:
            continue
        corner, distance = place
        leader = {"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        text = axes.annotate(
            mark.text,
            (mark.x, mark.y),
            (corner - anchor) / pixel,
            textcoords="offset points",
            arrowprops=leader if distance >= DISTANCES[2] else None,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=6,
            **look,
        )
        text.set_in_layout(False)
        taken.append(Bbox.from_bounds(*corner, *size))
        written.add(mark.text)


def _along(axes: Axes, line: np.ndarray, step: float) -> np.ndarray:
    """Places along a line of corners (corners, 2) in data units, in pixels, at most `step` apart."""
    corners = axes.transData.transform(line)
    places = [corners[-1:]]
    for start, end in pairwise(corners):
        shares = np.linspace(0, 1, int(np.linalg.norm(end - start) / step) + 2)[:, None]
        places.append(start + shares * (end - start))
    return np.concatenate(places)


def _free_place(
    anchor: np.ndarray, size: np.ndarray, taken: list[Bbox], inside: Bbox, pixel: float, wanted: bool
) -> tuple[np.ndarray, int] | None:
    """Lower left corner, in pixels, of a box of `size` near `anchor`, and its distance in points.

    Where every place is taken: the one that touches the fewest boxes if the text is wanted, else None.
    """
    places = []
    for distance in DISTANCES:
        for direction in DIRECTIONS:
            reach = distance * pixel * (0.75 if direction.all() else 1)
            corner = anchor + direction * reach + (direction - 1) / 2 * size
            box = Bbox.from_bounds(*corner, *size)
            if inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1:
                touched = box.count_overlaps(taken)
                if not touched:
                    return corner, distance
                places.append((touched, distance, corner))
    if not wanted or not places:
        return None
    _, distance, corner = min(places, key=lambda place: place[:2])
    return corner, distance
