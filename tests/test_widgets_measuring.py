"""The protocol picker and the budget slider without a browser: controls, sentences, pictures."""

import math

import pandas as pd
import pytest

from edgelab.measure.perplexity import PROTOCOLS, Perplexity
from edgelab.plots import protocols
from edgelab.widgets.measuring import protocol_picker

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def results():
    """Two windows of 100 tokens each, 300 words of 1,200 bytes in all, NLL by protocol."""
    nll = {"edgelab-512": 600.0, "gptq-2048": 560.0, "llamacpp-512": 550.0, "lm-eval-word": 560.0}
    return {
        name: Perplexity([half / 2] * 2, [100, 100], 150, 800, PROTOCOLS[name].unit) for name, half in nll.items()
    }


def test_the_protocol_changes_sentence_and_picture(results):
    choice, answer, picture = protocol_picker(results).children
    assert tuple(choice.options) == tuple(PROTOCOLS)
    assert bytes(picture.value).startswith(PNG)
    for name in list(results)[1:]:
        before = answer.value, bytes(picture.value)
        choice.value = name
        assert answer.value != before[0] and bytes(picture.value) != before[1], name


def test_the_sentence_says_rule_number_and_ratio(results):
    choice, answer, _ = protocol_picker(results).children
    assert f"perplexity {math.exp(3):.2f}" in answer.value and "per token" in answer.value
    assert "times" not in answer.value
    choice.value = "llamacpp-512"
    assert "second half" in answer.value and "BOS" in answer.value
    assert f"{math.exp(2.75) / math.exp(3):.2f} times the number of edgelab-512" in answer.value
    choice.value = "lm-eval-word"
    assert f"perplexity {math.exp(560 / 150):.2f}</b> per word" in answer.value


def test_strips_show_the_windows_of_each_protocol(results):
    strips, perplexities, bits = protocols(results, PROTOCOLS, "gptq-2048").axes
    assert [tick.get_text() for tick in strips.get_yticklabels()] == list(PROTOCOLS)
    bars = [bar for bar in strips.patches if bar.get_width()]
    # Four windows of 512 or one of 2048 in 2,048 tokens, each drawn as seen and as scored.
    assert len(bars) == 2 * (4 + 1 + 4 + 1)
    assert [text.get_text() for text in perplexities.texts][0] == f"{math.exp(3):.2f}"
    assert [text.get_text() for text in bits.texts][0] == f"{600 / math.log(2) / 800:.3f}"


def test_fast_mode_is_stamped(results, monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    assert "FAST" in protocols(results, PROTOCOLS).get_suptitle()
