"""ONNX Runtime on tiny models: our integers in the graph to the bit, PyTorch's logits, and what it refuses."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgelab import recipes, runtimes
from edgelab.reference import resolve
from edgelab.runtimes import RuntimeRefused, onnx_export
from edgelab.storage import variants
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.rtn import quantize_affine

IDS = [3, 17, 250, 9, 88, 120, 45, 7, 61, 200, 33, 12]


def apart(runtime, folder):
    """Distance of the logits from PyTorch's dequantized ones, relative."""
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([IDS])).logits[0]
    return float((runtime.logits(IDS) - expected).norm() / expected.norm())


def initializers(folder):
    graph = onnx.load(folder / onnx_export.GRAPH)
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


@pytest.mark.parametrize(
    "layout", ["llama", "mistral", "qwen2", "qwen3"]
)  # the rest in test_phone_layouts.py
def test_float_logits_are_those_of_pytorch(variant, layout):
    folder = variant("none", layout)
    assert apart(runtimes.load("onnxruntime", folder), folder) < 1e-5


@pytest.mark.parametrize(
    "text",
    [
        "quantize.rtn:bits=4,group_size=32",
        "quantize.rtn:bits=4,group_size=0,symmetric=true",
        "quantize.rtn:bits=3,group_size=64",
        "quantize.rtn:bits=8,group_size=0",
        "quantize.rtn:bits=6,group_size=32 + quantize.embedding:bits=8",
        "quantize.rtn:bits=4,group_size=32,embedding_bits=8",
        "quantize.rtn:bits=4,group_size=32,embedding_bits=4",
        "quantize.hqq:bits=4,group_size=64",
        "quantize.ternary:group_size=64",
    ],
)
def test_logits_with_our_integers_are_those_of_pytorch(variant, text):
    """Up to activations rounded to int8, which hqq's zero-points between integers do without."""
    folder = variant(text)
    runtime = runtimes.load("onnxruntime", folder)
    assert "MatMulNBits" in runtime.kernel
    assert apart(runtime, folder) < (1e-4 if "hqq" in text else 0.05)


def test_the_graph_holds_our_integers_to_the_bit(variant):
    folder = variant("quantize.rtn:bits=4,group_size=32 + quantize.embedding:bits=8")
    stored = initializers(runtimes.exported("onnxruntime", folder).folder)
    layers = {n: m for n, m in variants.load(folder).named_modules() if isinstance(m, PackedLinear)}
    assert len(layers) == 15
    for name in [name for name in stored if ".qkv_proj." in name]:  # the rows of q, k and v under one another
        places = [name.replace("qkv", one) for one in "qkv"]
        sizes = [
            layers[place.replace(".attn.", ".self_attn.").rpartition(".")[0]].out_features for place in places
        ]
        stored |= zip(places, np.split(stored.pop(name), np.cumsum(sizes)[:-1]), strict=True)
    assert "model.layers.0.attn.k_proj.qweight" in stored
    for name, layer in layers.items():
        tensor, place = layer.tensor, name.replace(".self_attn.", ".attn.")
        packed = stored[f"{place}.qweight"].reshape(len(tensor.integers), -1)
        if tensor.bits == 8:
            assert np.array_equal(packed, tensor.integers)
            continue
        integers = np.stack([packed & 15, packed >> 4], -1).reshape(tensor.integers.shape)
        assert np.array_equal(integers, tensor.integers)
        assert np.array_equal(stored[f"{place}.scales"], tensor.scale.float())
        zero = stored[f"{place}.qzeros"]
        assert np.array_equal(
            np.stack([zero & 15, zero >> 4], -1).reshape(len(zero), -1)[:, : tensor.scale.shape[1]],
            tensor.zero_point,
        )


def test_grids_of_several_kinds_are_not_fused(tmp_path, new_model, byte_tokenizer):
    model = new_model("llama")
    four, eight = (
        recipes.parse(f"quantize.rtn:bits={bits},group_size=32")
        .techniques[0]
        .apply(model, recipes.Context(reference=model))
        for bits in (4, 8)
    )
    four.model.layers[0].self_attn.q_proj = eight.model.layers[0].self_attn.q_proj
    folder = tmp_path / "variants" / "mixed"
    variants.save(four, folder, {"recipe": "mixed"}, byte_tokenizer)
    runtime = runtimes.load("onnxruntime", folder)
    assert "model.layers.0.attn.q_proj.qweight" in initializers(runtime.folder)
    assert apart(runtime, folder) < 0.05


@pytest.mark.parametrize("text", ["none", "quantize.rtn:bits=4,group_size=32"])
def test_another_layer_with_as_many_outputs_as_there_are_tokens(variant, text):
    """It is no head, as which the builder takes it."""
    folder = variant(text, vocab_size=320, intermediate_size=320)
    assert apart(runtimes.load("onnxruntime", folder), folder) < (1e-5 if text == "none" else 0.05)


