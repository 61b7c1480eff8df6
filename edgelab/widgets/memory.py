"""The memory calculator: what a model needs for inference or training, drawn against devices."""

from collections.abc import Mapping, Sequence

import ipywidgets

from edgelab.devices import (
    Device,
    MemoryNeed,
    ModelShape,
    catalogue,
    inference_memory,
    models,
    this_machine,
    training_memory,
)
from edgelab.plots import NEED_PARTS, gigabytes, memory_bars
from edgelab.widgets import Picture

INFERENCE_BITS = (32, 16, 8, 4, 3, 2)
TRAINING_BITS = (32, 16)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32)


def memory_calculator(
    shapes: Mapping[str, ModelShape] | None = None, devices: Sequence[Device] = ()
) -> ipywidgets.VBox:
    """Pick model, use, precision, context and batch; the picture and the sentence above it answer at once.

    `shapes` defaults to the models of the catalogue, `devices` to this machine and the catalogue.
    """
    shapes = dict(shapes or models())
    devices = list(devices) or [this_machine(), *catalogue()]
    wide = {"style": {"description_width": "80px"}, "layout": {"width": "auto", "max_width": "480px"}}
    model = ipywidgets.Dropdown(options=list(shapes), description="Model", **wide)
    use = ipywidgets.ToggleButtons(options=["inference", "training"], description="Use", **wide)
    bits = ipywidgets.ToggleButtons(options=INFERENCE_BITS, value=16, description="Bits", **wide)
    use.style.button_width, bits.style.button_width = "100px", "48px"
    context = ipywidgets.SelectionSlider(options=CONTEXTS, value=4096, description="Context", **wide)
    batch = ipywidgets.SelectionSlider(options=BATCHES, description="Batch", **wide)
    answer, image = ipywidgets.HTML(), Picture()

    def offer_bits(change: dict) -> None:
        kept = bits.value
        bits.options = TRAINING_BITS if change["new"] == "training" else INFERENCE_BITS
        bits.value = kept if kept in bits.options else bits.options[0]

    def redraw(change: dict | None = None) -> None:
        shape = shapes[model.value]
        needs = memory_needs(shape, use.value, context.value, batch.value)
        chosen = f"{bits.value}-bit"
        answer.value = memory_sentence(
            shape, needs[chosen], devices, f"{use.value} in {bits.value} bits", context.value
        )
        title = f"{shape.name}, {use.value}"
        image.draw(memory_bars(needs, devices, chosen, title))

    use.observe(offer_bits, "value")
    for control in (model, use, bits, context, batch):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([model, use, bits, context, batch, answer, image])


def memory_needs(shape: ModelShape, use: str, context: int, batch: int) -> dict[str, MemoryNeed]:
    """The need at every precision that `use` ("inference" or "training") allows, by names such as "4-bit"."""
    if use == "training":
        return {
            f"{bits}-bit": training_memory(shape, bits=bits, context=context, batch=batch)
            for bits in TRAINING_BITS
        }
    return {f"{bits}-bit": inference_memory(shape, bits, context, batch) for bits in INFERENCE_BITS}


def memory_sentence(
    shape: ModelShape, need: MemoryNeed, devices: Sequence[Device], use: str, context: int
) -> str:
    """HTML: the total and its parts, how many devices hold it, and whether the context is too long."""
    parts = [
        f"{words} {getattr(need, field):,.3g}"
        for field, (words, _) in NEED_PARTS.items()
        if getattr(need, field)
    ]
    fitting = sum(device.holds(need) for device in devices)
    text = (
        f"<b>{shape.name}</b>, {use}: <b>{gigabytes(need.total_gb)}</b> ({' + '.join(parts)}). "
        f"It fits {fitting} of {len(devices)} devices."
    )
    if 0 < shape.context_length < context:
        text += f" The model was made for {shape.context_length:,} tokens of context, not {context:,}."
    return text
