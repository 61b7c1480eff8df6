"""The extraction task: its data are what the script writes, tests hold out sentences and words, and right is exact."""

import importlib.util
import itertools
import json
import random
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from edgelab import assets, corpora
from edgelab.corpora import CorpusError
from edgelab.measure.extraction import extraction
from edgelab.recipes import parse


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("extraction", assets.data_dir() / "extraction.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read():
    return [json.loads(line) for line in (assets.data_dir() / "extraction.jsonl").read_text().splitlines()]


def test_the_file_is_what_the_script_writes(script):
    draw = random.Random(script.SEED)
    assert read() == [item for split in script.ITEMS for item in script.items(split, draw)]


def test_the_test_holds_out_sentences_and_words(script):
    parts = {split: [item for item in read() if item["split"] == split] for split in ("training", "test")}
    assert not set(script.TRAINING) & set(script.TEST)
    assert not {one["message"] for one in parts["training"]} & {one["message"] for one in parts["test"]}
    things = {split: {json.loads(one["answer"])["item"] for one in items} for split, items in parts.items()}
    assert things["test"] - things["training"] == set(script.THINGS[20:])


def test_every_answer_is_in_its_message():
    for item in read():
        for name, value in json.loads(item["answer"]).items():
            assert str(value) in item["message"], (name, item)


def test_as_a_corpus_it_holds_prompts_and_answers():
    prompt, answer = corpora.extraction()[0]
    assert prompt.startswith("Message: ") and prompt.endswith("\nOrder:")
    assert corpora.read("extraction").startswith(f"{prompt} {answer}\n\nMessage: ")
    assert len(corpora.extraction("training")) == 1200 and len(corpora.extraction()) == 120
    with pytest.raises(CorpusError, match="not for calibration, so that texts never overlap"):
        corpora.read("extraction", "calibration")


class Parrot:
    """A session and its tokenizer, of characters, that answers every third item rightly and goes on after it."""

    eos_token_id = bos_token_id = 0
    add_bos_token = False
    added_tokens_encoder: ClassVar[dict[str, int]] = {}
    vocabulary = 0x110000  # characters

    def __init__(self):
        self.asked = 0

    def __call__(self, text, **_):
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids, **_):
        if isinstance(ids, int):
            return next(self.answer)
        return "".join(map(chr, ids))

    def prefill(self, ids):
        prompt = "".join(map(chr, ids))
        answer = dict(corpora.extraction())[prompt.removeprefix("\0")]
        answer = answer if self.asked % 3 == 0 else answer[:-1]
        self.asked += 1
        self.answer = map(ord, itertools.chain(answer, "\n", itertools.repeat("x")))
        return next(self.answer)


def test_only_exact_answers_count(monkeypatch):
    monkeypatch.setattr(sys.modules[extraction.__module__], "TOKENS", 120)
    parrot = Parrot()
    subject = SimpleNamespace(
        session=parrot,
        tokenizer=parrot,
        asked=SimpleNamespace(baseline=None),
        report=lambda done, total: None,
    )
    found = extraction(subject)
    assert found["extraction"] == pytest.approx(1 / 3) and found["extraction_items"] == 120
    assert (
        found["extraction_right"].startswith("1 0 0 1")
        and found["extraction_answers"][0] == corpora.extraction()[0][1]
    )
    subject.asked.baseline = found
    parrot.asked = 0
    again = extraction(subject)
    assert again["delta_extraction"] == 0 and again["extraction_lost"] == again["extraction_won"] == 0


def test_other_items_are_another_text(tmp_path, monkeypatch):
    """What is trained on them has another address, too."""
    before, technique = corpora.identity("extraction"), parse("lora:corpus=extraction").techniques[0]
    assert before.startswith("extraction.jsonl-") and technique.reads() == [before]
    assert parse("lora:corpus=stories").techniques[0].reads() == []
    changed = (assets.data_dir() / "extraction.jsonl").read_text().replace("Ada", "Eda")
    (tmp_path / "extraction.jsonl").write_text(changed)
    monkeypatch.setattr(assets, "data_dir", lambda: tmp_path)
    assert corpora.identity("extraction") != before and technique.reads() == [corpora.identity("extraction")]
