"""Adapters as stages: stored alone, found again on what they stand on, merged behind, and refused where none runs."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgelab import assets, runtimes, training
from edgelab.recipes import RecipeError, parse
from edgelab.reference import resolve
from edgelab.runtimes.llamacpp import LlamaCpp
from edgelab.storage import adapters, stages, variants
from edgelab.storage.adapters import adapted_layers
from edgelab.storage.variants import VariantError
from edgelab.techniques.quantization.rtn import linear_layers

ROWS = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(5))
LORA = "lora:rank=4,steps=2,batch=2,length=24"
INT4 = "quantize.rtn:bits=4,group_size=32"


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Random tokens in place of the training texts."""
    monkeypatch.setattr(training, "windows", lambda *arguments: ROWS)


def build(text, source):
    return variants.build(parse(text), source, 0, lambda done, total: None)


@pytest.mark.parametrize("text", [LORA, f"{INT4} + q{LORA}"])
def test_it_is_stored_alone_and_found_again(text, tiny):
    source = resolve(str(tiny))
    folder = build(text, source)
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= names
    assert "model.safetensors" not in names
    about = variants.read_about(folder)
    base = build(text.rpartition(" + ")[0] or "none", source)
    assert about["adapter_of"] == base.name
    model = variants.load(folder)
    held = sum(one.numel() for name, one in model.named_parameters() if "lora_" in name)
    assert about["size"]["adapter_bytes"] == 4 * held
    assert about["size"]["linear_bytes"] == variants.read_about(base)["size"]["linear_bytes"]
    again = variants.load(folder)
    torch.testing.assert_close(model(ROWS[:1]).logits, again(ROWS[:1]).logits, rtol=0, atol=0)
    with torch.inference_mode():
        one, two = (runtimes.load("simulated", one).logits(ROWS[0].tolist()) for one in (folder, base))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, model(ROWS[:1]).logits[0].detach(), rtol=1e-3, atol=1e-3)


def test_merged_is_another_stage(tiny):
    source = resolve(str(tiny))
    beside, whole = build(LORA, source), build(f"{LORA} + merge", source)
    assert variants.read_about(whole)["parent"] == beside.name
    model = variants.load(whole)
    assert not adapted_layers(model)
    torch.testing.assert_close(
        model(ROWS[:1]).logits, variants.load(beside)(ROWS[:1]).logits, rtol=1e-4, atol=1e-4
    )
    rounded = variants.load(build(f"{LORA} + merge + {INT4}", source))
    assert rounded.model.layers[0].mlp.up_proj.tensor.bits == 4


def test_what_it_stands_on_is_made_again(tiny):
    source = resolve(str(tiny))
    folder = build(LORA, source)
    base = folder.parent / variants.read_about(folder)["adapter_of"]
    expected = variants.load(folder)(ROWS[:1]).logits
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    assert not stages.is_whole(folder)
    with pytest.raises(VariantError, match="stands on is gone; measure its recipe"):
        variants.load(folder)
    torch.testing.assert_close(variants.load(build(LORA, source))(ROWS[:1]).logits, expected)
    assert assets.home() in base.parents


def test_engines_want_it_merged(tiny):
    source = resolve(str(tiny))
    about = variants.read_description(build(LORA, source))
    for engine in ("onnxruntime", "openvino", "executorch", "litert"):
        assert "put merge behind it" in runtimes.find(engine).refusal(about), engine
    assert runtimes.find("torch").refusal(about) is None
    assert runtimes.find("llamacpp").refusal(about) is None
    about = variants.read_description(build(f"{LORA} + merge", source))
    assert runtimes.find("onnxruntime").refusal(about) is None


