"""The protocol picker: one model, one text, four rules of counting, and the numbers that come out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import ipywidgets

from edgelab.measure.protocols import PROTOCOLS, Protocol
from edgelab.plots import protocols
from edgelab.widgets import Picture

if TYPE_CHECKING:
    from edgelab.measure.perplexity import Perplexity

SCORED = {
    "all": "every token but the first of a window scores",
    "half": "only the second half of a window scores, so that every prediction has at least half a window before it",
    "rolling": "every token scores once, the first of a window after a single token of context",
}


def protocol_picker(results: Mapping[str, Perplexity], known: str = "edgelab-512") -> ipywidgets.VBox:
    """Choose a protocol; sentence and picture answer at once from `results`, perplexities by name of protocol.

    `known` is the protocol that the sentence compares with.
    """
    choice = ipywidgets.Dropdown(options=list(results), description="Protocol")
    answer, image = ipywidgets.HTML(), Picture(950)

    def redraw(change: dict | None = None) -> None:
        answer.value = protocol_sentence(PROTOCOLS[choice.value], results, known)
        image.draw(protocols(results, PROTOCOLS, choice.value))

    choice.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([choice, answer, image])


def protocol_sentence(rule: Protocol, results: Mapping[str, Perplexity], known: str) -> str:
    """HTML: what the protocol does, what it gives, and how that compares with the protocol `known`."""
    found = results[rule.name]
    bos = {
        "added": " Where the tokenizer adds a BOS token, every window begins with it.",
        "always": " The text begins with a BOS token.",
    }.get(rule.bos, "")
    text = (
        f"<b>{rule.name}</b>: windows of {rule.window:,} tokens; {SCORED[rule.scored]}.{bos} "
        f"{found.n_tokens:,} tokens scored, <b>perplexity {found.ppl:.2f}</b> per {rule.unit}, "
        f"{found.bits_per_byte:.3f} bits per byte."
    )
    if rule.name != known:
        text += f" That is {found.ppl / results[known].ppl:.2f} times the number of {known}, for the same weights."
    return text
