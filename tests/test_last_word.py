"""Last words by hand, and on the tiny model against its own most likely tokens."""

from types import SimpleNamespace

import pytest
import torch

from edgelab.measure import MEASUREMENTS, Asked
from edgelab.measure.last_word import LastWordSum
from edgelab.measure.perplexity import Slice, Window, score, windows
from edgelab.measure.protocols import PROTOCOLS
from edgelab.tasks import LastWord, last_words

CUT = [Window(torch.zeros(6, dtype=torch.int64), 0, 5), Window(torch.zeros(4, dtype=torch.int64), 5, 3)]
ITEMS = [LastWord(0, 0, 1, "a"), LastWord(0, 2, 5, "bcd"), LastWord(1, 1, 3, "ef")]


def slices(first):
    """Slices of at most two positions; `first` says where the target, token 0, is the most likely one."""
    for window, hits in enumerate(first):
        for begin in range(0, len(hits), 2):
            part = torch.tensor(hits[begin : begin + 2], dtype=torch.float32)
            logits = torch.stack([part, 1 - part], 1)
            yield Slice(window, logits, torch.zeros(len(part), dtype=torch.int64), None)


def total(first, baseline=None):
    one = LastWordSum(ITEMS, CUT, baseline)
    for piece in slices(first):
        one.add(piece)
    return one.values()


def test_a_word_is_right_when_each_of_its_tokens_comes_first():
    assert total([[1, 0, 1, 1, 1], [0, 1, 0]]) == {
        "last_word": pytest.approx(2 / 3),
        "last_word_items": 3,
        "last_word_right": "11 0",
    }
    assert total([[0, 1, 1, 1, 0], [0, 1, 1]])["last_word_right"] == "00 1"


def test_beside_a_baseline():
    found = total([[1, 0, 1, 1, 1], [0, 1, 0]], baseline="10 1")
    assert (found["last_word_lost"], found["last_word_won"], found["delta_last_word"]) == (1, 1, 0)
    assert found["delta_last_word_low"] == -found["delta_last_word_high"] < 0


def test_on_the_tiny_model(tiny_reference, story):
    cut = windows(story, PROTOCOLS["edgelab-512"], tiny_reference.tokenizer, 4)
    asked = Asked(baseline={"window_nll": [1.0] * 4})  # of an older row, without answers
    subject = SimpleNamespace(
        asked=asked,
        session=SimpleNamespace(model=tiny_reference.model),
        text=story,
        rules=PROTOCOLS["edgelab-512"],
        cut=cut,
        reference_cut=cut,
        report=lambda done, total: None,
    )
    found = score(subject, [MEASUREMENTS["last_word"], MEASUREMENTS["perplexity"]])
    expected = []
    for index, window in enumerate(cut):
        with torch.no_grad():
            first = tiny_reference.model(window.ids[None]).logits[0, :-1].argmax(-1) == window.ids[1:]
        words = [one for one in last_words(story, cut) if one.window == index]
        expected.append("".join("01"[bool(first[one.first : one.last].all())] for one in words))
    assert found["last_word_right"] == " ".join(expected)
    assert found["last_word_items"] == len("".join(expected)) > 10
    assert "delta_last_word" not in found and found["delta_nll"] is not None
