"""The sparsity of pruning to turn: where the zeros go, what that should cost, and a button that measures it."""

import math
from collections.abc import Mapping

import ipywidgets
import numpy as np

from edgelab.ledger import Row
from edgelab.plots import sparsity_allocation
from edgelab.recipes import parse
from edgelab.techniques.pruning.measured import SparsityTable
from edgelab.widgets import WIDE, Picture
from edgelab.widgets.live import Live


def sparsity_slider(
    table: SparsityTable,
    ppl: float,
    sparsity: float = 0.5,
    technique: str = "prune.wanda",
    **settings: object,
) -> ipywidgets.VBox:
    """Turn the sparsity; where the zeros go and the predicted perplexity answer at once, a button measures it.

    table: as `Wanda().table(reference.model, Context(tokenizer=reference.tokenizer))` computes it, in less than a
    minute for the embedded model. ppl: perplexity of the reference, in the protocol of `settings`, which are those of
    `edgelab.measure`. technique: what is measured, with its settings but sparsity and by_layer.
    """
    amount = ipywidgets.FloatSlider(
        min=0,
        max=max(table.sparsities),
        value=sparsity,
        step=0.05,
        readout_format=".0%",
        description="Sparsity",
        continuous_update=False,
        **WIDE,
    )
    answer, measured, image = ipywidgets.HTML(), ipywidgets.HTML(), Picture(1000)

    def asked() -> list[str]:
        join = "," if ":" in technique else ":"
        return [str(parse(f"{technique}{join}sparsity={round(amount.value, 2)},by_layer=measured"))]

    def done(rows: list[Row]) -> None:
        measured.value = "".join(
            f"<code>{row.recipe}</code>: measured perplexity <b>{row.ppl:.2f}</b>" for row in rows
        )

    live = Live(asked, done, [amount], **settings)

    def redraw(change: Mapping | None = None) -> None:
        stay = table.allocate(round(amount.value, 2))
        measured.value = ""
        answer.value = sparsity_sentence(table, stay, round(amount.value, 2), ppl)
        title = f"Sparsity of each layer (%), where {amount.value:.0%} of all weights go"
        image.draw(sparsity_allocation(table.frame(stay), title))
        live.offer()

    amount.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([amount, answer, live.box, measured, image])


def sparsity_sentence(table: SparsityTable, stay: np.ndarray, sparsity: float, ppl: float) -> str:
    """HTML: the predicted perplexity of an allocation and of a uniform sparsity. stay: weights of each layer.

    The prediction is also in `data-predicted`.
    """
    frame = table.frame(stay)
    ours, theirs = (
        ppl * math.exp(cost) for cost in (frame["cost"].sum(), table.costs_at(table.uniform(sparsity)).sum())
    )
    return (
        f'<span class="edgelab-sparsity" data-predicted="{ours:.6e}">{frame["sparsity"].min():.0%} to '
        f"{frame['sparsity'].max():.0%} of a layer go; predicted perplexity <b>{ours:.1f}</b>, where the reference has "
        f"{ppl:.1f}. The same sparsity in every layer: {theirs:.1f} predicted.</span>"
    )
