"""GGUF files read back: the logits of the model that was written, whatever its rotary scaling, biases and head size."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel

from edgelab import reference, tasks
from edgelab.errors import EdgeLabError
from edgelab.gguf_files import reader
from edgelab.gguf_files.reader import GGUFError
from edgelab.runtimes import gguf as export

IDS = torch.randint(2, 300, (1, 200), generator=torch.Generator().manual_seed(0))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def write(
    model: PreTrainedModel,
    file: Path,
    state: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    left_out: str = "nothing",
) -> Path:
    """The tensors of a model as float32, without a tokenizer; `state` adds metadata."""
    writer = gguf.GGUFWriter(file, model.config.model_type)
    export.add_shape(writer, model)
    writer.add_tokenizer_model("none")
    state(writer)
    for name, values, stored in export.tensors(model):
        if left_out not in name:
            writer.add_tensor(name, values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("layout", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123_456.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0}}),
        ("llama", {"head_dim": 64, "rope_parameters": LLAMA3 | {"low_freq_factor": 1.5}}),
        ("qwen2", {}),
        ("qwen2", {"head_dim": 32, "tie_word_embeddings": False}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_our_export_reads_back(layout, config, new_model, tmp_path):
    model = new_model(layout, **config)
    export.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", "none")
    read = reader.read(tmp_path / "model.gguf")
    right = logits(model)
    assert (logits(read) - right).abs().max() < 1e-4 * right.abs().max()


def test_llama3_scaling_is_found_in_its_factors(new_model, tmp_path):
    """So that engines, which know the rule and not the factors, run what was read."""
    model = new_model("llama", rope_parameters=LLAMA3)
    assert reader.read(write(model, tmp_path / "model.gguf")).config.rope_parameters == LLAMA3


@pytest.mark.parametrize("factor", [None, 1.25])
def test_yarn_as_metadata_state_it(factor, new_model, tmp_path):
    """llama.cpp multiplies YaRN's own magnitude, 1 + ln(factor) / 10, by attn_factor."""

    def state(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)
        if factor:
            writer.add_rope_scaling_attn_factors(factor)

    magnitude = {"attention_factor": factor * 1.138629436} if factor else {}
    model = new_model("llama", rope_parameters=YARN | magnitude)
    read = reader.read(write(model, tmp_path / "model.gguf", state, "rope_freqs"))
    right = logits(model)
    assert (logits(read) - right).abs().max() < 1e-4 * right.abs().max()


def test_linear_as_metadata_state_it(new_model, tmp_path):
    def state(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    model = new_model("llama", rope_parameters=YARN | {"rope_type": "linear"})
    read = reader.read(write(model, tmp_path / "model.gguf", state, "rope_freqs"))
    assert torch.equal(logits(read), logits(model))


@pytest.mark.parametrize(
    ("state", "left_out", "sentence"),
    [
        (lambda _: None, "blk.1.ffn_down", r"^model.gguf lacks model.layers.1.mlp.down_proj.weight; give"),
        (lambda _: None, "blk.0.attn_norm", r"^model.gguf lacks model.layers.0.input_layernorm.weight; give"),
        (
            lambda writer: writer.add_tensor("blk.0.attn_sinks.weight", torch.ones(4).numpy()),
            "nothing",
            r"^model.gguf holds tensors for which a llama model has no place here \(blk.0.attn_sinks.weight\)",
        ),
        (
            lambda writer: writer.add_logit_scale(0.5),
            "nothing",
            r"^model.gguf states llama.logit_scale, which",
        ),
        (
            lambda writer: writer.add_uint16("split.count", 3),
            "nothing",
            r"^model.gguf is one of 3 parts; join",
        ),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "nothing",
            r"^model.gguf scales rotary frequencies by 'longrope', which is not read here; give",
        ),
    ],
)
def test_what_would_compute_something_else_is_refused(state, left_out, sentence, new_model, tmp_path):
    with pytest.raises(GGUFError, match=sentence):
        reader.read(write(new_model("llama"), tmp_path / "model.gguf", state, left_out))


def test_a_file_that_rotates_a_part_of_each_head(new_model, tmp_path, monkeypatch):
    model = new_model("llama")
    stated = export.stated
    monkeypatch.setattr(export, "stated", lambda *about: stated(*about) | {"rope.dimension_count": 8})
    with pytest.raises(
        GGUFError, match="rotates 8 of the 16 numbers of each head, which is not read here; give"
    ):
        reader.read(write(model, tmp_path / "model.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(range(256)), bytes(range(256))])
def test_broken_files(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(EdgeLabError, match=r"model.gguf is no whole GGUF file; fetch or convert it again\.$"):
        reference.load(str(tmp_path / "model.gguf"))


def test_a_file_that_is_cut(new_model, tmp_path):
    file = write(new_model("llama"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(GGUFError, match=r"model.gguf is no whole GGUF file"):
        reader.read(file)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", ["model.gguf", "X.GGUF"])
def test_a_file_with_its_tokenizer(name, adds, new_model, byte_tokenizer, tmp_path):
    """It begins texts with BOS where it did before, which decides what llamacpp-512 measures."""
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    if adds:
        adding = type(byte_tokenizer).from_pretrained(tmp_path / "tokenizer")
        adding.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
        adding.save_pretrained(tmp_path / "tokenizer")
    model = new_model("llama")
    export.write_model(model, tmp_path / "tokenizer", tmp_path / name, "tiny", "none")
    loaded = reference.load(str(tmp_path / name))
    assert loaded.name == name.partition(".")[0]
    assert torch.equal(logits(loaded.model), logits(model))
    assert tasks.opening(loaded.tokenizer) == ([0] if adds else [])
    text = "The keeper counted ships: 21.\n"
    plain = {"add_special_tokens": False}
    assert loaded.tokenizer(text, **plain)["input_ids"] == byte_tokenizer(text, **plain)["input_ids"]
