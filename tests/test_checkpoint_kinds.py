"""Checkpoints of every kind that people publish: each loads, is scored, quantized, and runs on engines as on PyTorch.

Parts and one file, three number formats, heads of their own and tied ones, more rows than tokens, tokenizers without
BOS, and models that read images, of which the text part is taken.
"""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

import edgelab as el
from edgelab.lab.bench import Bench
from edgelab.reference import ReferenceError, load, load_model, resolve
from edgelab.storage import variants

IDS = torch.arange(2, 60)[None]
EIGHT = "quantize.rtn:bits=8,group_size=32,symmetric=true"  # close enough to float that a gate can tell engines apart
KINDS = {
    "in parts": ({}, {"max_shard_size": "100KB"}, torch.float32),
    "in bfloat16": ({}, {}, torch.bfloat16),
    "in float16 and parts": ({}, {"max_shard_size": "60KB"}, torch.float16),
    "with a head of its own": ({"tie_word_embeddings": False}, {}, torch.float32),
    "with more rows than tokens": ({"vocab_size": 320}, {}, torch.float32),
    "with more rows and a head of its own": (
        {"vocab_size": 320, "tie_word_embeddings": False},
        {},
        torch.bfloat16,
    ),
    "without BOS": ({"bos_token_id": None}, {}, torch.float32),
}


@pytest.fixture
def checkpoint(tmp_path, new_model, byte_tokenizer):
    """`checkpoint(layout, kind)`: a folder with a tiny model of that kind, and the model that was saved."""

    def make(layout, kind):
        changes, saving, dtype = KINDS[kind]
        model = new_model(layout, **changes).to(dtype)
        model.save_pretrained(tmp_path / "model", **saving)
        byte_tokenizer.save_pretrained(tmp_path / "model")
        if kind == "without BOS":
            file = tmp_path / "model" / "tokenizer_config.json"
            stated = json.loads(file.read_text())
            file.write_text(
                json.dumps({name: value for name, value in stated.items() if name != "bos_token"})
            )
        return tmp_path / "model", model

    return make


@pytest.fixture
def asked(tmp_path, story):
    """What measurements have to know: a short text of the test's own."""
    text = tmp_path / "story.txt"
    text.write_text(story.text, encoding="utf-8")
    return {"corpus": str(text), "windows": 1}


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits[0].float()


def scored(recipe, folder, asked):
    """Mean negative log-likelihood of a token, in nats."""
    return math.log(Bench(recipe, str(folder), 0, asked).measure(["perplexity"])["ppl"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["llama", "qwen3"])
def test_it_loads_is_scored_and_runs_on_engines(layout, kind, checkpoint, asked):
    folder, saved = checkpoint(layout, kind)
    loaded = load(str(folder))
    assert loaded.notes == "" and loaded.model.dtype == torch.float32
    for name, tensor in saved.state_dict().items():  # widened to float32, none lost
        assert torch.equal(loaded.model.state_dict()[name], tensor.float()), name
    assert (loaded.tokenizer.bos_token is None) == (kind == "without BOS")

    nll = {recipe: scored(recipe, folder, asked) for recipe in ("none", EIGHT)}
    assert 0 < abs(nll[EIGHT] - nll["none"]) < 0.02

    for engine in ("llamacpp", "onnxruntime"):
        for recipe in ("none", EIGHT):
            bench = Bench(f"{recipe} @ {engine}", str(folder), 0, asked)
            assert bench.session.vocabulary == loaded.model.config.vocab_size
            assert bench.gate()["parity"] == "passed", (engine, recipe, bench.gate())
            bench.session.close()


@pytest.mark.parametrize(
    "kind", ["in float16 and parts", "with more rows and a head of its own", "without BOS"]
)
def test_it_is_written_as_a_file(kind, checkpoint, tmp_path):
    folder, saved = checkpoint("llama", kind)
    el.export("none", "gguf", tmp_path / "model.gguf", model=str(folder))
    read, expected = (logits(load_model(resolve(str(place)))) for place in (tmp_path / "model.gguf", folder))
    assert (read - expected).norm() < 1e-5 * expected.norm()
    el.export("none", "onnx", tmp_path / "onnx", model=str(folder))
    about = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert about["model"]["vocab_size"] == saved.config.vocab_size


# Models that read images too


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, byte_tokenizer):
    """A tiny Gemma 3 that reads images, and its folder."""
    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"], "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": None, "max_position_embeddings": 4096, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    image = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4, image_token_index=299)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("models") / "tiny-gemma3"
    model.eval().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return model, folder


def renamed(folder, target, rename):
    """A copy of a checkpoint whose tensors have other names."""
    shutil.copytree(folder, target)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def plain(name):
    """The name of a tensor in the whole model, however a version of transformers saves it."""
    return name.removeprefix("model.").replace("language_model.model.", "language_model.")


NAMES = {
    "as the Hub has them": lambda name: plain(name).replace("language_model.", "language_model.model."),
    "as transformers has them since": lambda name: f"model.{plain(name)}",
}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_the_text_part_is_taken(rename, seeing, tmp_path, asked):
    whole, folder = seeing
    loaded = load(str(renamed(folder, tmp_path / "model", rename)))
    assert loaded.model.config.model_type == "gemma3_text"
    assert loaded.notes == "The text part alone, without multi_modal_projector, vision_tower."
    assert torch.equal(logits(loaded.model), logits(whole))
    assert not any("vision" in name for name, _ in loaded.model.named_parameters())
    nll = {recipe: scored(recipe, tmp_path / "model", asked) for recipe in ("none", EIGHT)}
    assert 0 < abs(nll[EIGHT] - nll["none"]) < 0.05
    whole_one, packed = (Bench(recipe, str(tmp_path / "model"), 0, asked) for recipe in ("none", EIGHT))
    assert whole_one.about["record"]["notes"] == [loaded.notes]
    assert (logits(variants.load(packed.folder)) - logits(whole)).norm() < 0.1 * logits(whole).norm()


def test_the_text_part_runs_on_engines_and_goes_into_a_file(seeing, tmp_path, asked):
    whole, folder = seeing
    for engine in ("llamacpp", "onnxruntime"):
        for recipe in ("none", EIGHT):
            bench = Bench(f"{recipe} @ {engine}", str(folder), 0, asked)
            assert bench.gate()["parity"] == "passed", (engine, recipe, bench.gate())
            bench.session.close()
    el.export("none", "gguf", tmp_path / "model.gguf", model=str(folder))
    read = logits(load_model(resolve(str(tmp_path / "model.gguf"))))
    assert (read - logits(whole)).abs().max() < 1e-3


def test_a_text_part_is_saved_as_a_model_of_its_own(seeing, tmp_path, byte_tokenizer):
    whole, folder = seeing
    load(str(folder)).model.save_pretrained(tmp_path / "text")
    byte_tokenizer.save_pretrained(tmp_path / "text")
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "text" / "model.safetensors")
    again = load(str(tmp_path / "text"))
    assert again.notes == "" and torch.equal(logits(again.model), logits(whole))


def test_a_text_part_that_lacks_a_tensor_is_refused(seeing, tmp_path):
    _, folder = seeing
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(
        name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight") and "language" in name
    )
    save_file(
        {one: tensor for one, tensor in tensors.items() if one != name},
        tmp_path / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ReferenceError, match=r"lack model.layers.1.mlp.up_proj.weight; give the whole checkpoint"
    ):
        load(str(tmp_path / "model"))


def test_the_tokenizer_without_bos_adds_none(checkpoint):
    folder, _ = checkpoint("llama", "without BOS")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token is None and tokenizer("a")["input_ids"] != []
