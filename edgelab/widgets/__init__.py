"""Widgets: the only place that imports ipywidgets. They draw into an Image, which works on any ipykernel.

JupyterLab with ipykernel 7 handles widget messages on a second thread, where pyplot and Output widgets lose
their target. A Figure rendered to PNG bytes and put into an Image needs neither.
"""

import io

import ipywidgets
from matplotlib.figure import Figure

BITS = tuple(range(2, 9))
GROUP_SIZES = (32, 64, 96, 192, 0)  # 0: a whole row
WIDE = {"style": {"description_width": "90px"}, "layout": {"width": "auto", "max_width": "560px"}}


def group_words(size: int) -> str:
    return f"groups of {size}" if size else "one group per row"


def picture(width: int = 850) -> ipywidgets.Image:
    """An empty picture, as wide as the page or `width` pixels."""
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%", width=f"{width}px"))


def figure_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as a PNG file, to be the value of an ipywidgets.Image."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()
