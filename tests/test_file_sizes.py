"""Sizes of GGUF files by formula: to the byte against real files, and against published ones."""

import gguf
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from edgelab import assets
from edgelab.devices import (
    MIXTURES,
    ModelShape,
    ShapeError,
    TensorFile,
    file_sizes,
    gguf_bytes,
    gguf_tensors,
    gguf_token_bytes,
    gguf_weight_bytes,
    header_bytes,
    models,
)
from edgelab.devices.file_sizes import BLOCKS, OWN_HEAD
from edgelab.devices.shapes import COUNTED
from edgelab.gguf_files.layouts import LAYOUTS
from edgelab.runtimes import gguf as exported

TINY = ModelShape("tiny", "llama", 3, 64, 4, 2, 16, 96, 40)


def kinds(shape, kind, **settings):
    return {one.name: one.kind for one in gguf_tensors(shape, kind, **settings)}


def test_the_blocks_are_those_of_ggml():
    for name, sizes in BLOCKS.items():
        assert sizes == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]], name


def test_a_tiny_file_by_hand():
    # embedding and head 40 x 64; of a layer query and output 64 x 64, key and value 32 x 64, three of the MLP 96 x 64
    tensors = gguf_tensors(TINY, "Q8_0")
    assert len(tensors) == 2 + 1 + 3 * 9
    weights = 2 * 40 * 64 + 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    assert gguf_weight_bytes(TINY, "Q8_0") == weights // 32 * 34 + 4 * 64 * 7
    assert gguf_weight_bytes(TINY, "F16") == 2 * weights + 4 * 64 * 7
    # every row of the embedding but one is not read
    assert gguf_token_bytes(TINY, "F16") == gguf_weight_bytes(TINY, "F16") - 39 * 64 * 2
    names = sum(len(one.name) for one in tensors)
    assert sum(len(one.shape) for one in tensors) == 2 * (2 + 21) + 7
    stated = (8 + 3) + 4 + (8 + 2) + (8 + 5) + 4 + (4 + 8 + 2 * (8 + 1))
    found = header_bytes({"key": "ab", "ab c!": ["x", "y"]}, tensors)
    assert found == -(-(24 + stated + names + 30 * (8 + 4 + 4 + 8) + 8 * 53) // 32) * 32


@pytest.mark.embedded
def test_the_embedded_file_to_the_byte():
    file = assets.home() / "assets" / "gguf" / assets.GGUF_FILE
    reader = gguf.GGUFReader(file)
    metadata = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")
    }
    stored = {
        one.name: (tuple(int(n) for n in reversed(one.shape)), one.tensor_type.name) for one in reader.tensors
    }
    tensors = [TensorFile(name, *sizes) for name, sizes in stored.items()]
    assert header_bytes(metadata, tensors) == reader.data_offset
    shape = models()["SmolLM2-135M"]
    predicted = gguf_tensors(shape, "Q4_1", embedding="Q8_0")
    assert {one.name: (one.shape, one.kind) for one in predicted} == stored
    assert gguf_bytes(shape, "Q4_1", embedding="Q8_0", metadata=metadata) == file.stat().st_size
    assert gguf_bytes(shape, "Q4_1", embedding="Q8_0") == pytest.approx(file.stat().st_size, rel=0.005)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        ("llama", True),
        ("llama", False),
        ("phi", True),
        ("phi", False),
        ("stablelm", True),
        ("stablelm", False),
    ],
)
def test_a_file_that_is_written_has_the_predicted_size(layout, tied, kind, tmp_path):
    """Tensors of a random model as they are exported, written by the gguf package in each of the types."""
    config = AutoConfig.for_model(
        layout, vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    file, stored = tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "bc", "déf"])
    writer.add_token_types([1, 1, 3])
    for name, values, _ in exported.tensors(AutoModelForCausalLM.from_config(config)):
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = {"general.architecture": "llama", "llama.block_count": 3}
    metadata |= {"tokenizer.ggml.tokens": ["a", "bc", "déf"], "tokenizer.ggml.token_type": [1, 1, 3]}
    shape = ModelShape.from_config(config)
    assert gguf_bytes(shape, kind, embedding=kind, metadata=metadata) == file.stat().st_size


def test_a_head_of_its_own_is_not_the_embedding():
    """llama.cpp then gives the embedding the type of the other matrices, and a token reads one row of it."""
    assert set(OWN_HEAD) == {name for name in COUNTED if LAYOUTS[name].own_head}
    shape = ModelShape("tied", "stablelm", 1, 256, 4, 2, 64, 256, 40, tied_embeddings=True)
    mixed = kinds(shape, "Q4_K_M")
    assert (mixed["output.weight"], mixed["token_embd.weight"]) == ("Q6_K", "Q4_K")
    assert gguf_token_bytes(shape, "F16") == gguf_weight_bytes(shape, "F16") - 39 * 256 * 2


