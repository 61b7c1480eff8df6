"""Techniques on layouts of transformers that differ in what a block is given, answers, and is made of."""

import copy
import re

import pytest
import torch
from torch import nn

from edgelab.model import blocks as structure
from edgelab.model.blocks import block_list, blocks, is_linear
from edgelab.model.logits import head_logits, hidden_states
from edgelab.model.shapes import skeleton
from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.storage.layers import PackedLinear
from edgelab.techniques import calibration
from edgelab.techniques.quantization.rtn import linear_layers

MIXTURE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "pad_token_id": None,
}
WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
STREAMS = WINDOWED | {
    "intermediate_size": [96, 96],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 300,
    "laurel_rank": 32,
    "activation_sparsity_pattern": [0.0, 0.0],
}
LAYOUTS = {
    "bloom": {"n_layer": 2, "n_head": 4},  # alibi: several rows for each sample; positional arguments
    "falcon": {"alibi": True, "multi_query": True},  # a Linear of its own; blocks that answer with a tensor
    "falcon new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2},
    "phi3": {"pad_token_id": None},  # queries, keys and values in one layer; gate and up in one
    "gpt_neox": {},
    "xglm": {
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 96,
    },  # a mask of its own for each sample
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "opt": {
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },  # layers outside of blocks
    "gemma3_text": WINDOWED,  # other masks and rotary embeddings in each block
    "cohere2": WINDOWED,
    "olmo": {},  # norms without weights
    "phimoe": MIXTURE,  # routers that are Linear by class and answer with a tuple
    "glm4_moe": MIXTURE | {"head_dim": 16, "n_shared_experts": 1},
    "granitemoe": MIXTURE,
}
CALIBRATED = "samples=2,length=32"
RECIPES = [
    "quantize.rtn:bits=8,group_size=32 + quantize.embedding",
    f"quantize.gptq:bits=8,group_size=32,{CALIBRATED}",
    f"quantize.awq:bits=8,group_size=32,{CALIBRATED}",
    f"quantize.autoround:bits=8,group_size=32,iterations=2,{CALIBRATED}",
    f"quantize.smooth:{CALIBRATED}",
    f"quantize.mixed:bits=7.5,group_size=32,{CALIBRATED}",
]


@pytest.fixture
def context(byte_tokenizer, monkeypatch, story) -> Context:
    """A context whose calibration text is the story of the tests."""
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    return Context(tokenizer=byte_tokenizer, record=Record())


