"""Which recipe runs where: asked of the runtimes themselves, shown by the command line and in the documentation."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgelab import cli, ledger, recipes, runtimes
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
    timed = [row for row in rows if row.decode_ratio and row.weights_mb and row.prefill_tokens == 128]
    small = {
        row.recipe.partition(" + quantize.embedding")[0] for row in rows if " + quantize.emb" in row.recipe
    }
    scored = [row for row in rows if row.delta_nll is not None and row.runtime == "torch"]
    scored = [row for row in scored if row.recipe not in small]
    assert len(timed) > 10 and len(scored) > 10
    for row in timed:
        ratio = f"{row.decode_ratio:.2f} [{row.decode_ratio_low:.2f}, {row.decode_ratio_high:.2f}]"
        assert any(f"`{row.recipe}`" in line and ratio in line for line in text.splitlines()), row.recipe
    for row in scored:
        delta = f"{row.delta_nll:+.3f} [{row.delta_nll_low:+.3f}, {row.delta_nll_high:+.3f}]"
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


@pytest.mark.parametrize("runtime", ["onnxruntime", "llamacpp", "openvino", "executorch", "litert"])
def test_attention_that_forgets_is_refused(new_model, runtime):
    forgets = new_model("qwen3", use_sliding_window=True)
    assert "knows no sliding window" in runtimes.find(runtime).refusal(variants.describe(forgets))


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", **SCALED}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                **SCALED,
            }
        },
        {"rope_parameters": {"rope_type": "dynamic", **SCALED}, "max_position_embeddings": 64},
        {"rope_parameters": {"rope_type": "yarn", **SCALED}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
    ],
    ids=lambda changes: changes.get("rope_parameters", changes | {"rope_type": next(iter(changes))})[
        "rope_type"
    ],
)
@pytest.mark.parametrize("layout", ["llama", "qwen3"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "llamacpp"])
def test_what_an_engine_would_compute_otherwise_is_refused(variant, runtime, layout, changes):
    """An engine that leaves a part of the configuration out moves logits by more than their standard deviation."""
    folder = variant("quantize.fp16" if runtime == "openvino" else "none", layout, **changes)
    ids = torch.randint(0, 300, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    try:
        found = runtimes.load(runtime, folder).logits(ids)
    except RuntimeRefused as refused:
        assert str(refused).startswith(runtimes.find(runtime).refusal(variants.read_description(folder)))
        return
    expected = runtimes.load("torch", folder).logits(ids)
    assert (found - expected).abs().max() < 0.25 * expected.std()
