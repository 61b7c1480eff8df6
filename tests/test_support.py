"""Which recipe runs where: asked of the runtimes themselves, shown by the command line and in the documentation."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from edgelab import cli, ledger, recipes, runtimes
from edgelab.errors import EdgeLabError
from edgelab.runtimes import RuntimeRefused, support
from edgelab.storage import variants

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def answers():
    return support.table()


def test_every_runtime_answers_to_every_layout(answers):
    asked = len(support.LAYOUTS) + len(support.MODELS) + 1
    assert len(answers) == asked * len({answer.runtime for answer in answers})
    said = {(answer.recipe, answer.alike, answer.runtime): answer.reason for answer in answers}
    of = {
        (recipe, runtime): reason for (recipe, alike, runtime), reason in said.items() if "model" not in alike
    }
    own = {"executorch", "litert"}  # take nothing but what their own quantizers round
    assert {
        answer.runtime for answer in answers if of["quantize.rtn:bits=4,group_size=64", answer.runtime]
    } == own
    assert of["quantize.nf4:group_size=64", "torch"] is None
    assert "codebook" in of["quantize.nf4:group_size=64", "onnxruntime"]
    assert "engine itself" in of["native.int4", "torch"]
    assert of["native.int4", "openvino"] is None
    assert said["none", support.UNEVEN, "llamacpp"] is None
    assert "model.layers.0.mlp.gate_proj is 32 x 64" in said["none", support.UNEVEN, "onnxruntime"]
    for reason in filter(None, said.values()):
        assert reason.endswith(".") and "\n" not in reason and len(reason) < 220


def test_the_documentation_holds_the_table(answers):
    text = (DOCS / "engines.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- support -->")[2].partition("<!-- /support -->")[0].strip()
    assert shown == support.markdown(answers), "run `python docs/build.py`"


def test_tables_of_results_hold_the_rows_of_the_project():
    text = (DOCS / "results.md").read_text(encoding="utf-8") + (DOCS / "engines.md").read_text(
        encoding="utf-8"
    )
    rows = [row for row in ledger.reference() if row.status == "ok" and row.threads in (None, 2)]
    adapted = {row.recipe: row for row in rows if row.corpus == "stories" and row.delta_nll is not None}
    rows = [row for row in rows if row.corpus in (None, "wiki") and "corpus=stories" not in row.recipe]
    timed = [row for row in rows if row.decode_ratio and row.weights_mb and row.prefill_tokens == 128]
    small = {
        row.recipe.partition(" + quantize.embedding")[0] for row in rows if " + quantize.emb" in row.recipe
    }
    scored = [row for row in rows if row.delta_bits_per_byte is not None and row.runtime == "torch"]
    scored = [row for row in scored if row.recipe not in small]
    assert len(timed) > 10 and len(scored) > 10
    latest = {row.recipe: row for row in sorted(timed, key=lambda row: (-row.seed, row.started_at))}
    for row in latest.values():
        ratio = f"{row.decode_ratio:.2f} [{row.decode_ratio_low:.2f}, {row.decode_ratio_high:.2f}]"
        assert any(f"`{row.recipe}`" in line and ratio in line for line in text.splitlines()), row.recipe
    newest = {row.recipe: row for row in sorted(scored, key=lambda row: (-row.seed, row.started_at))}
    for row in newest.values():  # of several seeds the table shows one
        removed = row.recipe.startswith(("prune.", "lowrank."))
        name = "delta_bits_per_byte" if removed else "delta_nll"
        value, low, high = (getattr(row, one) for one in (name, f"{name}_low", f"{name}_high"))
        delta = f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        assert any(f"`{row.recipe}`" in line and delta in line for line in text.splitlines()), row.recipe
    assert len(adapted) > 10
    for row in adapted.values():
        delta = f"{row.ppl:.2f} | {row.delta_nll:+.3f} [{row.delta_nll_low:+.3f}, {row.delta_nll_high:+.3f}]"
        assert any(f"`{row.recipe}`" in line and delta in line for line in text.splitlines()), row.recipe


def test_the_command_line_lists_it():
    found = CliRunner().invoke(cli.app, ["list", "runtimes", "--json"])
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert {"recipe", "runtime", "runs", "reason", "alike", "installed"} == rows[0].keys()
    assert [row["runs"] for row in rows] == [row["reason"] is None for row in rows]
    shown = CliRunner().invoke(cli.app, ["list", "runtimes"]).output
    assert "✓" in shown and "native.int8 is rounded by an engine itself" in shown


def test_the_command_line_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(recipes.deployments()["torch"], "packages", ("no-such-package",))
    rows = [
        json.loads(line)
        for line in CliRunner().invoke(cli.app, ["list", "runtimes", "--json"]).output.splitlines()
    ]
    assert {row["runtime"] for row in rows if not row["installed"]} >= {"torch"}
    assert all(row["installed"] for row in rows if row["runtime"] == "onnxruntime")
    last = CliRunner().invoke(cli.app, ["list", "runtimes"]).output.splitlines()[-1]
    assert last.startswith("Not installed here: torch") and "edgelab doctor" in last


@pytest.mark.parametrize("runtime", ["onnxruntime", "llamacpp", "openvino", "executorch", "litert"])
def test_what_the_table_refuses_is_refused(variant, answers, runtime):
    plain = {str(recipes.parse(text)) for text in support.LAYOUTS}
    refused = [
        a
        for a in answers
        if a.runtime == runtime
        and a.reason
        and "model" not in a.alike
        and a.alike != support.UNEVEN
        and a.recipe in plain
    ]
    assert refused
    for answer in refused:
        with pytest.raises(RuntimeRefused):
            runtimes.load(runtime, variant(answer.recipe))


@pytest.mark.parametrize(
    "text", ["quantize.rtn + native.int4", "native.int4 + quantize.kv", "quantize.bf16 + native.int8"]
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "executorch", "litert"])
def test_an_engines_own_quantizer_wants_float32(variant, runtime, text):
    with pytest.raises(RuntimeRefused, match="take the other quantization out"):
        runtimes.load(runtime, variant(text))


FORGETFUL = {
    "qwen3 everywhere": ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}),
    "qwen2 in one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3 by name": (
        "qwen3",
        {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "llama by its cache": ("llama", {"sliding_window": 16}),
    "llama in chunks": ("llama", {"attention_chunk_size": 16}),
}


@pytest.mark.parametrize(("layout", "changes"), FORGETFUL.values(), ids=FORGETFUL)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "executorch", "litert"])
def test_attention_that_forgets_is_refused(new_model, runtime, layout, changes):
    about = variants.describe(new_model(layout, **changes))
    if runtime == "openvino":  # float32 is refused before
        about = dataclasses.replace(about, dtype="float16")
    assert "knows no sliding window" in runtimes.find(runtime).refusal(about)


def test_a_window_longer_than_any_text_is_none(new_model):
    """A cache that keeps the last 4,096 tokens forgets nothing of a text of as many."""
    for positions, reason in {4096: None, 32768: "knows no sliding window"}.items():
        about = variants.describe(new_model("llama", sliding_window=4096, max_position_embeddings=positions))
        said = runtimes.find("onnxruntime").refusal(about)
        assert said is None if reason is None else reason in said


def rotary(kind, **settings):
    about = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {"rope_type": kind, **about, **settings}}


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
FEATURES = {  # layout, settings, and what a refusal has to name
    "linear": ("llama", rotary("linear"), "'linear'"),
    "qwen3 linear": ("qwen3", rotary("linear"), "'linear'"),
    "llama3": ("llama", rotary("llama3", **BANDS), "'llama3'"),
    "qwen2 llama3": ("qwen2", rotary("llama3", **BANDS), "'llama3'"),
    "dynamic": ("llama", rotary("dynamic") | {"max_position_embeddings": 64}, "'dynamic'"),
    "yarn": ("qwen3", rotary("yarn", attention_factor=1.3), "'yarn'"),
    "longrope": ("llama", rotary("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8), "'longrope'"),
    # a Llama turns all of each head, whatever is said of parts
    "part of a head": ("llama", rotary("default", partial_rotary_factor=0.5, mrope_section=[2, 3, 3]), ""),
    "theta": ("qwen3", rotary("default", rope_theta=1e6), ""),
    "gelu": ("llama", {"hidden_act": "gelu"}, "gelu"),
    "tanh": ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
    "relu2": ("llama", {"hidden_act": "relu2"}, "relu2"),
    "quick gelu": ("llama", {"hidden_act": "quick_gelu"}, "quick_gelu"),
    "attention biases": ("llama", {"attention_bias": True}, "biases"),
    "qwen3 attention biases": ("qwen3", {"attention_bias": True}, "bias"),
    "MLP biases": ("llama", {"mlp_bias": True}, "biases"),
    "wide heads": ("qwen2", {"head_dim": 32}, "heads"),
    "small heads": ("llama", {"head_dim": 8}, "heads"),
    "one key head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}, ""),
    "epsilon": ("qwen2", {"rms_norm_eps": 1e-2}, ""),
    "caps of others": ("llama", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}, ""),
    "fewer rows than tokens": ("llama", {"vocab_size": 290}, ""),
    "no special tokens": ("qwen3", {"bos_token_id": None, "eos_token_id": None}, ""),
    "gemma": ("gemma", {}, "not gemma"),
    "granite": ("granite", {"logits_scaling": 2.0}, "not granite"),
    "smollm3": ("smollm3", {}, "not smollm3"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "not bloom"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "changes", "named"), FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "llamacpp"])
def test_what_an_engine_would_compute_otherwise_is_refused(variant, runtime, layout, changes, named):
    """Exported and equal to PyTorch, or refused before, by name; what is left out moves logits by their spread."""
    folder = variant("quantize.fp16" if runtime == "openvino" else "none", layout, **changes)
    ids = torch.randint(0, 290, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    if reason := runtimes.find(runtime).refusal(variants.read_description(folder)):
        assert named and named in reason and reason.endswith(".") and len(reason) < 220
        with pytest.raises(RuntimeRefused):
            runtimes.load(runtime, folder)
        assert not (folder / "exports").exists()
        return
    session = runtimes.load(runtime, folder)
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([ids])).logits[0].float()
    bound = {"onnxruntime": 1e-4, "llamacpp": 0.05, "openvino": 0.15}[
        runtime
    ]  # keys, values and inputs in fewer bits
    assert (session.logits(ids) - expected).abs().max() < bound * expected.std()
    assert session.prefill(ids) == expected[-1].argmax()
    session.close()


TOKENIZERS = {
    "unigram": models.Unigram([("<unk>", 0.0), *((chr(97 + i), -3.0) for i in range(26))], unk_id=0),
    "bpe with bytes": models.BPE(
        {f"<0x{i:02X}>": i for i in range(256)} | {"ab": 256}, [], byte_fallback=True
    ),
    "bpe without merges": models.BPE(
        {token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []
    ),
    "words": models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
}


@pytest.mark.parametrize("model", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "llamacpp"])
def test_any_tokenizer_goes_with_a_model(tmp_path, new_model, runtime, model):
    """Engines run on token ids; a name of a folder may hold what it likes."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    folder = tmp_path / "à [x] %20'q #1"
    llama = new_model("llama")
    variants.save(llama.half() if runtime == "openvino" else llama, folder, {"recipe": "none"}, tokenizer)
    ids = list(range(2, 60))
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([ids])).logits[0].float()
    assert (runtimes.load(runtime, folder).logits(ids) - expected).abs().max() < 0.15 * expected.std()


