"""Scaled rotary frequencies on engines that make tables or graphs of them: tiny models that have read a little.

They pass the parity gate, and what is exported without the scaling fails it.
"""

import math

import pytest
import torch

from edgelab import runtimes
from edgelab.storage import variants
from tests import trained_layouts
from tests.trained_layouts import GRIDS, ROWS, entropy, quantized, verdict

SETTINGS = {
    "linear": {"rope_type": "linear", "factor": 16.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8},
}
CASES = [  # an engine, a layout and its scaling
    ("onnxruntime", "llama", "linear"),
    ("onnxruntime", "llama", "yarn"),
    ("onnxruntime", "mistral", "yarn"),
    ("onnxruntime", "qwen2", "yarn"),
    ("onnxruntime", "qwen3", "yarn"),
    ("openvino", "llama", "llama3"),
    ("openvino", "llama", "linear"),
    ("openvino", "qwen3", "yarn"),
]
PACKAGE = {"onnxruntime": "onnxruntime_genai", "openvino": "openvino"}
ROUNDED_CACHE = 0.3  # of a standard deviation, for keys and values that an engine keeps in int8


@pytest.fixture(scope="module")
def texts():
    """`texts(layout)`: what a model reads, and windows that it has not read."""
    tokenized = trained_layouts.tokenize(trained_layouts.learned_tokenizers_of_both_kinds())
    return lambda layout: tokenized[trained_layouts.kind_of(layout)]


@pytest.fixture(scope="module")
def unread(new_model):
    """`unread(layout, kind)`: a fresh model; of kind None it scales nothing."""

    def unread(layout, kind):
        scaling = SETTINGS[kind] if kind else {"rope_type": "default"}
        return new_model(layout, vocab_size=ROWS, rope_parameters={"rope_theta": 1e4, **scaling})

    return unread


@pytest.fixture(scope="module")
def trained(unread, texts):
    """`trained(layout, kind)`: a model whose mean entropy is below half of ln V."""
    made = {}

    def train(layout, kind):
        if (layout, kind) not in made:
            made[layout, kind] = trained_layouts.train(unread(layout, kind), *texts(layout))
        return made[layout, kind]

    return train


@pytest.fixture
def session(tmp_path, byte_tokenizer):
    """`session(engine, model, name)`: a model on an engine."""

    def session(engine, model, name):
        variants.save(model, tmp_path / name, {"recipe": "none"}, byte_tokenizer)
        return runtimes.load(engine, tmp_path / name)

    return session


@pytest.mark.embedded
@pytest.mark.parametrize(("engine", "layout", "kind"), CASES)
def test_a_trained_model_passes_the_gate_with_its_scaling_and_fails_it_without(
    engine, layout, kind, trained, unread, texts, session
):
    pytest.importorskip(PACKAGE[engine])
    model, asked = trained(layout, kind), texts(layout)[1]
    assert entropy(model, asked) < 0.5 * math.log(ROWS)
    for grid in ("float32", "4 bits"):
        twin = quantized(model, GRIDS[grid])
        running = session(engine, twin, grid)
        found = verdict(running, twin, asked)
        assert found.passed, (grid, found.detail)
        if grid == "float32":
            assert_writes_as(running, model, asked[0, :40].tolist())
        running.close()
    lacking = unread(layout, None)
    lacking.load_state_dict(model.state_dict())
    found = verdict(session(engine, lacking, "lacking"), model, asked)
    assert not found.passed, found.detail


def assert_writes_as(running, model, ids):
    """32 tokens, each the most likely one of PyTorch, or as near to it as keys and values of few bits allow."""
    slack = ROUNDED_CACHE if running.cache_bits < 32 else 0.0
    token = running.prefill(ids)
    for _ in range(32):
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0, -1]
        assert wanted.max() - wanted[token] <= slack * wanted.std()
        ids = [*ids, token]
        token = running.decode(token)
