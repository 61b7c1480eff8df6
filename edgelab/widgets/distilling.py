"""The temperature of a teacher to turn: what it says then, and what a student of few means makes of it."""

from collections.abc import Mapping, Sequence

import ipywidgets
import numpy as np

from edgelab.plots.distilling import covering_and_seeking, even_students, sizes_of
from edgelab.widgets import WIDE, Picture

NAMED = 14  # tokens


def temperature_slider(logits: Sequence[float], tokens: Sequence[str]) -> ipywidgets.VBox:
    """Turn the temperature; the teacher's distribution and the best students under both KLs answer at once.

    logits: of the next token, (vocabulary,). tokens: the text of every token, in the same order.
    """
    logits = np.asarray(logits, dtype=np.float64)
    order = np.argsort(-logits, kind="stable")[:NAMED]
    likeliest = [tokens[place] for place in order]
    amount = ipywidgets.FloatLogSlider(
        min=-0.5, max=0.3, step=0.05, value=1.0, readout_format=".2f", description="Temperature", **WIDE
    )
    answer, image = ipywidgets.HTML(), Picture(1000)

    def redraw(change: Mapping | None = None) -> None:
        p = softened(logits, amount.value)
        answer.value = temperature_sentence(p, amount.value, likeliest[0])
        image.draw(covering_and_seeking(p, likeliest))

    amount.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([amount, answer, image])


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature), (vocabulary,) float64."""
    scaled = np.exp((logits - logits.max()) / temperature)
    return scaled / scaled.sum()


def temperature_sentence(p: np.ndarray, temperature: float, likeliest: str) -> str:
    """HTML: how sure the teacher is, over how many tokens, and how many each KL would have a student cover.

    The two numbers are also in `data-kl` and `data-reverse-kl`.
    """
    entropy = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum()
    found = even_students(p, sizes_of(len(p)))
    covers, seeks = int(found["kl"].idxmin()), int(found["reverse_kl"].idxmin())
    return (
        f'<span class="edgelab-temperature" data-kl="{covers}" data-reverse-kl="{seeks}">At temperature '
        f"{temperature:.2f} the teacher gives {p.max():.1%} to <code>{likeliest!r}</code> and is as unsure as if it "
        f"chose evenly among {np.exp(entropy):,.1f} tokens. A student that can only spread evenly should take "
        f"<b>{covers:,}</b> tokens by KL(teacher ‖ student) and <b>{seeks:,}</b> by KL(student ‖ teacher).</span>"
    )
