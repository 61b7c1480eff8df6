"""Widgets: the only place that imports ipywidgets. They draw into a Picture, which works on any ipykernel.

JupyterLab with ipykernel 7 can handle widget messages on a second thread, where pyplot and Output widgets lose
their target. A Figure that is rendered and put into HTML needs neither.
"""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

import ipywidgets

from edgelab.plots.style import Chart

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BITS = tuple(range(2, 9))
GROUP_SIZES = (32, 64, 96, 192, 0)  # 0: a whole row
WIDE = {"style": {"description_width": "90px"}, "layout": {"width": "auto", "max_width": "560px"}}


def group_words(size: int) -> str:
    return f"groups of {size}" if size else "one group per row"


class Picture(ipywidgets.HTML):
    """A picture as wide as the page or `width` pixels, with its alt text, for which ipywidgets.Image has no place."""

    def __init__(self, width: int = 850) -> None:
        super().__init__()
        self.pixels = width

    def draw(self, chart: Chart) -> None:
        """Show a chart in place of what is there."""
        png, about = chart._repr_png_()
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        style = f"width:{self.pixels}px;max-width:100%"
        self.value = f'<img src="{source}" alt="{html.escape(about["alt"])}" style="{style}">'


def written_by(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """What a model in memory writes after a prompt, greedily; it stays as it is."""
    from edgelab.measure.sample import write  # widgets over saved rows do without torch
    from edgelab.runtimes.eager import Eager

    session = Eager(model)
    try:
        return write(session, tokenizer, prompt, tokens)
    finally:
        session.close()
