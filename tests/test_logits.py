"""Logits made slice by slice against those of the model's own forward pass, on layouts that differ around the head."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from edgelab.measure.perplexity import PerplexitySum, Window, slices
from edgelab.measure.protocols import PROTOCOLS
from edgelab.model.logits import (
    LogitsError,
    check_logits,
    head_logits,
    head_parameters,
    hidden_states,
)
from edgelab.model.losses import cross_entropy

LAYOUTS = {
    "llama": {},
    "hyperclovax": {"logits_scaling": 3.0},  # multiplies
    "granite": {"logits_scaling": 3.0},  # divides
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
    "gemma3": {"text_config": {"final_logit_softcapping": 2.0, "hidden_size": 64, "vocab_size": 300}},
    "minicpm3": {"num_key_value_heads": 4, "dim_model_base": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},  # 350m's: blocks wider than embedding and head
    "gptj": {"rotary_dim": 8},  # a head with a bias
    "gpt_neox": {},
    "roberta": {"is_decoder": True, "pad_token_id": 1},  # a layer, an activation and a norm before the head
    "bart": {"decoder_layers": 2, "d_model": 64, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    "llama4_text": {"intermediate_size_mlp": 96, "head_dim": 16},  # names no base model
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}
IDS = torch.randint(2, 300, (100,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LAYOUTS)
def model(request, new_model):
    return new_model(request.param, **LAYOUTS[request.param])


def test_perplexity_is_that_of_the_models_own_logits(model):
    check_logits(model)
    with torch.no_grad():
        expected = model(IDS[None, :-1], use_cache=False).logits[0].float()
    window = Window(IDS, 1, 99)
    found = PerplexitySum(None, PROTOCOLS["edgelab-512"], [window])
    pieces = list(slices(model, [window]))
    for piece in pieces:
        found.add(piece)
    assert [len(piece.logits) for piece in pieces] == [64, 35]
    torch.testing.assert_close(torch.cat([piece.logits for piece in pieces]), expected, rtol=1e-4, atol=1e-4)
    nll = functional.cross_entropy(expected, IDS[1:], reduction="sum").item()
    assert nll > 50 and found.nll[0] == pytest.approx(nll, rel=1e-5)


def test_training_reaches_whatever_lies_between_hidden_states_and_logits(model):
    ids = IDS[None, :40]
    logits = model(ids).logits[0, :-1].float()
    plain, sliced = functional.cross_entropy(logits, ids[0, 1:]), cross_entropy(model, ids)
    torch.testing.assert_close(sliced, plain, rtol=1e-5, atol=1e-6)
    weights = head_parameters(model)
    expected = torch.autograd.grad(plain, weights)
    for ours, theirs in zip(torch.autograd.grad(sliced, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 16}, 5 * math.tanh(10 / 5)),
        ("hyperclovax", {"logits_scaling": 3.0}, 30.0),
        ("granite", {"logits_scaling": 4.0}, 2.5),
        ("cohere", {"logit_scale": 0.25}, 2.5),
    ],
)
def test_logits_by_hand(family, config, expected, new_model):
    model = new_model(family, **config)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()[7, 2] = 10.0
    found = head_logits(model, torch.eye(64)[:3])  # (3, 64) -> (3, 300)
    assert found.shape == (3, 300) and found[2, 7].item() == pytest.approx(expected)
    assert found.count_nonzero() == 1


class Scaled(LlamaForCausalLM):
    """Scales what its base model is given, so that the base model alone computes something else."""

    def forward(self, input_ids=None, **arguments):
        embedded = 3 * self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embedded, **arguments)


def test_a_model_that_cannot_be_matched_is_refused(new_model):
    with pytest.raises(
        LogitsError, match="logits of Scaled, made from its last hidden states, are not those"
    ):
        check_logits(Scaled(new_model("llama").config))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {}),  # looks at later tokens
        ("mamba", {"state_size": 4}),  # its cache takes one token at a time
        ("openai-gpt", {"n_embd": 64, "n_layer": 2, "n_head": 4}),  # has no cache
    ],
)
def test_a_model_that_cannot_go_on_from_a_cache_is_refused(family, config, new_model):
    with pytest.raises(LogitsError, match="read in two pieces with a cache"):
        check_logits(new_model(family, **config))


def test_a_model_that_wants_more_than_tokens_is_refused_in_one_sentence(new_model):
    with pytest.raises(
        LogitsError, match=r"XmodForCausalLM cannot be read .* \(ValueError: Input language unk"
    ):
        check_logits(new_model("xmod", is_decoder=True, pad_token_id=1))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {}),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
        ("gptj", {"rotary_dim": 8}),
        ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}),
    ],
)
def test_a_table_of_positions_ends(family, config, new_model):
    model = new_model(family, **{"max_position_embeddings": 32} | config)
    with torch.no_grad():
        assert hidden_states(model, IDS[None, :32]).shape == (1, 32, 64)
        with pytest.raises(LogitsError, match="reads at most 32 tokens, not 33; use a shorter window"):
            hidden_states(model, IDS[None, :33])


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_positions_that_are_computed_do_not_end(family, new_model):
    model = new_model(family, max_position_embeddings=32)
    with torch.no_grad():
        expected = model(IDS[None]).logits
        torch.testing.assert_close(head_logits(model, hidden_states(model, IDS[None])), expected)


def test_other_errors_are_not_blamed_on_the_length(new_model):
    with pytest.raises(LogitsError, match=r"has 300 rows, and none for token 300; give a text without it\.$"):
        hidden_states(new_model("gpt2"), torch.tensor([[300]]))
    with pytest.raises(RuntimeError):  # no number of a token
        hidden_states(new_model("gpt2"), torch.tensor([[1.5]]))
