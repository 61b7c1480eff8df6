"""GGUF files read back with the gguf package: our integers, our matrices, our model, the tokenizer of the embedded one.

A type with a minimum keeps m = -zero_point * scale in float16, whose relative error is at most 2**-11 (and 2**-25 at
worst for what is smaller than float16's smallest normal number): so much a weight may be off, the others not at all.
"""

import dataclasses
import re

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import nn
from transformers import AutoModelForCausalLM

from edgelab import assets, reference
from edgelab.recipes import Context, parse
from edgelab.runtimes import RuntimeRefused
from edgelab.runtimes import gguf as files
from edgelab.storage import variants
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.hqq import quantize_half_quadratic
from edgelab.techniques.quantization.one_bit import quantize_binary, quantize_ternary
from edgelab.techniques.quantization.rtn import quantize_affine

IDS = torch.arange(5, 69)[None]


def apply(text, model):
    for technique in parse(text).techniques:
        model = technique.apply(model, Context(reference=model))
    return model


def saved(text, model, folder, tokenizer=None):
    """The folder of a variant of `model` by a recipe."""
    variants.save(apply(text, model), folder, {"model": "tiny", "recipe": text}, tokenizer)
    return folder


def read(file):
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: tensor for tensor in reader.tensors
    }


def weights(rows=64, inputs=192):
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(rows, inputs, generator=generator)
    weight[::4] = weight[::4].abs()
    return weight


def test_a_block_by_hand():
    integers = torch.arange(32, dtype=torch.uint8)[None] % 16
    tensor = QuantizedTensor(
        integers, torch.tensor([[0.5]]).half(), torch.tensor([[3]], dtype=torch.uint8), 4
    )
    block, kind = files.encode(tensor)
    # 0.5 is 0x3800 and -3 * 0.5 is 0xbe00 in float16; weight j shares a byte with weight j + 16, the same integer here
    assert kind == Type.Q4_1
    assert block.tobytes() == bytes.fromhex("0038 00be") + bytes(17 * j for j in range(16))
    symmetric = dataclasses.replace(tensor, zero_point=None)
    block, kind = files.encode(symmetric)
    assert (kind, block.tobytes()) == (Type.Q4_0, bytes.fromhex("0038") + bytes(17 * j for j in range(16)))
    two_bits = QuantizedTensor(integers % 4, tensor.scale, None, 2)  # 2 stands for zero, 8 in the file
    assert files.encode(two_bits)[0][0, 2:].tolist() == [17 * (6 + j % 4) for j in range(16)]
    five_bits = QuantizedTensor(torch.arange(32, dtype=torch.uint8)[None], tensor.scale, None, 5)
    block, kind = files.encode(five_bits)
    # fifth bits of weights 16 to 31, four bytes little end first; then four bits of each weight
    assert kind == Type.Q5_0
    assert block.tobytes() == bytes.fromhex("0038 0000ffff") + bytes(17 * j for j in range(16))
    eight_bits = QuantizedTensor(torch.arange(112, 144, dtype=torch.uint8)[None], tensor.scale, None, 8)
    block, kind = files.encode(eight_bits)
    assert kind == Type.Q8_0 and block[0, 2:].view(np.int8).tolist() == list(range(-16, 16))


