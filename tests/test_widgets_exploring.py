"""The method explorer without a browser: controls, the rows it shows, and a live measurement."""

import numpy as np
import pytest

from edgelab import ledger
from edgelab.lab import MeasureError
from edgelab.ledger import Row
from edgelab.recipes import TECHNIQUES
from edgelab.reference import Source
from edgelab.widgets import exploring, quantization

PNG = b"\x89PNG\r\n\x1a\n"
RTN4 = "quantize.rtn:bits=4,group_size=64"
MIXED4 = "quantize.mixed:bits=4,group_size=64"


@pytest.fixture(autouse=True)
def tiny_source(monkeypatch):
    monkeypatch.setattr(quantization, "resolve", lambda name: Source("tiny", "nowhere", "0"))


def row(recipe, window_nll, **changes):
    n_tokens = 511 * len(window_nll)
    values = {
        "family": "baseline" if recipe == "none" else "quantize",
        "model": "tiny",
        "protocol": "edgelab-512",
        "corpus": "wiki",
        "badge": "packed",
        "windows": len(window_nll),
        "n_tokens": n_tokens,
        "nll_sum": 511 * sum(window_nll),
        "ppl": float(np.exp(np.mean(window_nll))),
        "weights_mb": 40.0,
        "bits_per_weight": 10.0,
        "window_nll": window_nll,
    }
    return Row(recipe, **values | changes)


def parts(rows):
    widget = exploring.method_explorer(rows, windows=2)
    return dict(
        zip(("method", "bits", "group_size", "button", "answer", "picture"), widget.children, strict=True)
    )


def test_methods_are_those_with_bits_and_groups():
    found = exploring.methods()
    assert {"quantize.rtn", "quantize.mixed"} <= set(found) <= set(TECHNIQUES)
    assert not {"quantize.bf16", "quantize.kv"} & set(found)  # the bits of a cache are not those of a weight


def test_rows_of_a_single_method_at_its_defaults_are_shown():
    rows = ledger.frame(
        [
            row("none", [2.0, 3.0]),
            row(RTN4, [2.5, 3.1]),
            row(RTN4, [2.4, 3.0]),
            row(MIXED4, [2.3, 2.9]),
            row(f"{RTN4},embedding_bits=8", [2.5, 3.2]),
            row(f"{RTN4} @ llamacpp", [2.5, 3.2]),
            row("quantize.bf16 + quantize.rtn:bits=4,group_size=64", [2.5, 3.2]),
            row("quantize.lost:bits=4", [2.5, 3.2]),
        ]
    )
    points = exploring.by_method(rows)
    assert points[["recipe", "method", "bits", "group_size"]].to_numpy().tolist() == [
        [RTN4, "quantize.rtn", 4, 64],
        [MIXED4, "quantize.mixed", 4, 64],
    ]
    assert points["ppl"].iloc[0] == pytest.approx(np.exp(2.7))  # the newer of two
    assert exploring.by_method(rows.iloc[:1]).empty


def test_controls_name_the_point_and_redraw():
    seen = parts(ledger.frame([row("none", [2.0, 3.0]), row(RTN4, [2.5, 3.1]), row(MIXED4, [2.3, 2.9])]))
    assert bytes(seen["picture"].value).startswith(PNG)
    assert 'data-ppl="16.44' in seen["answer"].value
    before = bytes(seen["picture"].value)
    seen["method"].value = "quantize.mixed"
    assert "mixed 4-bit g64" in seen["answer"].value and bytes(seen["picture"].value) != before
    seen["bits"].value, seen["group_size"].value = 3, 32
    assert seen["answer"].value == "quantize.mixed:bits=3,group_size=32 has not been measured yet."


def test_what_a_method_refuses_cannot_be_measured(monkeypatch):
    seen = parts(ledger.frame([row("none", [2.0, 3.0]), row(RTN4, [2.5, 3.1])]))
    seen["bits"].options = (4, 9)
    seen["bits"].value = 9
    assert seen["answer"].value == "quantize.rtn:bits=9 is outside 2 to 8." and seen["button"].disabled
    seen["bits"].value = 4
    assert 'data-ppl="16.44' in seen["answer"].value and not seen["button"].disabled


def test_measuring_live_shows_that_it_runs_and_then_the_point(monkeypatch):
    said = []

    def measure(recipe, **settings):
        said.append((recipe, seen["answer"].value, seen["button"].disabled, settings))
        return row(recipe, [2.0, 3.0] if recipe == "none" else [2.5, 3.5])

    monkeypatch.setattr(exploring, "measure", measure)
    seen = parts(ledger.frame([]))
    assert "button measures it" in seen["answer"].value and not seen["picture"].value
    seen["button"].click()
    assert [recipe for recipe, *_ in said] == ["none", RTN4]
    assert all(f"Measuring <b>{recipe}</b>" in text and disabled for recipe, text, disabled, _ in said)
    assert said[0][3] == {"only": "quality", "windows": 2}
    assert "rtn 4-bit g64" in seen["answer"].value and bytes(seen["picture"].value).startswith(PNG)
    assert not seen["button"].disabled and not seen["bits"].disabled


def test_an_error_is_one_sentence(monkeypatch):
    def measure(recipe, **settings):
        raise MeasureError("none: The process was killed, most likely because <memory> ran out.")

    monkeypatch.setattr(exploring, "measure", measure)
    seen = parts(ledger.frame([row("none", [2.0, 3.0])]))
    seen["button"].click()
    assert seen["answer"].value.endswith("because &lt;memory&gt; ran out.") and not seen["button"].disabled
