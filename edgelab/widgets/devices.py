"""The device picker: a model in a precision on a device, its predicted rate, its memory and a verdict."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import ipywidgets

from edgelab.devices import (
    PRECISIONS,
    Device,
    Engine,
    MemoryNeed,
    ModelShape,
    Precision,
    battery_percent,
    catalogue,
    estimate,
    keep_device,
    models,
    own_device,
    this_machine,
)
from edgelab.errors import EdgeLabError
from edgelab.plots import gigabytes, memory_bars
from edgelab.plots.devices import READING_TOK_S, seconds
from edgelab.plots.memory import TIGHT
from edgelab.widgets import Picture

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


def device_picker(
    devices: Sequence[Device] = (),
    shapes: Mapping[str, ModelShape] | None = None,
    precisions: Mapping[str, Precision] = PRECISIONS,
    read_gb_s: float | None = None,
    engine: Engine | None = None,
) -> ipywidgets.VBox:
    """Pick device, model, precision and context; the sentence and the memory bar answer at once.

    devices and shapes default to the catalogues. read_gb_s adds this machine with its measured bandwidth, and `engine`
    what a calibration found here. Power that no source gives can be typed in; 0 is unknown. A device of the reader's
    own can be added below; it is kept in EDGELAB_HOME for the next time.
    """
    devices = list(devices) or catalogue()
    if read_gb_s:
        devices.insert(
            0, replace(this_machine(), memory_bandwidth_gb_s=read_gb_s, bandwidth_source="measured")
        )
    places = {device.name: device for device in devices}
    shapes = dict(shapes or models())
    wide = {"style": {"description_width": "80px"}, "layout": {"width": "auto", "max_width": "480px"}}
    place = ipywidgets.Dropdown(options=list(places), description="Device", **wide)
    model = ipywidgets.Dropdown(options=list(shapes), description="Model", **wide)
    precision = ipywidgets.Dropdown(options=list(precisions), description="Precision", **wide)
    context = ipywidgets.SelectionSlider(options=CONTEXTS, value=2048, description="Context", **wide)
    power = ipywidgets.BoundedFloatText(min=0, max=2000, step=0.5, description="Power (W)", **wide)
    answer, image = ipywidgets.HTML(), Picture()

    def offer_power(change: dict | None = None) -> None:
        power.value = places[place.value].power_w or 0

    def redraw(change: dict | None = None) -> None:
        chosen = places[place.value]
        device = replace(chosen, power_w=power.value or None)
        calibrated = engine if chosen.name == "This machine" else None
        row = estimate(
            device, shapes[model.value], precisions[precision.value], context.value, engine=calibrated
        )
        answer.value = verdict(device, row, context.value, shapes[model.value].context_length)
        need = MemoryNeed(row["weights_mb"] / 1000, row["kv_cache_mb"] / 1000)
        image.draw(memory_bars({precision.value: need}, [device], title=model.value))

    offer_power()
    place.observe(offer_power, "value")
    for control in (place, model, precision, context, power):
        control.observe(redraw, "value")
    redraw()

    def add(device: Device) -> None:
        places[device.name] = device
        place.options = list(places)
        place.value = device.name

    return ipywidgets.VBox([place, model, precision, context, power, answer, image, own_form(add)])


def own_form(added: Callable[[Device], None]) -> ipywidgets.Accordion:
    """A folded form for a device of the reader's own: it is kept in EDGELAB_HOME, and `added` is called with it."""
    wide = {"style": {"description_width": "120px"}, "layout": {"width": "auto", "max_width": "480px"}}
    name = ipywidgets.Text(placeholder="My phone", description="Name", **wide)
    memory = ipywidgets.FloatText(description="Memory (GB)", **wide)
    bandwidth = ipywidgets.FloatText(description="Bandwidth (GB/s)", **wide)
    compute = ipywidgets.FloatText(description="GFLOP/s, if known", **wide)
    part = ipywidgets.Dropdown(options=["phone", "CPU", "GPU"], description="Runs on", **wide)
    keep, told = ipywidgets.Button(description="Keep this device"), ipywidgets.HTML()

    def kept(button: ipywidgets.Button) -> None:
        try:
            device = own_device(
                name.value, bandwidth.value, memory.value, compute.value or None, runs_on=part.value
            )
            file = keep_device(device)
        except EdgeLabError as error:
            told.value = html.escape(str(error))
            return
        told.value = f"Kept in {html.escape(file.name)} of EDGELAB_HOME."
        added(device)

    keep.on_click(kept)
    form = ipywidgets.VBox([name, memory, bandwidth, compute, part, keep, told])
    return ipywidgets.Accordion([form], titles=("A device of your own",), selected_index=None)


def verdict(device: Device, row: Mapping, context: int, trained_context: int = 0) -> str:
    """HTML: what the device makes of the model, in one or two sentences that say where their numbers come from."""
    need_gb = (row["weights_mb"] + row["kv_cache_mb"]) / 1000
    name = f"<b>{html.escape(row['model'])}</b> in {html.escape(row['precision'])}"
    if not row["fits"]:
        return f"<b>No</b>: {name} needs {gigabytes(need_gb)}, {html.escape(device.name)} {_room(device)}."
    tight = device.room_gb - need_gb < TIGHT * device.room_gb
    text = "<b>Tight</b>: " if tight else "<b>Fits</b>: "
    text += f"{name} needs {gigabytes(need_gb)}, {html.escape(device.name)} {_room(device)}. "
    if row["decode_tok_s"] is None:
        return text + "How fast is not known: no source gives this device's bandwidth."
    rate = row["decode_tok_s"]
    pace = "faster" if rate >= READING_TOK_S else "slower"
    text += (
        f"About <b>{rate:.3g} tokens/s</b>, {pace} than a reader ({READING_TOK_S}); analytic, {row['basis']}."
    )
    if row["ttft_ms"] is not None:
        text += f" First token of a 512-token prompt after {seconds(row['ttft_ms'] / 1000)}."
    if row["energy_j_per_token"] is not None:
        text += f" {row['energy_j_per_token']:.2g} J per token ({row['energy_basis']})"
        if device.battery_wh:
            spent = battery_percent(row["energy_j_per_token"], device.battery_wh)
            text += f", {spent:.2g} % of the battery for 1,000 tokens"
        text += "."
    if 0 < trained_context < context:
        text += f" The model was made for {trained_context:,} tokens of context, not {context:,}."
    return text


def _room(device: Device) -> str:
    if device.room_gb is None:
        return "has an unknown memory"
    return f"leaves {device.room_gb:.3g} of its {device.memory_gb:g} GB to a model"
