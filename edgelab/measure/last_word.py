"""Last word: the share of sentences whose last word the model puts first, each of its tokens after the true ones.

LAMBADA's question (arXiv:1606.06031), asked of every sentence of the text that perplexity is computed on and read from
the same logits. Perplexity averages over all tokens, most of them easy; a last word often needs the whole sentence.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgelab import tasks
from edgelab.measure import Subject, measurement
from edgelab.measure.intervals import accuracy
from edgelab.measure.perplexity import Slice, Window


class LastWordSum:
    """Keeps which tokens of the scored windows came first, and asks at the end for those of last words.

    baseline: the field `last_word_right` of the baseline, or None.
    """

    def __init__(self, items: list[tasks.LastWord], cut: list[Window], baseline: str | None = None) -> None:
        self.items, self.baseline = items, baseline
        self.first: list[list[bool]] = [[] for _ in cut]

    def add(self, piece: Slice) -> None:
        self.first[piece.window] += (piece.most_likely == piece.targets).tolist()

    def values(self) -> dict[str, Any]:
        right: list[list[bool]] = [[] for _ in self.first]
        for item in self.items:
            right[item.window].append(all(self.first[item.window][item.first : item.last]))
        return accuracy("last_word", right, self.baseline)


@measurement(
    "last_word",
    part="quality",
    needs="logits",
    fields=(
        "last_word",
        "last_word_items",
        "last_word_right",
        "delta_last_word",
        "delta_last_word_low",
        "delta_last_word_high",
        "last_word_lost",
        "last_word_won",
    ),
)
def last_word(subject: Subject) -> LastWordSum:
    """How many last words a variant predicts, and how many more or fewer than the baseline."""
    items = tasks.last_words(subject.text, subject.cut)
    baseline = (subject.asked.baseline or {}).get("last_word_right")
    if subject.cut is not subject.reference_cut and baseline is not None:
        # Other tokens may end elsewhere, and so make an item of another sentence.
        in_each = Counter(item.window for item in items)
        if [in_each[window] for window in range(len(subject.cut))] != [*map(len, baseline.split(" "))]:
            baseline = None
    return LastWordSum(items, subject.cut, baseline)
