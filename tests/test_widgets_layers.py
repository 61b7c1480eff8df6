"""The layer picker without a browser: what it writes is what the smaller model writes, and its button measures that."""

import pytest
import torch

from edgelab.ledger import Row
from edgelab.measure.sample import write
from edgelab.recipes import parse
from edgelab.reference import Reference
from edgelab.runtimes.eager import Eager
from edgelab.techniques.pruning.layers import without
from edgelab.widgets import layers
from edgelab.widgets.layers import layer_picker, recipe_without, written_without

PROMPT = "Every evening he"


@pytest.fixture
def reference(new_model, byte_tokenizer):
    return Reference("tiny", "", "", new_model("llama", num_hidden_layers=4), byte_tokenizer)


@pytest.fixture
def lives(monkeypatch):
    made = []

    class Pressed:
        def __init__(self, asked, done, locked, **settings):
            self.asked, self.done, self.locked, self.settings = asked, done, locked, settings
            self.box, self.offered = layers.ipywidgets.VBox(), 0
            made.append(self)

        def offer(self):
            self.offered += 1

    monkeypatch.setattr(layers, "Live", Pressed)
    return made


def controls(picker):
    text, _, grid, clear, answer, _, measured = picker.children
    return text, grid.children, clear, answer, measured


def test_a_tick_writes_what_the_smaller_model_writes(reference, lives):
    weights = [parameter.clone() for parameter in reference.model.parameters()]
    _, boxes, _, answer, _ = controls(layer_picker(reference, PROMPT, tokens=6))
    assert len(boxes) == 4 and "<b>4 of 4</b> blocks, 100.0% of the parameters" in answer.value
    seen = [answer.value]
    for place in (1, 2):
        boxes[place].value = True
        seen.append(answer.value)
    smaller = without(reference.model, {1, 2})
    expected = write(Eager(smaller), reference.tokenizer, PROMPT, 6)
    assert layers.html.escape(expected) in seen[2] and 'data-blocks="2"' in seen[2]
    share = sum(one.numel() for one in smaller.parameters()) / sum(map(torch.numel, weights))
    assert f"{share:.1%} of the parameters" in seen[2] and len(set(seen)) == 3
    assert all(map(torch.equal, weights, reference.model.parameters()))  # the reference is left alone
    assert reference.model.config.num_hidden_layers == 4


def test_another_prompt_is_continued(reference, lives):
    text, _, _, answer, _ = controls(layer_picker(reference, PROMPT, tokens=4))
    text.value = "<b> & gulls"
    assert "&lt;b&gt; &amp; gulls<b>" in answer.value


def test_the_button_measures_what_is_ticked(reference, lives):
    picker = layer_picker(reference, PROMPT, 2, drop=(3,), windows=4, only="quality")
    _, boxes, clear, _, measured = controls(picker)
    boxes[0].value = True
    (live,) = lives
    assert live.asked() == ["none", recipe_without({0, 3})]
    assert parse(live.asked()[1]).techniques[0].drop == "0/3"
    assert live.settings == {"windows": 4, "only": "quality"} and live.locked == [*boxes, clear]
    live.done([Row("none", ppl=20.0), Row(live.asked()[1], ppl=31.254)])
    live.done([Row("none", ppl=20.0), Row(recipe_without({2}), ppl=25.0)])
    places = [
        measured.value.index(text) for text in ("all blocks", "without 2<", "25.00", "without 0, 3", "31.25")
    ]
    assert places == sorted(places) and measured.value.count("all blocks") == 1


def test_all_blocks_come_back_at_once(reference, lives):
    _, boxes, clear, answer, _ = controls(layer_picker(reference, PROMPT, 2, drop=(0, 2, 3)))
    (live,) = lives
    offered = live.offered
    clear.click()
    assert "<b>4 of 4</b>" in answer.value and live.asked() == ["none"] and live.offered == offered + 1
    boxes[1].value = True
    assert "<b>3 of 4</b>" in answer.value


def test_without_blocks_or_a_prompt_nothing_is_written(reference):
    assert written_without(reference, {0, 1, 2, 3}, PROMPT, 2) == "Every block is ticked; leave at least one."
    assert written_without(reference, {0}, "", 2) == "A sequence goes on by at least one token."
