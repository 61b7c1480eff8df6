"""Extraction: an order is read out of a message and written as JSON, right where every character is.

The items are the project's own (`data/extraction.py`); sentences of the test are in no training item. A model that was
never trained on the form gets none of them: this task is for adapters.
"""

from __future__ import annotations

from typing import Any

from edgelab import assets, corpora
from edgelab.measure import Subject, measurement
from edgelab.measure.intervals import accuracy
from edgelab.measure.sample import write

TOKENS = 60  # the longest answer has fewer
ITEMS_FAST = 6


@measurement(
    "extraction",
    part="extraction",
    needs="session",
    corpus=corpora.EXTRACTION,
    fields=(
        "extraction",
        "extraction_items",
        "extraction_right",
        "delta_extraction",
        "delta_extraction_low",
        "delta_extraction_high",
        "extraction_lost",
        "extraction_won",
        "extraction_answers",
    ),
)
def extraction(subject: Subject) -> dict[str, Any]:
    """Share of messages whose order a variant writes exactly, and the paired difference to the baseline's."""
    items = corpora.extraction()[: ITEMS_FAST if assets.fast() else None]
    right, answers = [], []
    for prompt, wanted in items:
        written = write(subject.session, subject.tokenizer, prompt, TOKENS).strip()
        answers.append(written.partition("\n")[0])
        right.append([answers[-1] == wanted])
        subject.report(len(right), len(items))
    found = accuracy("extraction", right, (subject.asked.baseline or {}).get("extraction_right"))
    return found | {"extraction_answers": answers}