GRIDS = {
    **{
        f"{bits} bits{', symmetric' if symmetric else ''}, groups of {group_size or 'a row'}": (
            lambda weight, bits=bits, size=group_size, symmetric=symmetric: quantize_affine(
                weight, bits, size, symmetric
            )
        )
        for bits in range(2, 9)
        for group_size in (32, 64, 0)
        for symmetric in (False, True)
        if bits < 8 or symmetric
    },
    "one scale for the matrix": lambda weight: quantize_affine(weight, 4, 0, per_tensor=True),
    "zero-points between integers": lambda weight: quantize_half_quadratic(weight, 4, 64),
    "zero-points between integers, 5 bits": lambda weight: quantize_half_quadratic(weight, 5, 64),
    "ternary": lambda weight: quantize_ternary(weight, 0),
    "binary": lambda weight: quantize_binary(weight, 64),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_type_gives_back_the_matrix(grid):
    tensor = GRIDS[grid](weights())
    assert isinstance(tensor, QuantizedTensor)
    blocks, kind = files.encode(tensor)
    back = torch.from_numpy(dequantize(blocks, kind))
    zero = tensor.centre() * tensor.scale.float()  # (out, groups) or (1, 1)
    allowed = torch.zeros_like(zero)
    if kind in (Type.Q4_1, Type.Q5_1):
        allowed = (zero.abs() * 2.0**-11).clamp(min=2.0**-25)
    off = (back - tensor.dequantize()).unflatten(1, (tensor.scale.shape[1], -1)).abs()
    # float32 rounds q d and the sum, which is all that is allowed where there is no minimum
    assert (off <= allowed[..., None] + 2.0**-22 * back.abs().max() * bool(allowed.any())).all()
    # the integers themselves: what the file adds to them is the same all over a block
    scale = tensor.scale.float()[..., None]
    minimum = -zero.half().float()[..., None] if bool(allowed.any()) else -zero[..., None]
    found = (back.unflatten(1, (tensor.scale.shape[1], -1)) - minimum) / scale
    assert (found.round() == tensor.integers.unflatten(1, (tensor.scale.shape[1], -1))).all()
    bits = {Type.Q4_0: 4.5, Type.Q4_1: 5, Type.Q5_0: 5.5, Type.Q5_1: 6, Type.Q8_0: 8.5}[kind]
    assert blocks.nbytes * 8 == bits * back.numel()


def test_a_minimum_that_float16_cannot_hold_is_refused():
    scale, zero_point = torch.tensor([[1000.0]]).half(), torch.tensor([[200.0]]).half()
    tensor = QuantizedTensor(torch.ones(1, 32, dtype=torch.uint8), scale, zero_point, 4)
    with pytest.raises(RuntimeRefused, match="beyond float16"):
        files.encode(tensor)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("none", {"F32"}),
        ("quantize.fp16", {"F16", "F32"}),
        ("quantize.bf16", {"BF16", "F32"}),
        ("quantize.rtn:bits=4,group_size=32", {"Q4_1", "F32"}),
        ("quantize.rtn:bits=4,symmetric=true,embedding_bits=8", {"Q4_0", "Q8_0", "F32"}),
        ("quantize.rtn:bits=3,embedding_bits=5", {"Q4_1", "Q5_1", "F32"}),
        ("quantize.rtn:bits=8,group_size=0,symmetric=true", {"Q8_0", "F32"}),
        ("quantize.hqq:bits=4", {"Q4_1", "F32"}),
    ],
)
def test_a_file_holds_the_tensors_of_the_variant(text, kinds, new_model, tmp_path):
    variant = saved(text, new_model("llama", attention_bias=True), tmp_path / "variant")
    written = files.write(variant, tmp_path / "model.gguf")
    metadata, tensors = read(tmp_path / "model.gguf")
    assert {tensor.tensor_type.name for tensor in tensors.values()} == kinds
    assert written == sum(int(tensor.n_bytes) for tensor in tensors.values())
    assert metadata["edgelab.types"].split() == list(
        dict.fromkeys(tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1)
    )
    assert "output.weight" not in tensors  # tied
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    model = variants.load(variant)
    layers = {name: layer.tensor for name, layer in model.named_modules() if hasattr(layer, "tensor")}
    layers.pop("lm_head", None)
    for name, matrix in layers.items():
        matrix = dataclasses.replace(matrix, scale=matrix.scale.expand(len(matrix.integers), -1))
        order = list(range(len(matrix.integers)))
        if name.endswith(("q_proj", "k_proj")):  # heads of 16 rows: 0, 8, 1, 9 and so on
            order = [head + 8 * half + row for head in order[::16] for row in range(8) for half in (0, 1)]
        found = tensors[names.get_name(f"{name}.weight", try_suffixes=(".weight",))]
        moved = [
            None if part is None else part[order]
            for part in (matrix.integers, matrix.scale, matrix.zero_point)
        ]
        expected, kind = files.encode(QuantizedTensor(*moved, matrix.bits))
        assert found.tensor_type == kind and (found.data == expected).all()
    for name, parameter in model.named_parameters():
        found = tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        values = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            values = values.unflatten(0, (-1, 2, 8)).transpose(1, 2).flatten(0, 2)
        data = torch.from_numpy(found.data.copy())
        if found.tensor_type == Type.BF16:
            data = data.view(torch.bfloat16)
        assert (data.reshape(values.shape).float() == values.float()).all(), name


