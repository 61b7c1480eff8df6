"""Quantizing twice: refused for packed layers, possible through quantize.unpack, which gives float layers back."""

import pytest
import torch
from torch import nn

from edgelab.recipes import Context, RecipeError, parse
from edgelab.storage import variants
from edgelab.storage.layers import PackedEmbedding, PackedLinear
from edgelab.techniques.quantization.rtn import linear_layers, quantize_affine

IDS = torch.arange(2, 40)[None]


def apply(text, model):
    for technique in parse(text).techniques:
        model = technique.apply(model, Context())
    return model


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize(
    "first",
    ["quantize.rtn:bits=8,embedding_bits=8", "quantize.hqq", "quantize.nf4", "quantize.codebook:bits=3"],
)
def test_unpacking_keeps_what_rounding_made(first, new_model, layout, tmp_path):
    packed = apply(first, new_model(layout))
    dense = apply("quantize.unpack", packed)
    assert any(isinstance(module, PackedLinear) for module in packed.modules())  # it changed a copy
    assert not any(isinstance(module, PackedLinear | PackedEmbedding) for module in dense.modules())
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(dense), logits(packed), rtol=1e-5, atol=1e-5)
    tied = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert tied == bool(dense.config.tie_word_embeddings)
    variants.save(dense, tmp_path / "variant", {})
    assert torch.equal(logits(variants.load(tmp_path / "variant")), logits(dense))


def test_rounding_rounded_weights_by_hand(new_model):
    model = new_model("llama")
    twice = apply("quantize.rtn:bits=8 + quantize.unpack + quantize.rtn:bits=4,group_size=32", model)
    for name, layer in linear_layers(model).items():
        once = quantize_affine(layer.weight.detach(), 8, 64).dequantize()
        assert torch.equal(
            twice.get_submodule(name).tensor.dequantize(), quantize_affine(once, 4, 32).dequantize()
        )


def test_embeddings_can_be_rounded_twice(new_model, layout):
    coarse = "quantize.rtn:embedding_bits=4"
    model = apply(
        f"quantize.rtn:embedding_bits=8 + quantize.unpack + {coarse} + quantize.unpack", new_model(layout)
    )
    assert all(len(row.unique()) <= 16 for row in model.get_input_embeddings().weight[:5])


@pytest.mark.parametrize(
    "second", ["quantize.rtn:bits=4", "quantize.hqq", "quantize.nf4", "quantize.codebook"]
)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_packed_layers_are_refused_with_the_way_out(second, some, new_model):
    model = new_model("llama")
    if some:
        layer = model.model.layers[1].mlp.up_proj
        model.model.layers[1].mlp.up_proj = PackedLinear(quantize_affine(layer.weight.detach(), 8, 0))
    else:
        model = apply("quantize.rtn:bits=8", model)
    many = "1 of 14" if some else "14 of 14"
    with pytest.raises(RecipeError, match=rf"{many} linear layers are quantized already.*quantize\.unpack"):
        apply(second, model)


@pytest.mark.parametrize("cast", ["quantize.bf16", "quantize.fp16"])
@pytest.mark.parametrize("packed", ["quantize.rtn:bits=4", "quantize.hqq", "quantize.nf4"])
def test_sixteen_bit_models_are_packed_and_unpacked_in_their_dtype(cast, packed, new_model):
    dtype = {"quantize.bf16": torch.bfloat16, "quantize.fp16": torch.float16}[cast]
    for text in (f"{cast} + {packed}", f"{packed} + {cast}"):
        model = apply(text, new_model("stablelm"))  # with biases
        assert logits(model).dtype == dtype
        dense = apply("quantize.unpack", model)
        assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
        assert torch.equal(logits(dense), logits(model))


def test_nothing_to_unpack(new_model):
    with pytest.raises(RecipeError, match=r"no packed layers; put a quantizing technique before it"):
        apply("quantize.unpack", new_model("llama"))


def test_a_model_without_linear_layers(new_model):
    model = new_model("gpt2", n_positions=64, n_embd=64, n_layer=1, n_head=2)
    assert not [m for m in model.transformer.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(RecipeError, match=r"GPT2LMHeadModel has no linear layers"):
        linear_layers(model)
