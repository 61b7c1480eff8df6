"""The adapter switch: one base model in memory, several adapters beside it, and what each of them writes."""

from __future__ import annotations

import copy
import html
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ipywidgets

from edgelab.storage import adapters
from edgelab.widgets import WIDE, written_by

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgelab.reference import Reference

NOTHING = "no adapter"


def adapter_switch(
    reference: Reference, folders: Mapping[str, Path], prompt: str = "Once upon a time", tokens: int = 30
) -> ipywidgets.VBox:
    """Choose an adapter; the same base model writes on with it at once.

    reference: as `edgelab.load` gives it; it stays as it is. folders: by name, where adapters of it lie, such as the
    variants of lora. tokens: that are written. Raises AdapterError for an adapter of another model.
    """
    model = copy.deepcopy(reference.model)
    for name, folder in folders.items():
        adapters.read(model, folder, name)
    first = next(iter(folders), NOTHING)
    choice = ipywidgets.ToggleButtons(options=[NOTHING, *folders], value=first, description="Adapter")
    text = ipywidgets.Textarea(prompt, description="Prompt", continuous_update=False, **WIDE)
    answer = ipywidgets.HTML()

    def redraw(change: Mapping | None = None) -> None:
        answer.value = "…"
        answer.value = written_with(model, reference, choice.value, text.value, tokens)

    for control in (choice, text):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([choice, text, answer])


def written_with(model: PreTrainedModel, reference: Reference, name: str, prompt: str, tokens: int) -> str:
    """HTML: how long the switch took, the bytes that speak besides the base, and what is written."""
    started = time.perf_counter()
    adapters.use(model, None if name == NOTHING else name)
    switch_ms = 1e3 * (time.perf_counter() - started)
    held = 0 if name == NOTHING else sum(one.nbytes for one in adapters.adapter_tensors(model, name).values())
    written = written_by(model, reference.tokenizer, prompt, tokens)
    return (
        f'<span class="edgelab-adapter" data-mb="{held / 1e6:.3f}">Switched in {switch_ms:.0f} ms; '
        f"{held / 1e6:.1f} MB beside the base of {_bytes(reference.model) / 1e6:.0f} MB.</span><br>"
        f"{html.escape(prompt)}<b>{html.escape(written)}</b>"
    )


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
