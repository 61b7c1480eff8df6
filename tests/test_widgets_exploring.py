"""The explorer without a browser: controls, the rows it shows, and a live measurement."""

import itertools
import re
import time

import numpy as np
import pytest

from edgelab import assets, lab, ledger, recipes
from edgelab.lab.plan import Step
from edgelab.ledger import Row
from edgelab.widgets import BITS, GROUP_SIZES
from edgelab.widgets.exploring import explorer, recipe_of

PNG = '<img src="data:image/png;base64,'
RTN4 = "quantize.rtn:bits=4,group_size=64"
GPTQ4 = "quantize.gptq:bits=4,group_size=64"


def row(recipe, window_nll, **changes):
    n_tokens = 511 * len(window_nll)
    values = {
        "family": "baseline" if recipe == "none" else "quantize",
        "model": assets.EMBEDDED_NAME,
        "protocol": "edgelab-512",
        "corpus": "wiki",
        "badge": "packed",
        "windows": len(window_nll),
        "n_tokens": n_tokens,
        "nll_sum": 511 * sum(window_nll),
        "ppl": float(np.exp(np.mean(window_nll))),
        "weights_mb": 100.0 if recipe == "none" else 40.0,
        "bits_per_weight": 32.0 if recipe == "none" else 10.0,
        "window_nll": window_nll,
    }
    return Row(recipe, **values | changes)


SAVED = [row("none", [2.0, 3.0]), row(RTN4, [2.5, 3.1]), row(GPTQ4, [2.3, 2.9])]


def parts(rows, **settings):
    names = ("method", "bits", "group_size", "embedding", "over", "live", "answer", "picture")
    found = dict(zip(names, explorer(ledger.frame(rows), windows=2, **settings).children, strict=True))
    buttons, said = found["live"].children
    return found | {"button": buttons.children[0], "said": said}


def press(seen):
    """Press the button and wait until it can be pressed again."""
    seen["button"].click()
    deadline = time.monotonic() + 60
    while seen["button"].disabled and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not seen["button"].disabled


def test_methods_are_those_of_the_rows_and_rounding_to_nearest():
    assert parts(SAVED)["method"].options == ("quantize.gptq", "quantize.rtn")
    assert parts([])["method"].options == ("quantize.rtn",)


@pytest.mark.parametrize("over", ["weights_mb", "bits"])
def test_controls_name_the_point_and_redraw(over):
    seen = parts(SAVED, over=over)
    assert seen["picture"].value.startswith(PNG)
    assert 'data-ppl="16.44' in seen["answer"].value and "(packed)" in seen["answer"].value
    before = seen["picture"].value
    seen["method"].value = "quantize.gptq"
    assert "gptq 4-bit g64" in seen["answer"].value and seen["picture"].value != before
    seen["bits"].value, seen["group_size"].value, seen["embedding"].value = 3, 32, 8
    assert seen["answer"].value == (
        "quantize.gptq:bits=3,group_size=32 + quantize.embedding:bits=8 has not been measured yet."
    )


def test_the_picture_can_be_over_bytes_or_bits():
    seen = parts(SAVED)
    before = seen["picture"].value
    seen["over"].value = "bits"
    assert seen["picture"].value.startswith(PNG) and seen["picture"].value != before


def test_the_picture_has_its_title_and_axes_as_alt_text():
    alt = re.search(r'alt="([^"]+)"', parts(SAVED)["picture"].value)[1]
    assert "across: " in alt and "up: " in alt


def test_longer_rows_answer_for_their_first_windows():
    seen = parts([row("none", [2.0, 3.0, 9.0]), row(RTN4, [2.5, 3.1, 9.0])])
    assert 'data-ppl="16.44' in seen["answer"].value and "on 2 windows" in seen["answer"].value


def test_the_last_words_are_said_where_rows_have_them():
    words = {"last_word": 0.2, "last_word_right": "10 10"}
    assert "50.0% of last words right" in parts([row(RTN4, [2.5, 3.1], **words)])["answer"].value
    assert "last words" not in parts(SAVED)["answer"].value


def test_measuring_live_adds_the_baseline_and_the_point(monkeypatch):
    asked = []

    def planned(recipes, **settings):
        asked.append((recipes, settings))
        assert all(seen[name].disabled for name in ("method", "bits", "group_size", "embedding", "over"))
        return [Step(None, place=place) for place in range(2)]

    def follow(steps, show):
        yield steps[0], row("none", [2.0, 3.0])
        yield steps[1], row(RTN4, [2.5, 3.5])

    monkeypatch.setattr(lab, "planned", planned)
    monkeypatch.setattr(lab, "follow", follow)
    seen = parts([])
    assert "button measures it" in seen["answer"].value and not seen["picture"].value
    press(seen)
    assert asked == [(["none", RTN4], {"interleave": False, "only": "quality", "windows": 2})]
    assert "rtn 4-bit g64" in seen["answer"].value and seen["picture"].value.startswith(PNG)
    assert not any(seen[name].disabled for name in ("method", "bits", "group_size", "embedding", "over"))


def test_controls_become_canonical_recipes():
    for settings in itertools.product(("quantize.rtn", "quantize.gptq"), BITS, GROUP_SIZES, (0, 8)):
        assert str(recipes.parse(recipe_of(*settings))) == recipe_of(*settings)