def made(name: str, new_model, **changes):
    """A tiny model with weights of a size at which 8 bits are all but exact."""
    model = new_model(name.split()[0], **{**LAYOUTS.get(name, {}), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def log_p(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head_logits(model, hidden_states(model, ids[None])).log_softmax(-1)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda text: re.split("[.:]", text)[1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_eight_bits_are_near_to_float(name, recipe, new_model, context, story):
    """A divergence of a few hundredths of a nat at most, and no linear layer left over that no note names."""
    model = made(name, new_model)
    if name == "xglm":
        recipe = recipe.partition(" + ")[0]  # its embedding is of a kind of its own
    changed = parse(recipe).apply(model, context)
    before, after = (log_p(one, story.ids[300:364]) for one in (model, changed))
    assert float((before.exp() * (before - after)).sum(-1).mean()) < 0.05
    left = [one for one, layer in changed.named_modules() if type(layer) is nn.Linear]
    head = {one for one, layer in changed.named_modules() if layer is changed.get_output_embeddings()}
    assert all(any(one in note for note in context.record.notes) for one in set(left) - head)


def test_each_block_gets_its_own_arguments(new_model):
    """A window of 8 tokens in the first block, the whole text in the second, and other rotary frequencies."""
    model = made("gemma3_text", new_model)
    ids = torch.arange(2, 34).view(1, -1)
    found, hidden = blocks(model, ids)
    masks, rotary = (
        [block.arguments[key] for block in found] for key in ("attention_mask", "position_embeddings")
    )
    seen = [32 if mask is None else int(mask[0, 0, -1].sum()) for mask in masks]
    assert seen == [8, 32]
    assert not torch.equal(rotary[0][0], rotary[1][0])
    for block in found:
        hidden = block(hidden)
    torch.testing.assert_close(model.model.norm(hidden), model.model(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["bloom", "falcon", "mpt", "xglm", "gemma3_text", "opt"])
def test_blocks_over_many_samples_give_what_the_model_gives(name, new_model):
    model = made(name, new_model, **({"do_layer_norm_before": True} if name == "opt" else {}))
    ids = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    found, hidden = blocks(model, ids)
    last: list[torch.Tensor] = []
    with found[-1].module.register_forward_hook(
        lambda module, inputs, output: last.append(found[-1].states(output))
    ):
        model(ids)
    with torch.no_grad():
        for block in found:
            hidden = block(hidden)
    torch.testing.assert_close(hidden, last[0], rtol=1e-4, atol=1e-5)


def test_blocks_that_read_the_tokens_as_well_are_refused(new_model, context):
    """Gemma 3n adds to each block an embedding of the tokens of its own; and its states are no plain stack."""
    model = made("gemma3n_text", new_model, **STREAMS)
    with pytest.raises(
        RecipeError, match=r"one after the other: they read more of the text than the states.*quantize\.rtn"
    ):
        parse(f"quantize.gptq:group_size=0,{CALIBRATED}").apply(model, context)
    parse("quantize.rtn:bits=8,group_size=0").apply(model, context)


@pytest.mark.parametrize(
    "recipe",
    [
        "quantize.rtn:bits=8,group_size=32",
        "quantize.hqq:bits=8,group_size=32",
        "quantize.nf4:group_size=32",
        "quantize.ternary:group_size=32",
        "qat:bits=8,group_size=32,steps=1,length=16",
    ],
)
def test_layers_smaller_than_a_group_stay_in_float_and_are_noted(recipe, new_model, context, story):
    """Gemma 3n mixes its four streams by matrices of 4 x 4 and 16 x 4, one of each in a block."""
    model = made("gemma3n_text", new_model, **STREAMS)
    changed = parse(recipe).apply(model, context)
    (note,) = [note for note in context.record.notes if "smaller than a group of 32" in note]
    coefs = "model.layers.*.altup.correction_coefs, model.layers.*.altup.prediction_coefs"
    assert note == f"160 parameters of layers smaller than a group of 32 stay in float: {coefs}."
    mixing = changed.model.layers[0].altup
    assert type(mixing.correction_coefs) is type(mixing.prediction_coefs) is nn.Linear
    assert isinstance(mixing.modality_router, PackedLinear)
    if "bits=8" in recipe and "rtn" in recipe:
        before, after = (log_p(one, story.ids[300:364]) for one in (model, changed))
        assert float((before.exp() * (before - after)).sum(-1).mean()) < 0.05
    with pytest.raises(
        RecipeError, match=r"^group_size=128 does not divide the 32, 64 and 96 inputs.*use 32, 0"
    ):
        parse(recipe.replace("32", "128")).apply(model, context)
    assert type(
        parse("quantize.rtn:group_size=0").apply(model, context).model.layers[0].altup.correction_coefs
    ) is (PackedLinear)


@pytest.mark.parametrize("change", ["between", "order"])
def test_blocks_that_do_not_hand_on_are_refused(change, new_model):
    model = new_model("llama")
    if change == "between":
        model.model.layers[1].register_forward_pre_hook(
            lambda module, inputs, kwargs: ((2 * inputs[0], *inputs[1:]), kwargs),
            with_kwargs=True,
            prepend=True,
        )
        told = "the states behind model.layers.0 are not those that enter the next"
    else:
        model.model.layers[0].forward = lambda hidden, **arguments: model.model.layers[1](hidden, **arguments)
        told = "they do not run once each, in their order"
    with pytest.raises(RecipeError, match=told):
        blocks(model, torch.arange(2, 20)[None])


def test_the_blocks_are_the_largest_list_of_that_length(new_model):
    model = new_model("llama")
    layers = model.model._modules.pop("layers")
    model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    model.model.layers = layers
    assert block_list(model)[0] == "model.layers"


def test_a_router_that_picks_experts_is_no_linear_layer(new_model):
    model = made("phimoe", new_model)
    router = model.model.layers[0].mlp.router
    assert isinstance(router, nn.Linear) and not is_linear(router)
    assert is_linear(nn.Linear(4, 3)) and is_linear(nn.Linear(4, 3, bias=False))
    falcon = made("falcon", new_model).transformer.h[0].mlp.dense_4h_to_h
    assert type(falcon) is not nn.Linear and is_linear(falcon)
    names = set(linear_layers(model))
    assert names == {f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qkvo"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_model_without_memory_has_the_same_linear_layers(name, new_model):
    model = made(name, new_model)
    assert list(linear_layers(skeleton(model.config))) == list(linear_layers(model))


def test_a_layer_whose_weight_the_model_looks_at_stays_in_float(new_model, context, story):
    """The router of HunYuan's mixture asks for the type of its weight, the base model of Llama 4 for the device."""
    model = made("hunyuan_v1_moe", new_model, **MIXTURE, moe_topk=2, head_dim=16)
    changed = parse(RECIPES[1]).apply(model, context)
    assert type(changed.model.layers[1].mlp.gate.wg) is nn.Linear
    assert any("model.layers.*.mlp.gate.wg.weight" in note for note in context.record.notes)
    log_p(changed, story.ids[:8])
    model = made("llama4_text", new_model, head_dim=16, intermediate_size_mlp=96, num_local_experts=4)
    with pytest.raises(
        RecipeError, match=r"looks at the weight of its embedding.*leave out quantize\.embedding"
    ):
        parse("quantize.embedding").apply(model, context)


@pytest.mark.parametrize(
    "recipe", [*RECIPES, "quantize.dynamic", "quantize.hqq:bits=8", f"quantize.static:{CALIBRATED}"]
)
def test_experts_that_stay_in_float_are_noted(recipe, new_model, context):
    """4 experts of 3 matrices of 64 x 192, and a router of 4 x 64, in each of two blocks."""
    parse(recipe).apply(made("mixtral", new_model, num_local_experts=4), context)
    told = f"{2 * (4 * 3 * 64 * 192 + 4 * 64):,} parameters outside of plain linear layers stay in float: "
    notes = [note for note in context.record.notes if note.startswith(told)]
    assert len(notes) == 1
    assert "model.layers.*.mlp.experts.down_proj" in notes[0] and "model.layers.*.mlp.gate.weight" in notes[0]


@pytest.mark.parametrize("recipe", [*RECIPES, "qat:bits=4,steps=1,length=16"])
def test_matrices_of_another_kind_are_an_error_in_words(recipe, new_model, context):
    model = new_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(
        RecipeError, match=r"GPT2LMHeadModel has no linear layers.*matrices in Conv1D, Embedding; use"
    ):
        parse(recipe).apply(model, context)


def test_layers_that_no_text_reaches_are_rounded_and_noted(new_model, context):
    model = made("llama", new_model)
    with torch.no_grad():
        model.model.layers[1].add_module("unused", nn.Linear(64, 32))
    for technique in ("gptq", "awq"):
        recipe = f"quantize.{technique}:bits=4,group_size=32,{CALIBRATED}"
        changed = parse(recipe).apply(model, context)
        assert isinstance(changed.model.layers[1].unused, PackedLinear)
        told = "Layers that calibration does not reach are rounded to nearest: model.layers.1.unused."
        assert context.record.notes.pop() == told
    changed = parse(f"quantize.static:{CALIBRATED}").apply(model, context)
    assert changed.model.layers[1].unused.activation.scale is None
    assert "model.layers.1.unused" in context.record.notes[-1]


@pytest.mark.parametrize("sequential", [True, False])
def test_what_is_handed_on_is_what_the_rounded_block_gives(
    sequential, new_model, context, story, monkeypatch
):
    """At 2 bits, and in bfloat16 whatever this CPU has: the float block would give something quite different."""
    monkeypatch.setattr(structure, "bfloat16_is_fast", lambda: True)
    found, hidden = blocks(new_model("llama"), story.ids[:64].view(2, 32))
    as_it_was = copy.deepcopy(found[0])
    technique = parse(
        f"quantize.gptq:bits=2,group_size=32,true_sequential={str(sequential).lower()}"
    ).techniques[0]
    with torch.no_grad():
        handed_on = technique._round_block(found[0], hidden, context)
        with structure.half_precision():
            rounded, exact = found[0](hidden), as_it_was(hidden)
    torch.testing.assert_close(handed_on, rounded, rtol=1e-3, atol=1e-3)
    assert (exact - rounded).norm() > 0.1 * exact.norm()


def test_a_block_without_a_finite_loss_is_rounded_to_nearest_and_noted(new_model, context):
    """Errors of 1e20 have squares beyond float32."""
    model = new_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e21
    changed = parse(f"quantize.autoround:bits=4,group_size=32,iterations=3,{CALIBRATED}").apply(
        model, context
    )
    nearest = parse("quantize.rtn:bits=4,group_size=32").apply(model, Context())
    told = "model.layers.0: no finite loss, so that its layers are rounded to nearest."
    assert told in context.record.notes
    for name in linear_layers(model):
        if name.startswith("model.layers.0."):
            pair = [one.get_submodule(name).tensor.integers for one in (changed, nearest)]
            assert torch.equal(*pair)
