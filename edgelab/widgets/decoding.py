"""The decoding calculator: how many tokens per second the memory of a device allows, by model and bits."""

import html
from dataclasses import replace

import ipywidgets
import pandas as pd

from edgelab.devices import Device, ModelShape, catalogue, inference_memory, models, stored_bits, this_machine
from edgelab.plots import limit_tok_s

BITS = (32, 16, 8, 4, 3, 2)
GROUP_SIZE = 64
READING_TOK_S = 5  # about 230 words a minute


def decode_calculator(read_gb_s: float) -> ipywidgets.VBox:
    """Pick a model and its bits; the sentence and the table of devices answer at once.

    read_gb_s: bandwidth measured on this machine; that of the other devices is the peak of their data sheets.
    """
    shapes = models()
    devices = [replace(this_machine(), memory_bandwidth_gb_s=read_gb_s), *catalogue()]
    wide = {"style": {"description_width": "80px"}, "layout": {"width": "auto", "max_width": "480px"}}
    model = ipywidgets.Dropdown(options=list(shapes), description="Model", **wide)
    bits = ipywidgets.ToggleButtons(options=BITS, value=4, description="Bits", **wide)
    bits.style.button_width = "48px"
    answer = ipywidgets.HTML()

    def redraw(change: dict | None = None) -> None:
        shape = shapes[model.value]
        limits = decode_limits(shape, bits.value, devices)
        answer.value = limit_sentence(shape, bits.value, limits) + limits.round(1).to_html(na_rep="")

    for control in (model, bits):
        control.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([model, bits, answer])


def token_gb(shape: ModelShape, bits: int) -> float:
    """GB of weights read for one token: all but the table of an untied input embedding, of which one row is read.

    Below 16 bits in groups of GROUP_SIZE, each with a 16-bit scale and a zero-point. Norms are left out.
    """
    stored = stored_bits(bits, GROUP_SIZE) if bits < 16 else bits
    return (shape.linear_parameters + shape.vocab_size * shape.hidden_size) * stored / 8e9


def decode_limits(shape: ModelShape, bits: int, devices: list[Device]) -> pd.DataFrame:
    """Bandwidth, whether the weights fit, and bandwidth / bytes of a token, of every device with a known bandwidth."""
    need = inference_memory(shape, bits, group_size=GROUP_SIZE, context=512)
    rows = {
        device.name: {
            "GB/s": device.memory_bandwidth_gb_s,
            "fits": "yes" if device.holds(need) else "no",
            "tokens/s at most": limit_tok_s(1e3 * token_gb(shape, bits), device.memory_bandwidth_gb_s),
        }
        for device in devices
        if device.memory_bandwidth_gb_s is not None
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("device")


def limit_sentence(shape: ModelShape, bits: int, limits: pd.DataFrame) -> str:
    """HTML: the bytes of a token, and how many devices hold the model and can be as fast as a reader."""
    good = (limits["fits"] == "yes") & (limits["tokens/s at most"] >= READING_TOK_S)
    return (
        f"<b>{html.escape(shape.name)}</b> in {bits} bits reads <b>{token_gb(shape, bits):.2f} GB</b> for each token. "
        f"{good.sum()} of {len(limits)} devices hold it and allow at least {READING_TOK_S} tokens/s."
    )
