"""Layers of different sizes, as pruning leaves them: one MLP narrower by some channels, and one layer less.

PyTorch and llama.cpp run them, the latter as `deci`, the architecture of GGUF that has widths of its own for each
layer; what a format cannot say is refused with the name of the layer.
"""

import copy
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgelab import corpora, recipes, reference, runtimes
from edgelab.measure import parity
from edgelab.measure.perplexity import Window, logit_slices
from edgelab.model.shapes import odd_shapes
from edgelab.runtimes import RuntimeRefused
from edgelab.runtimes.layers import LayerSession
from edgelab.storage import variants

IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
INT4 = "quantize.rtn:bits=4,group_size=32 + quantize.embedding:bits=8"
NARROWER = {
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
}  # projections of an MLP, and the axis of its channels


def uneven(model, layer, channels):
    """A copy of the model without its last layer, and with so many MLP channels less in one of the others."""
    model = copy.deepcopy(model)
    del model.model.layers[-1]
    model.config.num_hidden_layers -= 1
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:-1]
    mlp = model.model.layers[layer].mlp
    for name, axis in NARROWER.items():
        projection = getattr(mlp, name)
        kept = projection.weight.shape[axis] - channels
        projection.weight = nn.Parameter(projection.weight.detach().narrow(axis, 0, kept).clone())
        projection.out_features, projection.in_features = projection.weight.shape
    return model


def saved(model, text, folder, tokenizer=None):
    recipe = recipes.parse(text)
    variants.save(
        recipe.apply(model, recipes.Context(reference=model)), folder, {"recipe": str(recipe)}, tokenizer
    )
    return folder


@pytest.fixture
def model(new_model):
    return uneven(new_model("llama", num_hidden_layers=3), layer=1, channels=64)


def in_memory(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


def test_what_the_configuration_does_not_give_is_written_down(model, tmp_path):
    folder = saved(model, "none", tmp_path / "variant")
    names = [f"model.layers.1.mlp.{name}" for name in NARROWER]
    expected = dict(zip(names, ([128, 64], [128, 64], [64, 128]), strict=True))
    assert odd_shapes(model) == variants.read_description(folder).shapes == expected
    assert variants.load(folder).config.num_hidden_layers == 2


@pytest.mark.parametrize("runtime", ["torch", "simulated", "compiled"])
def test_a_saved_one_scores_as_in_memory(runtime, model, tmp_path, monkeypatch):
    folder = saved(model, "none", tmp_path / "variant")
    found = runtimes.load(runtime, folder).logits(IDS)
    torch.testing.assert_close(found, in_memory(model), rtol=0, atol=1e-5)


def test_halves_of_it_are_the_whole(model):
    first, second = LayerSession(model, 0, 1), LayerSession(model, 1, 2)
    torch.testing.assert_close(second.extend(first.extend(IDS)), in_memory(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("text", "within"), [("none", 1e-5), (INT4, 5e-3)])
def test_llama_cpp_runs_it_as_deci(text, within, model, tmp_path):
    """Mean Kullback-Leibler divergence from PyTorch; float16 keys and values cost some 1e-6, int8 inputs 1e-3."""
    folder = saved(model, text, tmp_path / "variant")
    engine, torch_session = (runtimes.load(name, folder).logits(IDS) for name in ("llamacpp", "simulated"))
    p, q = torch_session.log_softmax(-1), engine.log_softmax(-1)
    assert functional.kl_div(q, p, log_target=True, reduction="batchmean") < within


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "litert"])
def test_the_others_name_the_layer(runtime, model, tmp_path):
    text = "quantize.fp16" if runtime == "openvino" else "none"
    with pytest.raises(RuntimeRefused, match=r"model\.layers\.1\.mlp\.gate_proj is 128 x 64"):
        runtimes.load(runtime, saved(model, text, tmp_path / "variant"))


def test_executorch_traces_the_layers_as_they_are(model, tmp_path):
    if importlib.util.find_spec("executorch") is None:
        pytest.skip("executorch is not installed here")
    found = runtimes.load("executorch", saved(model, "none", tmp_path / "variant")).logits(IDS)
    torch.testing.assert_close(found, in_memory(model), rtol=0, atol=1e-3)


def test_heads_of_a_layer_are_refused_where_all_layers_share_a_cache(model, tmp_path):
    attention = model.model.layers[1].self_attn
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        layer = getattr(attention, name)
        layer.weight, layer.out_features = nn.Parameter(layer.weight.detach()[:rows].clone()), rows
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach()[:, :32].clone())
    attention.o_proj.in_features = 32
    about = variants.describe(model)
    assert "model.layers.1.self_attn.q_proj" in runtimes.find("executorch").refusal(about)
    assert runtimes.find("llamacpp").refusal(about) is None
    found = runtimes.load("llamacpp", saved(model, "none", tmp_path / "variant")).logits(IDS)
    torch.testing.assert_close(found, in_memory(model), rtol=0, atol=0.05)


def test_all_layers_alike_are_no_uneven_model(new_model, tmp_path):
    """Narrower than the configuration says, but all of them: any architecture of GGUF can say that."""
    model = uneven(uneven(new_model("qwen3", num_hidden_layers=4), 0, 64), 1, 64)
    assert runtimes.find("llamacpp").refusal(variants.describe(model)) is None
    assert "model.layers.0.mlp.gate_proj" in runtimes.find("llamacpp").refusal(
        variants.describe(uneven(new_model("qwen3", num_hidden_layers=3), 0, 64))
    )
    found = runtimes.load("llamacpp", saved(model, "none", tmp_path / "variant")).logits(IDS)
    torch.testing.assert_close(found, in_memory(model), rtol=0, atol=0.05)


@pytest.mark.embedded
def test_the_embedded_model_passes_the_gate(tmp_path):
    source = reference.resolve()
    tokenizer = reference.load_tokenizer(source)
    model = uneven(reference.load_model(source), layer=3, channels=64)
    windows = corpora.tokenize("wiki", tokenizer, tokens=2 * 512).ids[: 2 * 512].reshape(2, 512)
    cut = [Window(ids, 1, 511) for ids in windows]
    for text in ("none", INT4):
        folder = saved(model, text, tmp_path / text.partition(":")[0], tokenizer)
        found = [logit_slices(runtimes.load(name, folder).logits, cut) for name in ("llamacpp", "simulated")]
        verdict = parity.by_logits(*found)
        assert verdict.passed, verdict.detail

    def nll(logits):
        return functional.cross_entropy(logits[:-1], windows[0, 1:]).item()

    with torch.inference_mode():
        expected = nll(model(windows[:1]).logits[0])
    found = runtimes.load("torch", tmp_path / "none").logits(windows[0].tolist())
    assert nll(found) == pytest.approx(expected, abs=1e-5)
