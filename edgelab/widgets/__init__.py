"""Widgets: the only place that imports ipywidgets. They draw into an Image, which works on any ipykernel.

JupyterLab with ipykernel 7 handles widget messages on a second thread, where pyplot and Output widgets lose
their target. A Figure rendered to PNG bytes and put into an Image needs neither.
"""

import io

from matplotlib.figure import Figure


def figure_png(figure: Figure, dpi: int = 100) -> bytes:
    """The figure as a PNG file, to be the value of an ipywidgets.Image."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    return picture.getvalue()