@pytest.mark.parametrize(
    "text", [LORA, f"{INT4} + q{LORA}", LORA.replace("lora:", "lora:rank_stabilized=true,")]
)
@pytest.mark.parametrize("layout", ["llama", "qwen3"])
def test_llama_cpp_puts_it_beside_its_own_file(text, layout, folder_of, tmp_path):
    folder = build(text, resolve(str(folder_of(layout))))
    with torch.no_grad():  # an adapter of two steps says little: make it loud
        tensors = load_file(folder / adapters.WEIGHTS)
        save_file(
            {name: 30 * one if "lora_B" in name else one for name, one in tensors.items()},
            folder / adapters.WEIGHTS,
        )
    stored = LlamaCpp.export(folder, tmp_path)
    ids = ROWS[0].tolist()
    expected = variants.load(folder)(ROWS[:1]).logits[0].detach()
    base = variants.load(variants.parent_of(folder))(ROWS[:1]).logits[0].detach()
    session = LlamaCpp(tmp_path, 1)
    found = session.logits(ids)
    assert (expected - base).std() > 0.1
    assert (found - expected).std() < 0.1 * (expected - base).std()
    session.close()
    written = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert stored == sum(
        tensor.n_bytes for tensor in (*written.tensors, *gguf.GGUFReader(tmp_path / "model.gguf").tensors)
    )


def test_llama_cpp_has_no_dora(tiny):
    about = variants.read_description(build(LORA.replace("lora:", "lora:dora=true,"), resolve(str(tiny))))
    assert about.adapter == "dora"
    assert "put merge behind it" in runtimes.find("llamacpp").refusal(about)


REMOVALS = {
    "prune.magnitude": 0,
    "prune.magnitude:pattern=2:4 + prune.store:format=two_four": 0,
    "prune.magnitude + prune.store": 0,
    "prune.heads:groups=1,by=magnitude": 1,
    "prune.channels:by=magnitude": 1,
    "prune.layers:keep=1,by=even": 1,
    "prune.vocab:keep=280": 1,
    "lowrank.svd:share=0.5,whitened=false": 1,
    "prune.hidden": 1,
}


@pytest.mark.parametrize(("removal", "may_merge"), REMOVALS.items())
def test_recovery_beside_the_weights_follows_every_removal(removal, may_merge, tiny, monkeypatch):
    rows = ROWS.clamp(max=279)  # what is left of a smaller vocabulary
    monkeypatch.setattr(training, "windows", lambda *arguments: rows)
    source = resolve(str(tiny))
    loss = "ce" if "vocab" in removal else "kl"
    text = f"{removal} + recover:adapter=lora,rank=4,loss={loss},steps=2,batch=2,length=24"
    folder = build(text, source)
    beside, base = variants.load(folder), variants.load(variants.parent_of(folder))
    layers = adapted_layers(beside)
    assert len(layers) == len(linear_layers(base, packed=True))
    assert all(layer.r["default"] == 4 for layer in layers.values())
    for name, layer in layers.items():
        own, theirs = layer.get_base_layer(), base.get_submodule(name)
        if hasattr(own, "weight"):
            assert torch.equal(own.weight, theirs.weight)
    logits = beside(rows[:1]).logits
    assert not torch.equal(logits, base(rows[:1]).logits)
    if may_merge:
        whole = variants.load(build(f"{text} + merge", source))
        torch.testing.assert_close(whole(rows[:1]).logits, logits, rtol=1e-4, atol=1e-4)
    elif "store" not in removal:
        with pytest.raises(RecipeError, match="fill in the zeros"):
            build(f"{text} + merge", source)


def test_an_adapter_whose_base_was_made_again_otherwise(tiny):
    folder = build(LORA, resolve(str(tiny)))
    base = variants.parent_of(folder) / "model.safetensors"
    tensors = load_file(base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, base, metadata={"format": "pt"})
    with pytest.raises(VariantError, match="which were made again since; remove that folder"):
        variants.load(folder)


def test_a_damaged_adapter_gives_one_sentence(tiny):
    folder = build(LORA, resolve(str(tiny)))
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(VariantError, match="is damaged"):
        variants.load(folder)
    assert json.loads((folder / "variant.json").read_text())["adapter_of"]