# A model of the reader's own

OWN = {
    "llama": ("llama", {}),
    "groups that do not divide": ("llama", {"hidden_size": 96, "head_dim": 16}),
    "rows that blocks do not divide": ("qwen3", {"intermediate_size": 144}),
    "small heads": ("llama", {"head_dim": 8}),
    "a window": ("mistral", {"sliding_window": 16}),
    "rotary scaling": ("llama", rotary("linear")),
    "rotary scaling in bands": ("llama", rotary("llama3", **BANDS)),
    "rotary scaling of a qwen3": ("qwen3", rotary("yarn")),
    "biases": ("llama", {"attention_bias": True}),
    "another activation": ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}),
    "another layout": ("bloom", {"n_layer": 2, "n_head": 4}),
    "no linear layers": ("gpt2", {}),
}


@pytest.mark.parametrize(("layout", "changes"), OWN.values(), ids=OWN)
def test_a_table_about_a_model_says_what_its_variants_would_be_told(layout, changes, new_model, tmp_path):
    """Asked with nothing but a configuration, and compared with what every recipe really makes of the model."""
    model = new_model(layout, **changes)
    model.config.save_pretrained(tmp_path)
    found = {(one.recipe, one.runtime): one.reason for one in support.table(str(tmp_path))}
    for text in support.LAYOUTS:
        recipe = recipes.parse(text)
        try:
            changed = recipe.apply(model, recipes.Context(reference=model))
            about, reason = variants.describe(changed), None
        except recipes.RecipeError as error:
            about, reason = None, str(error)
        for runtime in {runtime for _, runtime in found}:
            expected = reason or runtimes.find(runtime).refusal(about)
            assert found[recipe.weights, runtime] == expected, (text, runtime)


