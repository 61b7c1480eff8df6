"""The layer picker: drop any blocks, read what the model writes without them, and measure that on demand."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ipywidgets

from edgelab.errors import EdgeLabError
from edgelab.ledger import Row
from edgelab.model.blocks import block_list
from edgelab.recipes import parse
from edgelab.techniques.pruning.layers import without
from edgelab.widgets import written_by
from edgelab.widgets.live import Live

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelab.reference import Reference

PROMPT = "The city of Paris is famous for"


def layer_picker(
    reference: Reference,
    prompt: str = PROMPT,
    tokens: int = 24,
    drop: tuple[int, ...] = (),
    **settings: object,
) -> ipywidgets.VBox:
    """Tick the blocks that go; the model writes on without them at once, and a button measures what is left.

    reference: as `edgelab.load` gives it; it stays as it is. tokens: that are written. drop: blocks that are ticked at
    first. settings: as of `edgelab.measure`, of the same model.
    """
    count = len(block_list(reference.model)[1])
    boxes = [
        ipywidgets.Checkbox(
            value=place in drop, description=str(place), indent=False, layout={"width": "56px"}
        )
        for place in range(count)
    ]
    text = ipywidgets.Text(prompt, description="Prompt", continuous_update=False, layout={"width": "560px"})
    clear = ipywidgets.Button(description="All blocks back")
    answer, measured = ipywidgets.HTML(), ipywidgets.HTML()
    known: dict[str, Row] = {}

    def gone() -> set[int]:
        return {place for place, box in enumerate(boxes) if box.value}

    def done(rows: list[Row]) -> None:
        known.update({row.recipe: row for row in rows})
        measured.value = _table(list(known.values()))

    live = Live(
        lambda: list(dict.fromkeys(["none", recipe_without(gone())])), done, [*boxes, clear], **settings
    )

    def redraw(change: Mapping | None = None) -> None:
        answer.value = written_without(reference, gone(), text.value, tokens)
        live.offer()

    def put_back(_: ipywidgets.Button) -> None:
        for box in boxes:  # one answer for all of them, not one for each
            box.unobserve(redraw, "value")
            box.value = False
            box.observe(redraw, "value")
        redraw()

    for control in (*boxes, text):
        control.observe(redraw, "value")
    clear.on_click(put_back)
    redraw()
    grid = ipywidgets.Box(boxes, layout={"flex_flow": "row wrap", "max_width": "640px"})
    return ipywidgets.VBox(
        [text, ipywidgets.Label("Blocks to drop"), grid, clear, answer, live.box, measured]
    )


def recipe_without(gone: set[int]) -> str:
    """The canonical recipe that drops these blocks."""
    return str(parse(f"prune.layers:drop={'/'.join(map(str, sorted(gone)))}")) if gone else "none"


def written_without(reference: Reference, gone: set[int], prompt: str, tokens: int) -> str:
    """HTML: how many blocks and parameters are left, and what they write; or why nothing is written."""
    count = len(block_list(reference.model)[1])
    if len(gone) == count:
        return "Every block is ticked; leave at least one."
    model = without(reference.model, gone)
    try:
        text = written_by(model, reference.tokenizer, prompt, tokens)
    except EdgeLabError as error:
        return html.escape(str(error))
    return (
        f'<span class="edgelab-layers" data-blocks="{count - len(gone)}"><b>{count - len(gone)} of {count}</b> blocks, '
        f"{_parameters(model) / _parameters(reference.model):.1%} of the parameters:</span><br>"
        f"{html.escape(prompt)}<b>{html.escape(text)}</b>"
    )


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _dropped(recipe: str) -> str:
    techniques = parse(recipe).techniques
    return f"without {techniques[0].drop.replace('/', ', ')}" if techniques else "all blocks"


def _table(rows: list[Row]) -> str:
    """HTML: all that was measured here, the best first."""
    body = "".join(
        f"<tr><td>{_dropped(row.recipe)}</td><td>{row.ppl:,.2f}</td></tr>"
        for row in sorted(rows, key=lambda row: row.ppl)
    )
    return f"<table><tr><th>measured here</th><th>perplexity</th></tr>{body}</table>" if rows else ""
