"""GGUF files of other programs: with keys of tools, without keys that llama.cpp insists on, and no models at all."""

import struct
from importlib.metadata import version

import gguf
import numpy as np
import pytest
import torch

from edgelab.gguf_files import layouts, reader, tokenizer_reader
from edgelab.gguf_files.reader import GGUFError
from edgelab.runtimes import gguf as export

IDS = torch.randint(2, 300, (1, 60), generator=torch.Generator().manual_seed(0))
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "num_hidden_layers": 3}


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(model, changes)`: a file of a model, with other settings; those that are None are left out."""
    stated, sizes = layouts.stated, export.layer_sizes

    def written(model, changes):
        file = tmp_path / "model.gguf"

        def changed(*about):
            found = stated(*about) | changes
            return {key: value for key, value in found.items() if value is not None}

        def unchanged(model):
            return {key: each for key, each in sizes(model).items() if key not in changes}

        monkeypatch.setattr(export, "stated", changed)
        monkeypatch.setattr(export, "layer_sizes", unchanged)
        export.write_model(model, tmp_path, file, "tiny", "none")
        return file

    return written


def bare(file, architecture="llama", state=lambda writer: None):
    """A file with one tensor, whatever it is of."""
    writer = gguf.GGUFWriter(file, architecture)
    state(writer)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


# Windows of Gemma


@pytest.mark.parametrize("stated", [None, 0])
def test_a_gemma_3_without_a_window_has_one_rotary_base_and_no_windows(stated, new_model, write):
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }
    kinds = ["full_attention"] * 3
    model = new_model("gemma3_text", **GEMMA, layer_types=kinds, rope_parameters=ropes)
    read = reader.read(write(model, {layouts.WINDOW: stated, layouts.PATTERN: None}))
    assert read.config.layer_types == kinds
    assert torch.equal(logits(read), logits(model))


def test_a_gemma_2_without_windows_has_one_over_all_of_the_text(new_model, write):
    model = new_model("gemma2", **GEMMA, layer_types=["full_attention"] * 3)
    file = write(model, {})
    said = gguf.GGUFReader(file).fields
    assert said[f"gemma2.{layouts.WINDOW}"].contents() == model.config.max_position_embeddings
    assert f"gemma2.{layouts.PATTERN}" not in said  # an empty one ends llama.cpp
    assert reader.read_config(file).layer_types == ["full_attention"] * 3


def test_a_window_of_nothing_in_a_gemma_2(new_model, write):
    with pytest.raises(GGUFError, match="has blocks that see 0 tokens of the text, which is not read here"):
        reader.read_config(write(new_model("gemma2", **GEMMA), {layouts.WINDOW: 0}))


@pytest.mark.parametrize(("period", "kind"), [(0, "sliding_attention"), (1, "full_attention")])
def test_a_period_of_windows_as_llama_cpp_counts_it(period, kind, new_model, write):
    file = write(new_model("gemma2", **GEMMA), {layouts.PATTERN: period})
    assert reader.read_config(file).layer_types == [kind] * 3


# Keys


def test_keys_of_tools_are_no_settings(new_model, write, monkeypatch):
    add = export.add_shape

    def more(writer, model):
        add(writer, model)
        writer.add_string("mradermacher.quantize_version", "2")
        writer.add_string("quantize.imatrix.file", "imatrix.dat")
        writer.add_uint32("llama.expert_count", 0)

    monkeypatch.setattr(export, "add_shape", more)
    model = new_model("llama")
    assert torch.equal(logits(reader.read(write(model, {}))), logits(model))


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("llama", "attention.layer_norm_rms_epsilon"),
        ("llama", "block_count"),
        ("llama", "feed_forward_length"),
        ("llama", "context_length"),
        ("llama", "attention.head_count"),
        ("llama", "embedding_length"),
        ("phi", "attention.layer_norm_epsilon"),
        ("gpt_neox", "use_parallel_residual"),
    ],
)
def test_a_key_that_no_file_may_lack(layout, key, new_model, write):
    file, name = write(new_model(layout), {key: None}), layouts.LAYOUTS[layout].name
    with pytest.raises(GGUFError, match=rf"^model.gguf lacks {name}\.{key}; give the whole file\.$"):
        reader.read_config(file)


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("llama", "attention.head_count_kv"),
        ("llama", "attention.key_length"),
        ("llama", "vocab_size"),
        ("llama", "rope.freq_base"),
        ("stablelm", "use_parallel_residual"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", layouts.WINDOW),
    ],
)
def test_a_key_that_a_file_may_lack(layout, key, new_model, write):
    settings = GEMMA if layout == "gemma2" else {"num_key_value_heads": 4}
    changes = {key: None, "attention.value_length": None} if "key_length" in key else {key: None}
    reader.read(write(new_model(layout, **settings), changes))


@pytest.mark.parametrize(
    ("layout", "key"),
    [("llama", "rope.freq_base"), ("gemma3_text", "rope.freq_base_swa")],
)
def test_a_rotary_base_of_nothing(layout, key, new_model, write):
    settings = GEMMA if layout == "gemma3_text" else {}
    with pytest.raises(GGUFError, match=rf"states \w+\.{key}=0, which is not read here"):
        reader.read_config(write(new_model(layout, **settings), {key: 0.0}))


def test_more_tokens_than_rows(new_model, write, monkeypatch):
    add = export.add_shape

    def more(writer, model):
        add(writer, model)
        writer.add_token_list([str(number) for number in range(301)])

    monkeypatch.setattr(export, "add_shape", more)
    with pytest.raises(GGUFError, match="has 301 tokens and an embedding of 300 rows; fetch or convert it"):
        reader.read_config(write(new_model("llama"), {"vocab_size": None}))


# Files


@pytest.mark.parametrize(
    ("architecture", "kind", "held"),
    [
        ("llama", "adapter", "a LoRA adapter"),
        ("llama", "imatrix", "statistics of activations"),
        ("clip", "mmproj", "what makes images or sounds into embeddings"),
        ("clip", None, "what makes images or sounds into embeddings"),
    ],
)
def test_what_is_no_model(architecture, kind, held, tmp_path):
    file = bare(tmp_path / "x.gguf", architecture, lambda writer: kind and writer.add_type(kind))
    for read in (reader.read, reader.read_config, tokenizer_reader.read):
        with pytest.raises(GGUFError, match=f"^x.gguf holds {held} and no model; give the file of a model"):
            read(file)


@pytest.mark.parametrize("number", [1, 4])
def test_another_version_of_the_format(number, tmp_path):
    file = bare(tmp_path / "x.gguf")
    file.write_bytes(b"GGUF" + struct.pack("<I", number) + file.read_bytes()[8:])
    with pytest.raises(GGUFError, match=f"^x.gguf is GGUF of version {number}, and 2 and 3 are read here"):
        reader.opened(file)


def test_a_big_endian_file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"^x.gguf is for big-endian machines; convert it"):
        reader.opened(tmp_path / "x.gguf")


def test_a_type_of_tensors_that_is_newer_than_the_package(tmp_path):
    file = bare(tmp_path / "x.gguf")
    content, name = file.read_bytes(), b"token_embd.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8  # behind the count of sizes, and two of them
    file.write_bytes(content[:place] + struct.pack("<I", 4242) + content[place + 4 :])
    known = version("gguf")
    with pytest.raises(GGUFError, match=f"^x.gguf holds tensors of type 4242, which gguf {known} does not"):
        reader.opened(file)
