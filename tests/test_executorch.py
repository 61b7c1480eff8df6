"""ExecuTorch on tiny models: PyTorch's logits, torchao's rounding close to them, and what it refuses."""

import pytest
import torch

from edgelab import runtimes
from edgelab.runtimes import RuntimeRefused
from edgelab.storage import variants

pytest.importorskip("executorch")
IDS = [3, 17, 250, 9, 88, 120, 45, 7, 61, 200, 33, 12]


def apart(runtime, folder, ids=IDS):
    """Distance of the logits from PyTorch's unrounded ones, relative."""
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([ids])).logits[0]
    return float((runtime.logits(ids) - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def pair(tmp_path_factory, new_model, byte_tokenizer):
    """One float32 variant in ExecuTorch and in PyTorch, and its folder."""
    folder = tmp_path_factory.mktemp("variants") / "none"
    variants.save(new_model("llama", max_position_embeddings=64), folder, {"recipe": "none"}, byte_tokenizer)
    return *(runtimes.load(name, folder) for name in ("executorch", "torch")), folder


def test_float_logits_are_those_of_pytorch(pair):
    engine, _, folder = pair
    assert engine.kernel == "XNNPACK float32" and apart(engine, folder) < 1e-5
    assert apart(engine, folder, IDS * 4) < 1e-5  # 48 tokens, in two pieces


def test_decoding_goes_on_as_pytorch_does_with_any_token(pair):
    engine, eager, _ = pair
    assert engine.prefill(IDS) == eager.prefill(IDS)
    for token in (5, 250, 0, 77):
        assert engine.decode(token) == eager.decode(token)
    assert engine.prefill(IDS[:3]) == eager.prefill(IDS[:3])  # a new sequence forgets the old one
    likely = engine.top(IDS, 5)
    assert [token for token, _ in likely] == [token for token, _ in eager.top(IDS, 5)]
    assert [p for _, p in likely] == sorted((p for _, p in likely), reverse=True)


def test_a_text_that_is_too_long_is_refused_in_one_sentence(pair):
    engine = pair[0]
    assert len(engine.logits([7] * 64)) == 64
    with pytest.raises(RuntimeRefused, match="holds 64 tokens"):
        engine.decode(7)


@pytest.mark.parametrize("layout", ["qwen2", "qwen3"])
def test_other_layouts(variant, layout):
    folder = variant("none", layout)
    assert apart(runtimes.load("executorch", folder), folder) < 1e-5


@pytest.mark.parametrize(("width", "most"), [("int8", 0.05), ("int4", 0.5)])
def test_torchaos_rounding(variant, width, most):
    folder = variant(f"native.{width}")
    engine = runtimes.load("executorch", folder)
    assert engine.kernel == f"XNNPACK {width}, int8 activations"
    assert most / 100 < apart(engine, folder) < most


def test_smaller_models(variant, smaller):
    folder = variant("none", **smaller)
    assert apart(runtimes.load("executorch", folder), folder) < 1e-4


@pytest.mark.parametrize(
    "text", ["quantize.rtn:bits=4,group_size=32", "quantize.kv:bits=8", "quantize.dynamic", "quantize.bf16"]
)
def test_what_it_cannot_run_is_refused_in_one_sentence(variant, text):
    words = "'none' is float32" if "bf16" in text else "'native.int4 @ executorch'"
    with pytest.raises(RuntimeRefused, match=words):
        runtimes.load("executorch", variant(text))


def test_an_unknown_layout_is_refused(variant):
    with pytest.raises(RuntimeRefused, match="not phi; use 'torch'"):
        runtimes.load("executorch", variant("none", "phi"))


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"GGUF" + data[4:], lambda _: b""]
)
def test_a_damaged_program_is_refused(pair, tmp_path, damage):
    from edgelab.runtimes.executorch import PROGRAM, ExecuTorch

    whole = runtimes.exported("executorch", pair[2]).folder / PROGRAM
    (tmp_path / PROGRAM).write_bytes(damage(whole.read_bytes()))
    with pytest.raises(RuntimeRefused, match="written anew"):
        ExecuTorch(tmp_path, 1)