@pytest.mark.parametrize("layout", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_model(layout, new_model, byte_tokenizer, tmp_path):
    changes = (
        {"head_dim": 128} if layout == "qwen3" else {}
    )  # all that transformers takes a Qwen3 file to have
    model = new_model(layout, num_hidden_layers=3, tie_word_embeddings=layout != "qwen2", **changes)
    variants.save(model, tmp_path / "variant", {}, byte_tokenizer)
    files.write(tmp_path / "variant", tmp_path / "model.gguf")
    with assets.quiet_loading():
        back = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        ).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert back.config.num_key_value_heads == 2 and back.config.max_position_embeddings == 4096


def test_a_tied_model_with_a_rounded_head_keeps_two_matrices(new_model, tmp_path):
    model = new_model("llama")
    head = quantize_affine(model.lm_head.weight.detach(), 8, 0, symmetric=True)
    model.lm_head = PackedLinear(head)
    variants.save(model, tmp_path / "variant", {})
    files.write(tmp_path / "variant", tmp_path / "model.gguf")
    _, tensors = read(tmp_path / "model.gguf")
    assert tensors["output.weight"].tensor_type == Type.Q8_0
    assert tensors["token_embd.weight"].tensor_type == Type.F32


def test_rotary_scaling_becomes_keys_or_factors(new_model, tmp_path):
    def written(**scaling):
        model = new_model("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
        files.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", "none")
        metadata, tensors = read(tmp_path / "model.gguf")
        keys = {key: value for key, value in metadata.items() if key.startswith("llama.rope.scaling")}
        return keys, tensors.get("rope_freqs.weight")

    assert written(rope_type="default") == ({}, None)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert written(rope_type="linear", factor=4.0) == (linear, None)
    before = {"original_max_position_embeddings": 1024}
    keys, factors = written(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **before
    )
    assert keys == {}
    # wavelengths 2 pi 10000^(i / 8): below 1024 / 4 as they are, above 1024 / 1 divided by 8, mixed in between
    smooth = (1024 / (2 * np.pi * 10000 ** (4 / 8)) - 1) / 3
    expected = [1, 1, 1, 1, 1 / ((1 - smooth) / 8 + smooth), 8, 8, 8]
    np.testing.assert_allclose(factors.data, expected, rtol=1e-5)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, **before}
    for layout, kind in (("qwen3", "llama3"), ("gemma2", "yarn")):
        scaling = yarn | {"rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        about = variants.describe(new_model(layout, rope_parameters=scaling, query_pre_attn_scalar=256))
        assert re.search(
            f"rotary scaling of a {layout} model, and this one has '{kind}'", files.refusal(about)
        )


def narrower(model):
    """The model with half the MLP channels in its second layer, in place."""
    mlp = model.model.layers[1].mlp
    for layer in (mlp.up_proj, mlp.gate_proj):
        layer.weight, layer.out_features = nn.Parameter(layer.weight[:96].clone()), 96
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :96].clone())
    return model


