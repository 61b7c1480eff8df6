"""The adapter switch: one base, several adapters, and each of them writes what it writes alone."""

import re

import pytest
import torch

from edgelab import training
from edgelab.measure.sample import write
from edgelab.recipes import parse
from edgelab.reference import resolve
from edgelab.runtimes.eager import Eager
from edgelab.storage import variants
from edgelab.widgets.adapters import adapter_switch

ROWS = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def folders(monkeypatch, tiny):
    """Two adapters that say very different things."""
    monkeypatch.setattr(training, "windows", lambda *arguments: ROWS)
    recipes = {
        "one": "lora:rank=4,steps=2,batch=2,length=24,learning_rate=0.1",
        "two": "lora:rank=2,steps=3,batch=2,length=24,learning_rate=0.2,targets=attention",
    }
    source = resolve(str(tiny))
    return {
        name: variants.build(parse(recipe), source, 0, lambda done, total: None)
        for name, recipe in recipes.items()
    }


def test_each_writes_what_it_writes_alone(tiny_reference, folders):
    before = {name: one.clone() for name, one in tiny_reference.model.state_dict().items()}
    box = adapter_switch(tiny_reference, folders, "ab", 6)
    choice, _, answer = box.children
    assert choice.options == ("no adapter", "one", "two")
    alone = {name: variants.load(folder) for name, folder in folders.items()} | {
        "no adapter": tiny_reference.model
    }
    for name in ("one", "no adapter", "two", "one"):
        choice.value = name
        expected = write(Eager(alone[name]), tiny_reference.tokenizer, "ab", 6)
        assert answer.value.endswith(f"ab<b>{expected}</b>"), name
        bytes_ = 1e6 * float(re.search(r'data-mb="([\d.]+)"', answer.value)[1])
        about = 0 if name == "no adapter" else variants.read_about(folders[name])["size"]["adapter_bytes"]
        assert bytes_ == pytest.approx(about, abs=1000)
    for name, one in tiny_reference.model.state_dict().items():
        assert torch.equal(one, before[name])