def test_a_layout_is_refused_by_its_configuration_alone(new_model, tmp_path):
    new_model("bloom", n_layer=2, n_head=4).config.save_pretrained(tmp_path)
    for runtime in ("onnxruntime", "llamacpp", "litert"):
        assert support.refusal(runtime, str(tmp_path)).endswith("not bloom; use 'torch'.")
    assert support.refusal("torch", str(tmp_path)) is None


def test_the_command_line_lists_it_for_a_model(new_model, tmp_path):
    new_model("qwen3").config.save_pretrained(tmp_path)
    found = CliRunner().invoke(cli.app, ["list", "runtimes", "--model", str(tmp_path), "--json"])
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert {row["recipe"] for row in rows} == {recipes.parse(text).weights for text in support.LAYOUTS}
    assert all(row["runs"] for row in rows if row["runtime"] == "llamacpp" and row["recipe"] == "none")
    shown = CliRunner().invoke(cli.app, ["list", "runtimes", "--model", str(tmp_path)]).output
    assert "✓" in shown and "a mistral model" not in shown


@pytest.mark.parametrize(
    ("what", "model", "sentence"),
    [
        ("runtimes", "/no/such/folder", "There is no model at /no/such/folder"),
        ("techniques", "embedded", "techniques are the same for every model; leave the model out"),
    ],
)
def test_what_cannot_be_listed_is_one_sentence(what, model, sentence):
    found = CliRunner().invoke(cli.app, ["list", what, "--model", model])
    assert found.exit_code == 1 and isinstance(found.exception, EdgeLabError)
    assert sentence in str(found.exception)
