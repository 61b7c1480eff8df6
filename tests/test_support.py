"""Which recipe runs where: asked of the runtimes themselves, shown by the command line and in the README."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgelab import cli, ledger, runtimes
from edgelab.runtimes import RuntimeRefused, support

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def answers():
    return support.table()


def test_every_runtime_answers_to_every_layout(answers):
    assert len(answers) == len(support.LAYOUTS) * len(runtimes.RUNTIMES)
    said = {(answer.recipe, answer.runtime): answer.reason for answer in answers}
    own = {"executorch", "litert"}  # take nothing but what their own quantizers round
    assert {name for name in runtimes.RUNTIMES if said["quantize.rtn:bits=4", name]} == own
    assert said["quantize.nf4", "torch"] is None and "codebook" in said["quantize.nf4", "onnxruntime"]
    assert "engine itself" in said["native.int4", "torch"]
    assert said["native.int4", "openvino"] is None
    for reason in filter(None, said.values()):
        assert reason.endswith(".") and "\n" not in reason and len(reason) < 220


def test_the_readme_holds_the_table(answers):
    text = README.read_text(encoding="utf-8")
    shown = text.partition("<!-- support -->")[2].partition("<!-- /support -->")[0].strip()
    assert shown == support.markdown(answers), "write support.markdown(support.table()) into the README"


def test_the_engines_of_the_readme_are_rows():
    part = README.read_text(encoding="utf-8").partition("### What an engine buys")[2].partition("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| `")]
    rows = [row for row in ledger.reference() if row.parity or row.ppl]
    shown = [
        {
            row.recipe,
            f"{row.weights_mb:.0f}",
            f"{row.decode_ratio:.2f} [{row.decode_ratio_low:.2f}, {row.decode_ratio_high:.2f}]",
            f"{row.ttft_ms_p50:.0f}",
            f"{row.peak_rss_mb:.0f}",
            *([f"{row.ppl:.2f}"] if row.ppl else []),
            *([f"{row.export_s:.0f}"] if row.export_s else []),
        }
        for row in rows
        if row.decode_ratio
    ]
    engines = [line for line in lines if line[0] != "`none`"]
    assert len(engines) > 10
    for name, *values in engines:
        found = {name.strip("`"), *(value.strip() for value in values)} - {""}
        assert found in shown, f"{name} of the README is not what data/reference says"


def test_the_techniques_of_the_readme_are_rows():
    part = (
        README.read_text(encoding="utf-8")
        .partition("## What the techniques cost and buy")[2]
        .partition("\n## ")[0]
    )
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    rows = [row for row in ledger.reference() if row.ppl and row.runtime == "torch" and row.linear_mb]
    weights = next(row.linear_mb / 4 for row in rows if row.recipe == "none")  # millions, of linear layers
    shown = {
        f"| `{row.recipe}` | {row.ppl:.2f} | "
        f"{row.delta_nll:+.3f} [{row.delta_nll_low:+.3f}, {row.delta_nll_high:+.3f}] | "
        f"{8 * (row.linear_mb + row.scales_mb) / weights:.2f} | {row.apply_s:.0f} |"
        for row in rows
        if row.recipe != "none"
    }
    assert len(lines) > 20 and "21.70" in lines[0]
    assert set(lines[1:]) <= shown, "\n".join(sorted(set(lines[1:]) - shown))


def test_the_command_line_lists_it():
    found = CliRunner().invoke(cli.app, ["list", "runtimes", "--json"])
    rows = [json.loads(line) for line in found.output.splitlines()]
    assert {"recipe", "runtime", "runs", "reason", "alike", "installed"} == rows[0].keys()
    assert [row["runs"] for row in rows] == [row["reason"] is None for row in rows]
    shown = CliRunner().invoke(cli.app, ["list", "runtimes"]).output
    assert "✓" in shown and "native.int8 is rounded by an engine itself" in shown


def test_the_command_line_says_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(runtimes.find("torch"), "packages", ("no-such-package",))
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
    refused = [answer for answer in answers if answer.runtime == runtime and answer.reason]
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


def test_attention_that_forgets_is_refused(variant):
    runtimes.check_causal(variant("none", "qwen3"), ("llama", "qwen3"), "LiteRT")
    with pytest.raises(RuntimeRefused, match="LiteRT knows no sliding window"):
        runtimes.check_causal(variant("none", "qwen3", use_sliding_window=True), ("llama", "qwen3"), "LiteRT")