def test_published_files_are_predicted_within_half_a_percent():
    table = file_sizes()
    billions = {round(models()[name].parameters / 1e9) for name in table["model"]}
    assert len(table) >= 30 and {7, 13, 69} <= billions  # Llama-2-70B has 68.98 billion
    off = table[table["error"].abs() > 0.005]
    assert off.empty, off.drop(columns="source").to_string()
    assert table["source"].str.contains(r"huggingface\.co/|github\.com/").all()


def test_files_of_one_repository_differ_by_their_tensors_alone():
    """Their headers are alike, so that the differences do not depend on what is known of the tokenizer."""
    table = file_sizes()
    repository = table[table["source"].str.contains("PrunaAI/unsloth-llama-2-13b")]
    assert len(repository) >= 8
    shape = models()["Llama-2-13B"]
    left = {row["measured_bytes"] - gguf_weight_bytes(shape, row["kind"]) for _, row in repository.iterrows()}
    assert max(left) - min(left) < 100  # the name of the kind in the header, and padding


def test_what_llama_bench_calls_the_size():
    # tools/llama-bench/README.md of llama.cpp, and its lines on Llama-3.2 1B and 3B
    assert gguf_weight_bytes(models()["Qwen2.5-7B"], "Q4_K_M") == 4_677_120_000
    assert f"{gguf_weight_bytes(models()['Llama-3.2-1B'], 'Q4_0') / 2**20:.2f}" == "727.75"
    assert f"{gguf_weight_bytes(models()['Llama-3.2-1B'], 'F16') / 2**30:.2f}" == "2.30"
    assert f"{gguf_weight_bytes(models()['Llama-3.2-3B'], 'Q4_K_M') / 2**30:.2f}" == "1.87"
    assert f"{gguf_weight_bytes(models()['Llama-2-7B'], 'Q4_0') / 2**30:.2f}" == "3.56"
    # README.md of github.com/kreier/llama.cpp-jetson, and lines of gemma-3-4b-it
    assert f"{gguf_weight_bytes(models()['Gemma-3-1B'], 'Q4_K_M') / 2**20:.2f}" == "762.49"
    assert f"{gguf_weight_bytes(models()['Gemma-3-4B'], 'Q4_K_M') / 2**30:.2f}" == "2.31"


def test_a_mixture_gives_more_bits_where_llama_cpp_does():
    mixed = kinds(models()["Llama-2-7B"], "Q4_K_M")
    raised = {layer for layer in range(32) if mixed[f"blk.{layer}.ffn_down.weight"] == "Q6_K"}
    assert raised == {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert raised == {layer for layer in range(32) if mixed[f"blk.{layer}.attn_v.weight"] == "Q6_K"}
    assert mixed["output.weight"] == "Q6_K" and mixed["token_embd.weight"] == "Q4_K"
    assert mixed["blk.5.attn_q.weight"] == "Q4_K" and mixed["blk.5.attn_norm.weight"] == "F32"
    assert kinds(models()["Gemma-2B"], "Q4_K_M")["token_embd.weight"] == "Q6_K"  # which is the head, too
    assert kinds(models()["Llama-2-70B"], "Q4_K_M")["blk.10.attn_v.weight"] == "Q5_K"
    guarded = kinds(models()["Llama-2-7B"], "Q4_0", importance=True)
    assert guarded["blk.3.ffn_down.weight"] == "Q4_1" and guarded["blk.4.ffn_down.weight"] == "Q4_0"


def test_rows_that_no_block_of_256_divides_fall_back():
    small = kinds(models()["SmolLM2-135M"], "Q4_K_M")  # rows of 576 = 2.25 x 256, and 1536 = 6 x 256
    assert small["blk.12.attn_q.weight"] == "Q5_0" and small["blk.0.attn_v.weight"] == "Q8_0"
    assert small["blk.0.ffn_down.weight"] == "Q6_K" and small["token_embd.weight"] == "Q8_0"
    assert kinds(models()["SmolLM2-135M"], "IQ4_XS")["blk.9.attn_q.weight"] == "IQ4_NL"


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_kind_of_every_model_is_smaller_than_its_floats(kind):
    for shape in models().values():
        assert gguf_token_bytes(shape, kind) <= gguf_weight_bytes(shape, kind) < gguf_bytes(shape, kind)
        assert gguf_weight_bytes(shape, kind) <= gguf_weight_bytes(shape, "F32")


def test_kinds_and_rows_that_cannot_be_are_refused():
    with pytest.raises(ShapeError, match="called 'Q9_9'; there are F32"):
        gguf_bytes(TINY, "Q9_9")
    with pytest.raises(ShapeError, match="called 'Q9_9'"):
        gguf_bytes(TINY, "Q8_0", embedding="Q9_9")
    odd = ModelShape("odd", "llama", 1, 40, 4, 2, 10, 96, 40)
    with pytest.raises(ShapeError, match=r"token_embd\.weight has rows of 40 weights"):
        gguf_bytes(odd, "Q8_0")
