"""Checkpoints whose files say more than their config.json: heads of their own, weights in integers, adapters."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from edgelab import devices, reference
from edgelab.reference import ReferenceError, config_of, load_model, resolve
from edgelab.runtimes import gguf
from edgelab.storage import variants

IDS = torch.arange(2, 60)[None]
NOTE = "The checkpoint has a head of its own, although its config.json ties it to the embedding."
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny model, a Llama with a tied head, that a test may change."""
    return shutil.copytree(tiny, tmp_path / "model")


def change(folder, to):
    """Replace the tensors of a folder by `to(tensors)`."""
    file = folder / "model.safetensors"
    save_file(to(load_file(file)), file, metadata={"format": "pt"})


def logits(model) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def head_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.2


# A head in the file


@pytest.mark.parametrize(
    ("layout", "head", "embedding"),
    [
        ("llama", "lm_head", "model.embed_tokens"),
        ("gpt2", "lm_head", "transformer.wte"),
        ("bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ],
)
def test_a_head_in_the_file_stays_whatever_the_configuration_says(
    layout, head, embedding, new_model, byte_tokenizer, tmp_path
):
    folder, variant, notes = tmp_path / "model", tmp_path / "variant", []
    made = new_model(layout, is_decoder=True, tie_word_embeddings=True)
    made.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    name = f"{head}.weight"
    change(folder, lambda tensors: tensors | {name: head_like(tensors[f"{embedding}.weight"])})
    model = load_model(resolve(str(folder)), notes=notes)
    assert notes == [NOTE] and torch.equal(
        model.get_parameter(name), load_file(folder / "model.safetensors")[name]
    )
    assert not config_of(str(folder)).tie_word_embeddings
    variants.save(model, variant, {"recipe": "none"})
    loaded = variants.load(variant)
    assert not loaded.config.tie_word_embeddings and torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), logits(made), rtol=0.1)


def test_what_follows_from_a_head_in_the_file(folder, tmp_path):
    tied = config_of(str(folder))
    change(
        folder, lambda tensors: tensors | {"lm_head.weight": head_like(tensors["model.embed_tokens.weight"])}
    )
    loaded = reference.load(str(folder))
    assert loaded.notes == NOTE
    shapes = [devices.ModelShape.from_config(one) for one in (config_of(str(folder)), tied)]
    assert shapes[0].parameters - shapes[1].parameters == 300 * 64
    gguf.write_model(loaded.model, folder, tmp_path / "m.gguf", "m", "none")
    assert torch.allclose(
        logits(load_model(resolve(str(tmp_path / "m.gguf")))), logits(loaded.model), atol=1e-4
    )


def test_a_head_that_equals_the_embedding_stays_tied(folder):
    change(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    loaded = reference.load(str(folder))
    assert loaded.notes == "" and loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert config_of(str(folder)).tie_word_embeddings


def test_a_head_in_torchs_own_file(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    own = {"lm_head.weight": head_like(tensors["model.embed_tokens.weight"])}
    torch.save(tensors | own, folder / "pytorch_model.bin")
    loaded = reference.load(str(folder))
    assert loaded.notes == NOTE and not loaded.model.config.tie_word_embeddings


def test_a_head_in_one_shard_and_the_embedding_in_another(new_model, byte_tokenizer, tmp_path):
    new_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert not config_of(str(tmp_path)).tie_word_embeddings
    assert reference.load(str(tmp_path)).notes == NOTE


def test_a_head_in_a_checkpoint_that_reads_images(byte_tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeing = sizes | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=sizes | {"vocab_size": 300, "num_key_value_heads": 1, "head_dim": 16},
        vision_config=seeing,
        mm_tokens_per_image=4,
        **{f"{name}_token_index": 290 + place for place, name in enumerate(("boi", "eoi", "image"))},
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors | {"language_model.lm_head.weight": torch.randn(300, 32)})
    loaded = reference.load(str(tmp_path))
    assert NOTE in loaded.notes and not loaded.model.config.tie_word_embeddings
    assert not config_of(str(tmp_path)).tie_word_embeddings


# Weights that are no floats


def coded(dtype, scale=None):
    """What makes the linear layers of a checkpoint `dtype`, with a tensor called `scale` beside each."""

    def to(tensors):
        made = {}
        for name, tensor in tensors.items():
            if name.endswith("proj.weight"):
                integers = (tensor / tensor.abs().max() * 100).round()
                made[name] = integers.to(dtype)
                made |= {f"{name.removesuffix('weight')}{scale}": torch.ones(1)} if scale else {}
            else:
                made[name] = tensor
        return made

    return to


@pytest.mark.parametrize("ask", [reference.load, config_of])
@pytest.mark.parametrize(
    ("dtype", "scale", "called"),
    [
        (torch.int8, "SCB", "I8"),
        (torch.int8, None, "I8"),
        (torch.int32, None, "I32"),
        (torch.uint8, None, "U8"),
        (torch.float8_e4m3fn, "input_scale", "F8_E4M3"),
        (torch.float8_e5m2, None, "F8_E5M2"),
    ],
)
def test_weights_in_integers_or_eight_bits(ask, dtype, scale, called, folder):
    change(folder, coded(dtype, scale))
    with pytest.raises(
        ReferenceError,
        match=rf"^model is a quantized checkpoint \(with model.layers.0.\S+proj.weight in {called}, .*; give the float",
    ):
        ask(str(folder))


def test_weights_in_integers_in_torchs_own_file(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(coded(torch.int8)(tensors), folder / "pytorch_model.bin")
    with pytest.raises(ReferenceError, match=r"is a quantized checkpoint \(with .*proj.weight in torch.int8"):
        reference.load(str(folder))


def test_masks_and_positions_are_integers(new_model, byte_tokenizer, tmp_path):
    """Older checkpoints of GPT-2 hold the causal mask of each block."""
    new_model("gpt2").save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    change(tmp_path, lambda tensors: tensors | {"transformer.h.0.attn.bias": mask})
    assert torch.equal(logits(reference.load(str(tmp_path)).model), logits(new_model("gpt2")))


@pytest.mark.parametrize("name", ["SCB", "input_scale", "pre_quant_scale", "weight_format"])
def test_scales_beside_floats(name, folder):
    change(folder, lambda tensors: tensors | {f"{UP}.{name}": torch.ones(1)})
    with pytest.raises(ReferenceError, match=rf"^model is a quantized checkpoint \(with {UP}.{name}\); give"):
        reference.load(str(folder))


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.default.weight", "weight_mask"])
def test_what_was_never_merged(name, folder):
    change(folder, lambda tensors: tensors | {f"{UP}.{name}": torch.ones(1)})
    with pytest.raises(
        ReferenceError, match=rf"^model holds {UP}.{name} beside the weights that they change; merge"
    ):
        reference.load(str(folder))


# An adapter beside the weights


@pytest.mark.parametrize("ask", [reference.load, config_of, resolve])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("stated", "of"), [('{"base_model_name_or_path": "some/base"}', " of some/base"), ("{}", ""), ("[", "")]
)
def test_an_adapter_is_named(ask, weights, stated, of, folder):
    (folder / "adapter_config.json").write_text(stated)
    if not weights:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ReferenceError, match=rf"model holds a LoRA adapter{of}; merge it into its model and"):
        ask(str(folder))


def test_a_folder_with_an_adapter_alone(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ReferenceError, match=r"holds a LoRA adapter of some/base; merge it into its model"):
        reference.load(str(tmp_path))
