"""The protocol picker and the budget slider without a browser: controls, sentences, pictures."""

import math

import pytest

from edgelab import ledger
from edgelab.ledger import Row
from edgelab.measure.perplexity import Perplexity
from edgelab.measure.protocols import PROTOCOLS
from edgelab.plots import protocols
from edgelab.widgets.measuring import protocol_picker
from edgelab.widgets.side_by_side import budget_slider

PNG = '<img src="data:image/png;base64,'


@pytest.fixture
def results():
    """Two windows of 100 tokens each, 300 words of 1,200 bytes in all, NLL by protocol."""
    nll = {"edgelab-512": 600.0, "gptq-2048": 560.0, "llamacpp-512": 550.0, "lm-eval-word": 560.0}
    return {
        name: Perplexity([half / 2] * 2, [100, 100], 150, 800, PROTOCOLS[name].unit)
        for name, half in nll.items()
    }


def test_the_protocol_changes_sentence_and_picture(results):
    choice, answer, picture = protocol_picker(results).children
    assert tuple(choice.options) == tuple(PROTOCOLS)
    assert picture.value.startswith(PNG)
    for name in list(results)[1:]:
        before = answer.value, picture.value
        choice.value = name
        assert answer.value != before[0] and picture.value != before[1], name


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
    # Four windows of 512 or one of 2048 in 2,048 tokens, each drawn as seen and as scored, and one BOS token.
    assert len(bars) == 2 * (4 + 1 + 4 + 1) + 1
    assert perplexities.texts[0].get_text() == f"{math.exp(3):.2f}"
    assert bits.texts[0].get_text() == f"{600 / math.log(2) / 800:.3f}"


def test_fast_mode_is_stamped(results, monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    assert "FAST" in protocols(results, PROTOCOLS).get_suptitle()


# The budget slider


@pytest.fixture
def rows():
    found = [
        ("none", 20.0, 500.0, 600.0),
        ("quantize.bf16", 20.1, 250.0, 320.0),
        ("quantize.rtn:bits=4,group_size=64", 26.0, 120.0, 400.0),
    ]
    return ledger.frame(
        Row(recipe, ppl=ppl, weights_mb=weights_mb, peak_rss_mb=peak_mb, badge="packed")
        for recipe, ppl, weights_mb, peak_mb in found
    ).assign(model="tiny", protocol="edgelab-512", corpus="wiki", n_tokens=2044)


def test_slider_and_kind_of_budget_change_sentence_and_picture(rows):
    of, _, budget, answer, picture = budget_slider(rows, budget_mb=200).children
    assert "bits=4" in answer.value and "perplexity 26.00" in answer.value
    assert "next better one needs 250.0 MB" in answer.value
    for control, value, expected in [
        (budget, 100, "Nothing measured fits"),
        (budget, 260, "quantize.bf16"),
        (budget, 350, "quantize.bf16"),
        (of, "peak_rss_mb", "next better one needs 600.0 MB"),
        (budget, 600, "Nothing measured is better"),
    ]:
        before = picture.value
        control.value = value
        assert expected in answer.value
        assert picture.value.startswith(PNG) and picture.value != before


def test_another_measure_can_have_another_winner(rows):
    _, by, _, answer, picture = budget_slider(rows, budget_mb=300).children
    assert [name for _, name in by.options] == ["ppl"]
    tasked = rows.assign(last_word=[0.5, 0.3, 0.4])
    _, by, _, answer, picture = budget_slider(tasked, budget_mb=300).children
    before = picture.value
    assert "use quantize.bf16" in answer.value
    by.value = "last_word"
    assert "use quantize.rtn:bits=4,group_size=64: 120.0 MB, last words predicted 40.0%" in answer.value
    assert picture.value != before
