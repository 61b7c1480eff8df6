"""OpenVINO on tiny models: our integers after two conversions, PyTorch's logits, and what it refuses."""

import subprocess
import sys

import numpy as np
import openvino
import pytest
import torch

from edgelab import runtimes
from edgelab.measure import parity
from edgelab.measure.perplexity import Window, logit_slices
from edgelab.runtimes import RuntimeRefused
from edgelab.runtimes.openvino import GRAPH, LAYOUTS, is_read
from edgelab.storage import variants

IDS = [3, 17, 250, 9, 88, 120, 45, 7, 61, 200, 33, 12]


def apart(runtime, folder):
    """Distance of the logits from PyTorch's dequantized ones, relative."""
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([IDS])).logits[0].float()
    return float((runtime.logits(IDS) - expected).norm() / expected.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float16_logits_are_those_of_pytorch(variant, layout):
    folder = variant("quantize.fp16", layout)
    runtime = runtimes.load("openvino", folder)
    assert runtime.kernel == "float32" and apart(runtime, folder) < 0.01


@pytest.mark.parametrize(
    "text",
    [
        "quantize.rtn:bits=4,group_size=32",
        "quantize.rtn:bits=4,group_size=64,symmetric=true",
        "quantize.rtn:bits=3,group_size=32",
        "quantize.rtn:bits=8,group_size=0,symmetric=true",
        "quantize.rtn:bits=4,group_size=32 + quantize.embedding:bits=8",
    ],
)
def test_logits_with_our_integers_are_those_of_pytorch(variant, text):
    """Up to activations and a cache that are rounded to int8."""
    folder = variant(text)
    runtime = runtimes.load("openvino", folder)
    assert "int8 activations" in runtime.kernel and apart(runtime, folder) < 0.06


def test_ctrl_c_is_heard_after_two_that_overlapped(variant):
    """The first is closed while the second runs, as in `engine = load(…)` written twice."""
    folder = variant("quantize.fp16")
    program = f"""
import pathlib, signal
from edgelab import runtimes
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started deaf to it
one = runtimes.load("openvino", pathlib.Path({str(folder)!r}))
two = runtimes.load("openvino", pathlib.Path({str(folder)!r}))
del one
del two
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["heard"])


def test_the_graph_holds_our_integers(variant):
    folder = variant("quantize.rtn:bits=4,group_size=32")
    graph = openvino.Core().read_model(runtimes.exported("openvino", folder).folder / GRAPH)
    constants = {
        op.data.reshape(-1).tobytes()
        for op in graph.get_ops()
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() == "u4"
    }
    tensor = variants.load(folder).get_submodule("model.layers.0.mlp.down_proj").tensor
    packed = tensor.integers.numpy().reshape(-1, 2)
    assert (packed[:, 0] | packed[:, 1] << 4).astype(np.uint8).tobytes() in constants
    zero = tensor.zero_point.numpy().reshape(-1, 2)
    assert (zero[:, 0] | zero[:, 1] << 4).astype(np.uint8).tobytes() in constants


def test_decoding_goes_on_as_pytorch_does_with_any_token(variant):
    folder = variant("quantize.fp16")
    runtime, torch_runtime = (runtimes.load(name, folder) for name in ("openvino", "torch"))
    assert runtime.prefill(IDS) == torch_runtime.prefill(IDS)
    same = [runtime.decode(token) == torch_runtime.decode(token) for token in (5, 250, 2, 77, 9, 31, 4, 8)]
    assert sum(same) >= 7  # keys and values are rounded to int8
    assert runtime.prefill(IDS[:3]) == torch_runtime.prefill(IDS[:3])  # a new sequence forgets the old one
    assert runtime.top(IDS, 3)[0][0] == torch_runtime.top(IDS, 3)[0][0]
    runtime.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"intermediate_size": 96},
    ],
    ids=["layers", "heads", "channels"],
)
def test_smaller_models(variant, changes):
    folder = variant("quantize.rtn:bits=4,group_size=32", **changes)
    assert apart(runtimes.load("openvino", folder), folder) < 0.06


@pytest.mark.parametrize("text", ["native.int8", "native.int4"])
def test_nncf_rounds_in_its_own_way(variant, text):
    folder = variant(text)
    runtime = runtimes.load("openvino", folder)
    assert "int8 activations" in runtime.kernel
    assert 1e-4 < apart(runtime, folder) < (0.06 if text == "native.int8" else 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quantize.bf16", "float32 and float16, not bfloat16"),
        ("quantize.hqq:bits=4,group_size=32", "whole zero-points"),
        ("quantize.binary:group_size=32", "whole zero-points"),
        ("quantize.nf4:group_size=32", "uniform grid"),
        ("quantize.dynamic", "a way of its own"),
        ("quantize.kv:bits=8", "a quantized cache runs on 'torch'"),
    ],
)
def test_what_it_cannot_run_is_refused_in_one_sentence(variant, text, words):
    with pytest.raises(RuntimeRefused, match=words):
        runtimes.load("openvino", variant(text))


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


FOUR = "quantize.rtn:bits=4,group_size=32"
TAKEN = {  # a recipe, a layout, its settings, and whether OpenVINO reads it from GGUF
    "float16": ("quantize.fp16", "llama", {}, True),
    "4 bits": (FOUR, "qwen3", {}, True),
    "its own rounding": ("native.int8", "qwen2", {}, True),
    "float32": ("none", "qwen2", {}, False),
    "5 bits": ("quantize.rtn:bits=5,group_size=32", "llama", {}, False),
    "8 bits with zero-points": ("quantize.rtn:bits=8,group_size=0", "llama", {}, False),
    "groups of 16": ("quantize.rtn:bits=4,group_size=16", "llama", {}, False),
    "scaled": (FOUR, "llama", {"rope_parameters": SCALED}, False),
    "scaled and rounded by OpenVINO": ("native.int8", "llama", {"rope_parameters": SCALED}, False),
    "biases": (FOUR, "llama", {"attention_bias": True, "mlp_bias": True}, False),
    "biases of a qwen3": ("quantize.fp16", "qwen3", {"attention_bias": True}, False),
    "another activation": ("quantize.fp16", "llama", {"hidden_act": "gelu"}, False),
}


@pytest.mark.parametrize(("text", "layout", "changes", "read"), TAKEN.values(), ids=TAKEN)
def test_what_the_reader_does_not_take_as_it_is_is_traced(variant, text, layout, changes, read):
    about = variants.read_description(variant(text, layout, **changes))
    assert is_read(about) == read and runtimes.find("openvino").refusal(about) is None


@pytest.mark.parametrize(
    "name", ["float32", "5 bits", "8 bits with zero-points", "groups of 16", "biases"]
)  # layouts and scaling elsewhere
def test_traced_logits_are_those_of_pytorch(variant, name):
    text, layout, changes, _ = TAKEN[name]
    folder = variant(text, layout, **changes)
    assert apart(runtimes.load("openvino", folder), folder) < (1e-4 if text == "none" else 0.06)


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": SCALED}, {"attention_bias": True}], ids=str)
def test_what_the_reader_leaves_out_would_fail_the_gate(variant, monkeypatch, changes):
    monkeypatch.setattr("edgelab.runtimes.openvino.is_read", lambda about: True)
    folder = variant("quantize.fp16", **changes)
    cut = [
        Window(ids, 1, 128)
        for ids in torch.randint(0, 300, (3, 129), generator=torch.Generator().manual_seed(0))
    ]
    engine, twin = (
        logit_slices(runtimes.load(name, folder).logits, cut) for name in ("openvino", "simulated")
    )
    verdict = parity.by_logits(engine, twin)
    assert verdict.passed == (not changes), verdict.detail


def test_a_damaged_graph_is_refused(variant):
    folder = variant("quantize.fp16")
    graph = runtimes.exported("openvino", folder).folder / GRAPH
    graph.write_text(graph.read_text()[:1000])
    with pytest.raises(RuntimeRefused, match="written anew"):
        runtimes.load("openvino", folder)
