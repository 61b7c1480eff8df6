"""LiteRT on tiny models: PyTorch's next tokens, its own rounding close to them, and what it refuses."""

import importlib.util
import shutil
import types
import uuid

import pytest
import torch

from edgelab import runtimes
from edgelab.runtimes import RuntimeRefused, litert
from edgelab.storage import variants

pytest.importorskip("litert_torch")
IDS = [3, 17, 250, 9, 88, 120, 45, 7, 61, 200, 33, 12]


def last(runtime, ids=IDS, count=300):
    """Log-probabilities of all next tokens, in the order of the vocabulary."""
    return torch.tensor([p for _, p in sorted(runtime.top(ids, count))])


def apart(engine, folder, ids=IDS):
    """Distance of the log-probabilities from PyTorch's unrounded ones, relative."""
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return float((last(engine, ids) - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def pair(tmp_path_factory, new_model, byte_tokenizer):
    """One float32 variant in LiteRT and in PyTorch, and its folder."""
    folder = tmp_path_factory.mktemp("variants") / "none"
    variants.save(new_model("llama"), folder, {"recipe": "none"}, byte_tokenizer)
    return *(runtimes.load(name, folder) for name in ("litert", "torch")), folder


def test_float_log_probabilities_are_those_of_pytorch(pair):
    engine, _, folder = pair
    assert engine.kernel == "XNNPACK float32"
    for ids in (IDS, IDS[:1], IDS * 11, IDS * 24):  # of 12 tokens, one, 132 and 288: up to three pieces
        assert apart(engine, folder, ids) < 1e-4


def test_decoding_goes_on_as_pytorch_does_with_any_token(pair):
    engine, eager, _ = pair
    assert engine.prefill(IDS) == eager.prefill(IDS)
    for token in (5, 250, 0, 77):
        assert engine.decode(token) == eager.decode(token)
    assert engine.prefill(IDS[:3]) == eager.prefill(IDS[:3])  # a new sequence forgets the old one


def test_a_text_fills_the_cache_and_no_more(pair):
    engine, eager, _ = pair
    full = (IDS * 200)[: engine.room]
    assert engine.prefill(full) == eager.prefill(full)
    with pytest.raises(RuntimeRefused, match="holds 2048 tokens"):
        engine.decode(7)


def test_an_export_whose_functions_got_one_name_is_tried_once_more(variant, monkeypatch, tmp_path):
    from litert_torch.backend.jax_bridge import _wrap

    folder, drawn = variant("none"), []

    def alike_at_first():
        drawn.append(uuid.UUID(int=7) if len(drawn) < 2 else uuid.uuid4())
        return drawn[-1]

    monkeypatch.setattr(_wrap, "uuid", types.SimpleNamespace(uuid4=alike_at_first))
    (tmp_path / "out").mkdir()
    made = runtimes.export_to("litert", folder, tmp_path / "out")
    assert drawn[0] == drawn[1] and {file.name for file in made.folder.iterdir()} == {
        litert.BUNDLE,
        litert.MODEL,
        litert.NOTE,
        runtimes.NOTE,
    }


@pytest.mark.parametrize(("width", "most"), [("int8", 0.2), ("int4", 1)])
def test_its_own_rounding(variant, width, most):
    folder = variant(f"native.{width}")
    engine = runtimes.load("litert", folder)
    assert engine.kernel == f"XNNPACK {width}, int8 activations"
    assert most / 200 < apart(engine, folder) < most


def test_smaller_models(variant, smaller):
    folder = variant("none", **smaller)
    assert apart(runtimes.load("litert", folder), folder) < 1e-4


@pytest.mark.parametrize(
    "text", ["quantize.rtn:bits=4,group_size=32", "quantize.kv:bits=8", "quantize.dynamic", "quantize.bf16"]
)
def test_what_it_cannot_run_is_refused_in_one_sentence(variant, text):
    words = "'none' is float32" if "bf16" in text else "'native.int8 @ litert'"
    with pytest.raises(RuntimeRefused, match=words):
        runtimes.load("litert", variant(text))


@pytest.mark.parametrize("layout", ["qwen2", "qwen3"])
def test_other_layouts(variant, layout):
    folder = variant("none", layout)
    assert apart(runtimes.load("litert", folder), folder) < 1e-4


def test_an_unknown_layout_is_refused(variant):
    with pytest.raises(RuntimeRefused, match="not phi; use 'torch'"):
        runtimes.load("litert", variant("none", "phi"))


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"GGUF" + data[4:8][::-1] + data[8:], lambda _: b""],
)
def test_a_damaged_model_is_refused(pair, tmp_path, damage):
    from edgelab.runtimes.litert import MODEL, NOTE, LiteRt

    whole = runtimes.exported("litert", pair[2]).folder
    shutil.copy(whole / NOTE, tmp_path)
    (tmp_path / MODEL).write_bytes(damage((whole / MODEL).read_bytes()))
    with pytest.raises(RuntimeRefused, match="written anew"):
        LiteRt(tmp_path, 1)


def test_tensorflow_is_not_left_behind(pair):
    assert importlib.util.find_spec("tensorflow") is None
