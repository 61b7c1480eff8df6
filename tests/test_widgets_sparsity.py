"""The sparsity slider without a browser: what it says is what the table allocates, and its button measures that."""

import math
import re

import numpy as np
import pytest

from edgelab.ledger import Row
from edgelab.recipes import parse
from edgelab.techniques.pruning.measured import SPARSITIES, SparsityTable
from edgelab.widgets import sparsity
from edgelab.widgets.sparsity import sparsity_slider


@pytest.fixture
def table():
    random = np.random.default_rng(0)
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(4) for kind in ("up_proj", "down_proj")]
    cost = random.lognormal(-3, 1, (8, 1)) * np.array(SPARSITIES) ** 3
    return SparsityTable(names, [(192, 64), (64, 192)] * 4, cost, 2048, list(SPARSITIES))


def predicted(answer):
    return float(re.search(r'data-predicted="([^"]+)"', answer.value)[1])


def test_the_slider_changes_sentence_and_picture(table):
    amount, answer, _, _, picture = sparsity_slider(table, ppl=20.0).children
    assert (amount.min, amount.max, amount.value) == (0, 0.9, 0.5)
    seen = []
    for value in (0, 0.3, 0.5, 0.75, 0.9):
        before = picture.value, answer.value
        amount.value = value
        assert value == 0.5 or (picture.value, answer.value) != before
        cost = table.costs_at(table.allocate(value)).sum()
        assert predicted(answer) == pytest.approx(20 * math.exp(cost), rel=1e-5)
        seen.append(predicted(answer))
    assert seen[0] == 20 and seen == sorted(seen)


def test_the_sentence_compares_with_uniform(table):
    _, answer, *_ = sparsity_slider(table, ppl=20.0).children
    uniform = 20 * math.exp(table.cost[:, SPARSITIES.index(0.5)].sum())
    assert f"in every layer: {uniform:.1f} predicted" in answer.value and predicted(answer) < uniform


@pytest.mark.parametrize("technique", ["prune.wanda", "prune.sparsegpt:samples=8"])
def test_the_button_measures_what_the_slider_says(technique, table, monkeypatch):
    made = []

    class Pressed:
        def __init__(self, asked, done, locked, **settings):
            self.asked, self.done, self.locked, self.settings = asked, done, locked, settings
            self.box = sparsity.ipywidgets.VBox()
            made.append(self)

        def offer(self):
            pass

    monkeypatch.setattr(sparsity, "Live", Pressed)
    amount, _, _, measured, _ = sparsity_slider(table, 20.0, technique=technique, windows=4).children
    amount.value = 0.35
    (live,) = made
    (text,) = live.asked()
    asked = parse(text).techniques[0]
    assert (asked.by_layer, asked.sparsity, asked.method) == ("measured", 0.35, technique.partition(":")[0])
    assert live.settings == {"windows": 4} and live.locked == [amount]
    live.done([Row(recipe=text, ppl=31.254)])
    assert "measured perplexity <b>31.25</b>" in measured.value
    amount.value = 0.4
    assert measured.value == ""