def test_blocks_by_hand():
    """Two rows of 48 in groups of 48: the largest power of two in 48 is 16, so each scale stands three times."""
    integers = (torch.arange(96) % 16).to(torch.uint8).view(2, 48)
    tensor = QuantizedTensor(
        integers, torch.tensor([[0.5], [2.0]]).half(), torch.tensor([[3], [9]], dtype=torch.uint8), bits=4
    )
    found = onnx_export.blocks(tensor)
    assert onnx_export.block_size(tensor) == 16 and found["qweight"].shape == (2, 3, 8)
    assert found["qweight"][0, 0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert found["scales"].tolist() == [[0.5] * 3, [2.0] * 3]
    assert found["qzeros"].tolist() == [[0x33, 0x03], [0x99, 0x09]]  # a half byte is left over
    middle = onnx_export.blocks(quantize_affine(torch.randn(2, 32), 4, 32, symmetric=True))
    assert set(middle) == {"qweight", "scales"}  # 8 is the default


def test_decoding_goes_on_as_pytorch_does_with_any_token(variant):
    folder = variant("none")
    runtime, torch_runtime = (runtimes.load(name, folder) for name in ("onnxruntime", "torch"))
    assert runtime.prefill(IDS) == torch_runtime.prefill(IDS)
    for token in (5, 250, 0, 77):
        assert runtime.decode(token) == torch_runtime.decode(token)
    assert runtime.prefill(IDS[:3]) == torch_runtime.prefill(IDS[:3])  # a new sequence forgets the old one
    likely = runtime.top(IDS, 5)
    assert [token for token, _ in likely] == [token for token, _ in torch_runtime.top(IDS, 5)]
    assert [p for _, p in likely] == sorted((p for _, p in likely), reverse=True)
    runtime.close()


def test_a_sequence_outgrows_its_cache(variant, monkeypatch):
    from edgelab.runtimes import onnxruntime as module

    monkeypatch.setattr(module, "PAGE", 16)
    folder = variant("none")
    runtime, torch_runtime = (runtimes.load(name, folder) for name in ("onnxruntime", "torch"))
    assert runtime.prefill(IDS) == torch_runtime.prefill(IDS)
    for token in range(20, 45):
        assert runtime.decode(token) == torch_runtime.decode(token)


def test_smaller_models(variant, smaller):
    folder = variant("quantize.rtn:bits=4,group_size=32", **smaller)
    assert apart(runtimes.load("onnxruntime", folder), folder) < 0.05


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantize.bf16", "computes in float32"),
        ("quantize.nf4:group_size=32", "uniform grids only"),
        ("quantize.dynamic", "a way of its own"),
        ("quantize.kv:bits=8", "a quantized cache runs on 'torch'"),
    ],
)
def test_what_it_cannot_run_is_refused_in_one_sentence(variant, text, words):
    with pytest.raises(RuntimeRefused, match=words):
        runtimes.load("onnxruntime", variant(text))


def test_an_unknown_layout_is_refused(variant):
    with pytest.raises(RuntimeRefused, match="not stablelm; use 'torch'"):
        runtimes.load("onnxruntime", variant("none", "stablelm"))


def test_a_damaged_graph_is_refused(variant):
    folder = variant("none")
    graph = runtimes.exported("onnxruntime", folder).folder / onnx_export.GRAPH
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(RuntimeRefused, match="written anew"):
        runtimes.load("onnxruntime", folder)


def test_what_the_builder_says_is_one_sentence(variant, monkeypatch):
    monkeypatch.setattr("edgelab.runtimes.onnxruntime.ACTIVATIONS", ("quick_gelu",))
    folder = variant("none", hidden_act="quick_gelu")
    with pytest.raises(
        RuntimeRefused, match=r"^The export to onnxruntime.*quick_gelu activation.*; use 'torch'\.$"
    ):
        runtimes.load("onnxruntime", folder)
    assert not list((folder / "exports").iterdir())


def test_a_text_longer_than_the_models_positions_is_refused(variant):
    folder = variant("none", max_position_embeddings=48)
    runtime = runtimes.load("onnxruntime", folder)
    ids = torch.randint(0, 300, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(runtime.logits(ids), expected, rtol=1e-4, atol=1e-4)
    assert (
        runtime.prefill(ids[:47]) == expected[46].argmax()
        and runtime.decode(ids[47]) == expected[47].argmax()
    )
    for ask in (runtime.decode, lambda token: runtime.prefill([token] * 49)):
        with pytest.raises(RuntimeRefused, match="the model's 48 positions; use a shorter text"):
            ask(5)


def test_settings_that_the_model_does_not_have_are_not_followed(variant):
    """The builder caps the logits of any model whose config says so; a Llama has no such cap."""
    folder = variant("none", final_logit_softcapping=2.0, attn_logit_softcapping=3.0)
    assert apart(runtimes.load("onnxruntime", folder), folder) < 1e-5


def test_the_engines_own_rounding_is_another_one(variant):
    folder = variant("native.int4")
    runtime = runtimes.load("onnxruntime", folder)
    assert "4 bits" in runtime.kernel and 0.05 < apart(runtime, folder) < 1


def test_the_tokens_that_end_an_answer_go_along(tiny, tmp_path):
    """A chat model may name the end of its turns in its generation_config.json only."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')
    folder = variants.build(recipes.parse("none"), resolve(str(model)), 0, lambda *_: None)
    about = json.loads((runtimes.exported("onnxruntime", folder).folder / "genai_config.json").read_text())
    assert about["model"]["eos_token_id"] == [1, 9]


def test_what_stays_in_a_graph_is_not_copied(new_model):
    """protobuf copies no tensor of 2 GiB or more."""
    stays, goes = (numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in ("stays", "goes"))
    node = onnx.helper.make_node("MatMul", ["x", "stays"], ["y"])
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "tiny", [], [], [goes, stays]))
    before = graph.graph.initializer[1]
    onnx_export.put_integers(graph, new_model("llama"))
    [after] = graph.graph.initializer
    assert after is before and after.name == "stays"


def test_an_export_is_made_once(variant):
    folder = variant("quantize.rtn:bits=4,group_size=32")
    first = runtimes.exported("onnxruntime", folder)
    stamp = (first.folder / onnx_export.GRAPH).stat().st_mtime_ns
    again = runtimes.exported("onnxruntime", folder)
    assert again == first and (first.folder / onnx_export.GRAPH).stat().st_mtime_ns == stamp
    assert 0 < first.weights_bytes < first.file_bytes