def test_layers_of_different_sizes(new_model, tmp_path):
    files.write_model(narrower(new_model("llama")), tmp_path, tmp_path / "model.gguf", "tiny", "by hand")
    metadata, tensors = read(tmp_path / "model.gguf")
    assert metadata["general.architecture"] == "deci" and metadata["deci.feed_forward_length"] == [192, 96]
    assert metadata["deci.attention.head_count"] == 4
    assert tensors["blk.1.ffn_down.weight"].shape.tolist() == [96, 64]
    assert files.refusal(variants.describe(narrower(new_model("llama")))) is None
    assert "model.layers.1.mlp.gate_proj of a qwen3 model" in files.refusal(
        variants.describe(narrower(new_model("qwen3")))
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_act": "gelu"}, "with silu, and this one has gelu"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(changes, sentence, new_model):
    changes = dict(changes)
    model = new_model(changes.pop("layout", "llama"), **changes)
    assert sentence in files.refusal(variants.describe(model))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quantize.rtn:bits=8", "8 bits around zero only, and .*_proj has zero-points; use symmetric=true"),
        ("quantize.rtn:bits=4,embedding_bits=8", "8 bits around zero only, and model.embed_tokens has"),
        ("quantize.hqq:bits=6", "6 bits around zero only"),
        ("quantize.rtn:bits=4,group_size=16", "groups of 16; use a group_size that 32 divides"),
        ("quantize.nf4", "no type for the codebook of model.layers.0"),
    ],
)
def test_grids_without_a_type_are_refused(text, sentence, new_model):
    assert re.search(sentence, files.refusal(variants.describe(apply(text, new_model("llama")))))


def test_the_tokenizer_of_the_tiny_model(new_model, byte_tokenizer, tmp_path):
    byte_tokenizer.chat_template = "{{ messages }}"
    try:
        variant = saved("none", new_model("llama", vocab_size=304), tmp_path / "variant", byte_tokenizer)
    finally:
        byte_tokenizer.chat_template = None
    files.write(variant, tmp_path / "model.gguf")
    metadata, _ = read(tmp_path / "model.gguf")
    key = "tokenizer.ggml."
    assert (metadata[f"{key}model"], metadata[f"{key}pre"]) == ("gpt2", "gpt-2")
    assert metadata[f"{key}tokens"] == [
        *byte_tokenizer.convert_ids_to_tokens(list(range(300))),
        "[PAD300]",
        "[PAD301]",
        "[PAD302]",
        "[PAD303]",
    ]
    assert metadata[f"{key}token_type"] == [3, 3, *[1] * 298, *[5] * 4]
    assert len(metadata[f"{key}merges"]) == 42
    assert (metadata[f"{key}bos_token_id"], metadata[f"{key}eos_token_id"]) == (0, 1)
    assert metadata[f"{key}add_bos_token"] is False
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


def test_without_a_byte_level_tokenizer_the_file_has_none(new_model, tmp_path):
    files.write(saved("none", new_model("llama"), tmp_path / "variant"), tmp_path / "model.gguf")
    metadata, _ = read(tmp_path / "model.gguf")
    assert metadata["tokenizer.ggml.model"] == "none" and metadata["llama.vocab_size"] == 300


@pytest.mark.embedded
def test_the_embedded_model_is_described_as_in_its_own_file(tmp_path):
    """All that both files say; the original adds where it comes from, ours the head size and who wrote it.

    Digits stand alone in the original, "smollm", and not in the tokenizer that was decoded from it.
    """
    source = reference.resolve()
    model = reference.load_model(source)
    files.write_model(model, assets.model_folder(), tmp_path / "model.gguf", source.name, "none")
    ours, tensors = read(tmp_path / "model.gguf")
    theirs, original = read(assets.home() / "assets" / "gguf" / assets.GGUF_FILE)
    assert tensors.keys() == original.keys()
    assert all((tensors[name].shape == original[name].shape).all() for name in tensors)
    same = [key for key in theirs if key.startswith(("llama.", "tokenizer."))]
    assert len(same) > 20
    theirs["tokenizer.ggml.pre"] = "gpt-2"
    for key in same:
        assert ours[key] == theirs[key], key
    name = "blk.3.attn_q.weight"
    assert (tensors[name].data == dequantize(original[name].data, original[name].tensor_type)).all()
