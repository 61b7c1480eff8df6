"""The budget of mixed precision to turn: bits of every layer, chosen anew from one table of sensitivities."""

import ipywidgets
import numpy as np

from edgelab.plots import bit_allocation
from edgelab.recipes import parse
from edgelab.techniques.quantization.mixed import SensitivityTable
from edgelab.widgets import Picture


def allocation_slider(table: SensitivityTable, bits: float = 4) -> ipywidgets.VBox:
    """Turn the budget, in bits of uniform quantization; the bits of each layer answer at once.

    table: as `Mixed().table(reference.model, Context(tokenizer=reference.tokenizer))` computes it, in about a minute
    for the embedded model the first time and in seconds afterwards. Nothing is measured here.
    """
    widths = [width for width, _ in table.formats]
    budget = ipywidgets.FloatSlider(
        min=min(widths),
        max=max(widths),
        value=bits,
        step=0.1,
        readout_format=".1f",
        description="Budget (bits)",
        continuous_update=False,
        style={"description_width": "100px"},
        layout=ipywidgets.Layout(width="auto", max_width="560px"),
    )
    answer, image = ipywidgets.HTML(), Picture(1000)
    group_size = table.formats[0][1]

    def redraw(change: dict | None = None) -> None:
        asked = round(budget.value, 1)
        choice = table.allocate(asked, group_size)
        answer.value = allocation_sentence(table, choice, asked, group_size)
        title = f"Bits of each layer within the bytes of {asked:g}-bit quantization"
        image.draw(bit_allocation(table.frame(choice), title))

    budget.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([budget, answer, image])


def allocation_sentence(table: SensitivityTable, choice: np.ndarray, bits: float, group_size: int) -> str:
    """HTML: bytes, range of bits and predicted loss, beside the widest uniform quantization within the same bytes.

    The prediction also stands in `data-predicted`.
    """
    frame, predicted = table.frame(choice), table.predicted(choice)
    uniform = max(width for width, size in table.formats if width <= bits and size in (group_size, 0))
    same = table.predicted(np.full(len(choice), [width for width, _ in table.formats].index(uniform)))
    wide = "groups" if table.formats[-1][1] else "rows"
    recipe = parse(f"quantize.mixed:bits={bits:g},group_size={group_size},wide={wide}")
    return (
        f'<span class="edgelab-allocation" data-predicted="{predicted:.6e}"><code>{recipe}</code>: '
        f"<b>{frame['bytes'].sum() / 1e6:,.1f} MB</b> of linear layers with their scales, "
        f"{frame['bits'].min()} to {frame['bits'].max()} bits; predicted ΔNLL <b>{predicted:.3f}</b> nats per token. "
        f"All layers at {uniform} bits: {same:.3f} predicted.</span>"
    )
