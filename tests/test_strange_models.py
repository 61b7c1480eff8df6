"""Models that transformers reads otherwise than their files say, or not at all: each is one sentence, or just runs."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import NemotronConfig, Qwen2VLConfig
from typer.testing import CliRunner

import edgelab as el
from edgelab import cli
from edgelab.corpora import CorpusError
from edgelab.lab.bench import Bench
from edgelab.measure import sample
from edgelab.model.logits import LogitsError, hidden_states
from edgelab.reference import ReferenceError, config_of, load
from edgelab.runtimes import streaming, support
from edgelab.runtimes.eager import Eager

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": None}


def exported(model: str) -> None:
    el.export("none", "gguf", f"{model}.gguf", model=model)


@pytest.mark.parametrize("ask", [load, config_of, support.table, exported])
def test_a_layout_without_a_model_of_text_is_named_at_once(ask, byte_tokenizer, tmp_path):
    folder = tmp_path / "seeing"
    Qwen2VLConfig().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").touch()
    with pytest.raises(
        ReferenceError,
        match=r"^seeing has the layout 'qwen2_vl', of which transformers has no causal language model of text; give a "
        r"model of another layout, such as llama, qwen3 or gemma3_text\.$",
    ):
        ask(str(folder))


@pytest.mark.parametrize("ask", [load, support.table])
def test_a_configuration_that_no_model_can_be_made_of_is_one_sentence(ask, byte_tokenizer, tmp_path):
    """Nemotron's own defaults have no number of heads for keys and values."""
    NemotronConfig().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(
        ReferenceError, match=r"cannot be loaded as a causal language model \(.+\); check"
    ) as caught:
        ask(str(tmp_path))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["falcon", "phimoe"])
def test_runtimes_are_asked_about_models_with_linear_layers_of_their_own(layout, new_model, tmp_path):
    changes = MOE if layout == "phimoe" else {"num_kv_heads": 2, "new_decoder_architecture": True}
    new_model(layout, **changes).config.save_pretrained(tmp_path)
    found = {(one.recipe, one.runtime): one.reason for one in support.table(str(tmp_path))}
    assert found["none", "torch"] is None and found["quantize.rtn:bits=4,group_size=64", "torch"] is None
    assert f"not {layout}; use 'torch'." in found["none", "llamacpp"]


def test_the_table_of_a_model_says_what_it_has_not_looked_at(new_model, tmp_path):
    new_model("llama").config.save_pretrained(tmp_path)
    shown = CliRunner().invoke(cli.app, ["list", "runtimes", "--model", str(tmp_path)]).output
    assert "The configuration alone was asked; weights and tokenizer may yet be refused" in shown
    assert "The configuration alone" not in CliRunner().invoke(cli.app, ["list", "runtimes"]).output


def test_a_class_spelled_with_other_capitals(new_model, byte_tokenizer, tmp_path):
    """As Phi-3.5-MoE names it; transformers calls it PhimoeForCausalLM, and loads by the layout anyway."""
    model = new_model("phimoe", **MOE)
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    assert stated["architectures"] == ["PhimoeForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(stated | {"architectures": ["PhiMoEForCausalLM"]}))
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.equal(load(str(tmp_path)).model(ids).logits, model(ids).logits)


# Tokens that the embedding has no row for

NAMED = r"^The text holds '<\|im\|>', token 301, for which the embedding of 300 rows has none; take it out of the text,"


@pytest.fixture
def longer(new_model, byte_tokenizer, tmp_path) -> str:
    """The folder of a model of 300 tokens, to whose tokenizer two special ones were added."""
    folder = tmp_path / "longer"
    new_model("llama").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    tokenizer = load(str(folder)).tokenizer
    tokenizer.add_tokens(
        [AddedToken(f"<|{name}|>", special=True) for name in ("pad", "im")], special_tokens=True
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def bench(model: str, text: str, folder) -> Bench:
    (folder / "text.txt").write_text(text)
    return Bench("none", model, 0, {"corpus": str(folder / "text.txt"), "windows": 1})


def test_a_text_with_a_token_beyond_the_embedding_is_refused_by_name(longer, tmp_path):
    with pytest.raises(CorpusError, match=NAMED):
        bench(longer, "Gulls <|im|> say nothing. " * 200, tmp_path).check_text()


def test_a_token_that_no_scored_text_holds_does_no_harm(longer, tmp_path):
    assert bench(longer, "Gulls say nothing. " * 1000 + "<|im|>", tmp_path).measure(["perplexity"])["ppl"] > 1


def test_prompts_with_such_a_token_are_refused_by_name(longer):
    reference = load(longer)
    session = Eager(reference.model)
    for ask in (
        lambda: sample.write(session, reference.tokenizer, "Gulls <|im|>", 2),
        lambda: next(
            streaming.stream(session, reference.tokenizer, [{"role": "user", "content": "Gulls <|im|>"}])
        ),
    ):
        with pytest.raises(CorpusError, match=NAMED):
            ask()
    assert sample.write(session, reference.tokenizer, "Gulls", 2)


@pytest.mark.parametrize("recipe", ["none", "quantize.embedding"])
def test_such_a_token_is_no_error_of_an_index(recipe, longer):
    model = el.parse(recipe).apply(load(longer).model, el.recipes.Context())
    with pytest.raises(LogitsError, match=r"has 300 rows, and none for token 301; give a text without it\.$"):
        hidden_states(model, torch.tensor([[5, 301]]))
