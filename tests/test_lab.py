"""The one road, gone with the tiny model: recipe, variant, fresh process, row."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest

from edgelab import lab, ledger, recipes
from edgelab.devices import prices
from edgelab.errors import EdgeLabError
from edgelab.lab import question, road
from edgelab.measure import MEASUREMENTS, isolation, parity, protocols
from edgelab.storage import cache, variants


@pytest.fixture
def text(tmp_path, story):
    file = tmp_path / "story.txt"
    file.write_text(story.text, encoding="utf-8")
    return str(file)


@pytest.fixture
def settings(tiny, text, monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    return {"model": str(tiny), "corpus": text, "windows": 3, "threads": 1}


DEAR = """
from dataclasses import dataclass
from pathlib import Path
from edgelab.recipes import register

@register("test.dear", kept=True)
@dataclass(frozen=True)
class Dear:
    \"\"\"Leaves the model as it is, and notes that it was applied.\"\"\"

    def apply(self, model, context):
        with Path({notes!r}).open("a") as file:
            file.write("applied ")
        return model
"""


@pytest.fixture
def dear(tmp_path, monkeypatch):
    """A technique from elsewhere whose stage is kept; the file that it writes into when it is applied."""
    notes = tmp_path / "notes"
    (tmp_path / "dear.py").write_text(DEAR.format(notes=str(notes)))
    monkeypatch.setenv("EDGELAB_PLUGINS", str(tmp_path / "dear.py"))
    yield notes
    recipes.TECHNIQUES.pop("test.dear", None)


def test_a_comparison_fills_every_field_that_was_measured(settings):
    table = lab.compare(["none", "quantize.rtn:bits=4,group_size=32"], **settings)
    none, rounded = (table.iloc[i] for i in range(2))
    assert list(table.status) == ["ok", "ok"] and list(table.fast) == [True, True]
    assert none.badge == rounded.badge == "packed" and rounded.kernel == "int4pack_mm bf16"
    assert none.n_tokens == 3 * 511 and none.ppl == pytest.approx(math.exp(none.nll_sum / none.n_tokens))
    assert rounded.delta_nll == pytest.approx((rounded.nll_sum - none.nll_sum) / none.n_tokens)
    assert rounded.delta_nll_low < rounded.delta_nll < rounded.delta_nll_high
    assert rounded.kld_mean > 0 and 0 < rounded.top1_agreement < 1
    assert rounded.weights_mb < none.weights_mb and rounded.bits_per_weight < none.bits_per_weight == 32
    assert rounded.weights_mb == pytest.approx(
        rounded.linear_mb + rounded.embedding_mb + rounded.scales_mb, rel=0.01
    )
    for row in (none, rounded):
        assert min(row.ttft_ms_p50, row.tpot_ms_p50, row.decode_tok_s, row.peak_rss_mb, row.load_s) > 0
        assert row.tpot_ms_p95 >= row.tpot_ms_p50 and len(row.window_nll) == 3
    assert rounded.decode_ratio_low <= rounded.decode_ratio <= rounded.decode_ratio_high
    assert rounded.prefill_ratio > 0 and math.isnan(none.prefill_ratio)
    assert (
        math.isnan(none.decode_ratio) and math.isnan(none.delta_nll) and math.isnan(none.energy_j_per_token)
    )


def test_a_row_is_measured_once_and_again_only_when_forced(settings):
    first = lab.measure("quantize.rtn:bits=8,group_size=0", only="quality", **settings)
    assert lab.measure("quantize.rtn:group_size=0,bits=8", only="quality", **settings).row_id == first.row_id
    again = lab.measure("quantize.rtn:bits=8,group_size=0", only="quality", force=True, **settings)
    assert again.row_id != first.row_id and again.ppl == pytest.approx(first.ppl, rel=1e-6)
    assert [row.recipe for row in ledger.own()].count(
        "none"
    ) == 1  # the baseline that both were compared with
    assert first.decode_tok_s is None and first.peak_rss_mb is None


def test_packed_and_simulated_give_the_same_quality(settings):
    packed, simulated = (
        lab.measure(f"quantize.rtn:bits=4,group_size=32{runtime}", only="quality", **settings)
        for runtime in ("", " @ simulated")
    )
    assert (packed.badge, simulated.badge) == ("packed", "simulated")
    assert packed.ppl == pytest.approx(simulated.ppl, rel=0.02)


def test_a_failure_is_a_row_and_the_comparison_goes_on(settings):
    table = lab.compare(["quantize.rtn:group_size=48", "quantize.bf16"], only="quality", **settings)
    assert list(table.status) == ["error", "ok"] and "32, 64, 0" in table.error[0]
    assert math.isnan(table.ppl[0])
    with pytest.raises(lab.MeasureError, match="group_size=48 does not divide"):
        lab.measure("quantize.rtn:group_size=48", only="quality", **settings)


def test_a_killed_process_and_a_time_out_are_rows(settings, monkeypatch):
    lab.measure("none", only="quality", **settings)
    real = isolation.Isolated.call

    def killed(self, method, *args, **kwargs):
        if method == "measure" and "perplexity" in kwargs["names"]:
            os.kill(real(self, "pid"), signal.SIGKILL)
        return real(self, method, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(isolation.Isolated, "call", killed)
        (row,) = lab.stream(["quantize.bf16"], only="quality", **settings)
    assert row.status == "oom" and "memory ran out" in row.error
    (row,) = lab.stream(["quantize.fp16"], only="memory", timeout_s=0.01, **settings)
    assert row.status == "timeout"


def test_a_baseline_that_dies_in_mid_comparison_takes_no_row_with_it(settings, monkeypatch):
    real = road._Timed.decode
    killed = []

    def dying(self, tokens):
        if self.question.is_baseline and len(killed) < 1:
            killed.append(real(self, tokens))
            os.kill(self.process.call("pid"), signal.SIGKILL)
        return real(self, tokens)

    monkeypatch.setattr(road._Timed, "decode", dying)
    table = lab.compare(["quantize.bf16", "quantize.fp16"], only="speed", **settings)
    assert killed and list(table.status) == ["ok", "ok"]
    assert (table.decode_ratio > 0).all()


def test_a_candidate_that_dies_is_the_one_named(settings, monkeypatch):
    real = road._Timed.decode

    def dying(self, tokens):
        if str(self.question.recipe) == "quantize.bf16":
            os.kill(self.process.call("pid"), signal.SIGKILL)
        return real(self, tokens)

    monkeypatch.setattr(road._Timed, "decode", dying)
    table = lab.compare(["quantize.bf16", "quantize.fp16"], only="speed", **settings)
    assert list(table.status) == ["oom", "ok"] and table.decode_ratio[1] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"only": "size"}, "none of extraction, memory, privacy, quality, requests, speed, tasks"),
        ({"windows": 0}, "from 1 on"),
        ({"protocol": "gptq"}, "use one of edgelab-512"),
        ({"corpus": "nowhere"}, "There is no corpus"),
        ({"model": "./nowhere"}, "There is no model"),
        ({"treads": 1}, "Unknown setting treads"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(settings, change, sentence):
    with pytest.raises(EdgeLabError, match=sentence):
        lab.compare(["none"], **settings | change)
    assert ledger.own() == []


def test_a_text_shorter_than_a_window_is_refused(settings, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(EdgeLabError, match="fewer than one window of edgelab-512"):
        lab.measure("none", **settings | {"corpus": str(short)})


@pytest.mark.embedded
def test_the_embedded_baseline_and_four_bits_have_the_known_perplexity(tmp_path, monkeypatch):
    """First two of the 32 windows of the must-hold numbers, with the packed kernels, through the whole road."""
    from edgelab import assets

    (tmp_path / "assets").symlink_to(assets.home() / "assets")
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path))
    table = lab.compare(["none", "quantize.rtn:bits=8,group_size=0"], windows=2, only="quality")
    assert table.ppl[1] == pytest.approx(table.ppl[0], rel=0.02) and table.kld_mean[1] < 0.01
    assert table.model[0] == "SmolLM2-135M-Instruct-Q4_1" and table.parameters[0] == 134_515_008


def test_the_public_measure_stays_the_function():
    import edgelab
    import edgelab.measure.latency

    assert edgelab.measure is lab.measure and "measure" in edgelab.__all__
    from edgelab.measure import latency

    assert latency.PREFILL_TOKENS == 128


def test_energy_is_estimated_from_the_power_that_is_given(settings):
    row = lab.measure("none", only="speed", power_w=10, force=True, **settings)
    if row.energy_basis.startswith("RAPL"):
        assert row.energy_j_per_token > 0
    else:
        # Joules follow the mean time per token. A stall makes it as long as it likes, and half of the median is its
        # least, because one half of the tokens takes the median or longer.
        assert row.energy_j_per_token >= 0.499 * 10 / row.decode_tok_s
        mean_ms = float(row.energy_basis.removeprefix("estimated: 10 W x ").removesuffix(" ms"))
        assert row.energy_j_per_token == pytest.approx(10 * mean_ms / 1e3, rel=0.01)
        other = lab.measure("none", only="speed", power_w=20, **settings)  # another question
        assert other.energy_basis.startswith("estimated: 20 W")
    known = lab.measure("none", only="speed", power_w=20, **settings)
    assert known.row_id == lab.measure("none", only="speed", **settings).row_id
    with pytest.raises(EdgeLabError, match="power_w=0 is not positive"):
        lab.measure("none", power_w=0, **settings)


def test_prompts_of_another_length_are_another_row(settings):
    short = lab.measure("none", only="speed", prompt_tokens=32, **settings)
    long = lab.measure("none", only="speed", **settings)
    assert (short.prefill_tokens, long.prefill_tokens) == (32, 128) and short.row_id != long.row_id
    assert lab.measure("none", only="speed", prompt_tokens=32, **settings).row_id == short.row_id
    assert short.prefill_tok_s == pytest.approx(32e3 / short.ttft_ms_p50)


def test_an_engine_is_compared_with_pytorch_before_its_speed_counts(settings):
    row = lab.measure(
        "quantize.rtn:bits=8,group_size=0,symmetric=true @ llamacpp", only="quality", **settings
    )
    assert row.badge == "runtime" and row.parity == "passed" and "against" in row.parity_detail
    assert row.export_s > 0 and row.linear_mb is None and row.weights_mb < row.file_mb
    assert len(ledger.own()) == 2  # the baseline's and this: PyTorch is asked in the same process
    native = lab.measure("native.int8 @ onnxruntime", only="quality", **settings)
    assert native.parity == "own weights" and native.ppl > 0


def test_an_engine_whose_twin_cannot_be_measured_has_failed_the_gate(settings, monkeypatch):
    real = isolation.Isolated.call

    def failing(self, method, *args, **kwargs):
        if method == "gate":
            raise isolation.IsolatedError("memory ran out", "oom")
        return real(self, method, *args, **kwargs)

    lab.measure("none", only="quality", **settings)
    monkeypatch.setattr(isolation.Isolated, "call", failing)
    row = lab.measure("quantize.rtn:bits=4,group_size=32 @ llamacpp", only="quality", **settings)
    assert row.parity == "failed" and row.parity_detail == "PyTorch could not be asked: memory ran out"
    assert row.status == "ok" and row.ppl > 0


def test_speed_alone_carries_the_verdict_of_the_gate(settings):
    recipe = "quantize.rtn:bits=4,group_size=32 @ llamacpp"
    row = lab.measure(recipe, only="speed", **settings)
    assert row.parity == "passed" and row.ppl is None and row.decode_tok_s > 0
    assert [one.recipe for one in ledger.own()] == [recipe]


def test_a_row_judged_by_an_earlier_gate_is_asked_again(settings, monkeypatch):
    recipe = "quantize.rtn:bits=4,group_size=32 @ llamacpp"
    first = lab.measure(recipe, only="quality", **settings)
    assert lab.measure(recipe, only="quality", **settings).row_id == first.row_id
    monkeypatch.setattr(parity, "VERSION", parity.VERSION + 1)
    rows = [step for step in lab.planned([recipe], only="quality", **settings) if step.stage is None]
    assert [(str(step.recipe), step.is_known) for step in rows] == [("none", True), (recipe, False)]
    assert ledger.verdict(first) == ("passed", first.parity_detail)
    assert ledger.verdict(replace(first, made_by=json.dumps(rows[1].question.made_by))) == (None, None)


# Questions and plans


def planned(recipes, **settings):
    return [
        (str(step.recipe), step.stage, step.is_known, step.place is not None)
        for step in lab.planned(recipes, **settings)
    ]


def test_a_plan_names_prerequisites_first_and_each_once(settings):
    recipes = ["quantize.rtn:bits=4,group_size=32 @ llamacpp", "quantize.rtn:bits=4,group_size=32", "none"]
    of_4 = "quantize.rtn:bits=4,group_size=32"
    rows = [step for step in planned(recipes, only="quality", **settings) if step[1] is None]
    assert rows == [
        ("none", None, False, True),
        (f"{of_4} @ llamacpp", None, False, True),
        (of_4, None, False, True),
    ]
    lab.measure(of_4, only="quality", **settings)
    rows = [step for step in planned(recipes, only="quality", **settings) if step[1] is None]
    assert [step[2] for step in rows] == [True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "lora:corpus=extraction",  # of which the project has a file
        "distill:model=somebody/some-model",
        "distill:teacher=(recover:loss=ce,text=mine.txt)",
    ],
)
def test_what_is_read_from_outside_is_not_answered_from_memory(text, tiny, tmp_path, monkeypatch):
    """A quick look-up imports no technique, and cannot know what such a recipe reads now."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("Once upon a time.\n" * 100)
    settings = lab.Settings(model=str(tiny), only="extraction")
    question.ask(["none"], settings, False)
    monkeypatch.setattr(recipes, "TECHNIQUES", {})
    (known,) = question.quick(["lora:corpus=stories"], settings, False)
    assert known.made_by["extraction reads"].startswith("extraction.jsonl-")
    assert question.quick(["lora:corpus=stories", text], settings, False) is None


@pytest.mark.parametrize("recipe", ["none", "quantize.rtn:bits=4 @ llamacpp", "none @ cloud:link=lte"])
def test_other_prices_ask_again_whoever_answers_requests(settings, recipe, tmp_path, monkeypatch):
    """An engine alone pays for electricity; where nothing has a price, another one is the same question."""
    asked = lab.Settings(model=settings["model"], only="requests")

    def reads(only):
        (found,) = question.ask([recipe], replace(asked, only=only), False)
        return found.made_by.get("reads", "")

    before, without = reads("requests"), reads("memory")
    assert before.count("prices ") == 1
    if "cloud" not in recipe:
        (known,) = question.ask([recipe], asked, False)
        with monkeypatch.context() as patch:
            patch.setattr(recipes, "TECHNIQUES", {})
            assert question.quick([recipe], asked, False)[0].made_by == known.made_by
    shutil.copy(prices.data_dir() / "prices.csv", tmp_path)
    monkeypatch.setattr(prices, "data_dir", lambda: tmp_path)
    assert reads("requests") == before
    file = tmp_path / "prices.csv"
    file.write_text(file.read_text().replace("electricity,0", "electricity,9"))
    assert reads("requests") != before
    if "cloud" not in recipe:
        assert reads("memory") == without == ""


def test_a_teacher_is_made_before_its_student_and_each_stage_is_estimated_once(settings):
    """90 s for what calibrates or trains, where no row says more; minutes where they are given."""
    teacher = "prune.layers:drop=1 + recover:loss=ce,minutes=2.0"
    student = f"prune.layers:keep=1 + distill:loss=kl,minutes=3.0,teacher=({teacher})"
    steps = lab.planned([student], only="memory", **settings)
    stages = [(str(step.recipe), step.estimate_s) for step in steps if step.stage is not None]
    expected = {"prune.layers:drop=1": 90, teacher: 120, "prune.layers:keep=1": 90, student: 180}
    assert stages == [(str(recipes.parse(recipe)), seconds) for recipe, seconds in expected.items()]


def test_stages_are_kept_where_they_cost_and_a_shared_beginning_is_made_once(settings, dear):
    first, second = "test.dear + quantize.bf16", "test.dear + quantize.rtn:bits=4,group_size=32"
    stages = [step[0] for step in planned([first, second], only="memory", **settings) if step[1] is not None]
    assert stages == ["test.dear", first, second]
    lab.compare([first, second], only="memory", **settings)
    assert dear.read_text() == "applied "
    parents = {variants.read_about(entry.path)["recipe"]: entry.path for entry in cache.entries()}
    about = variants.read_about(parents["test.dear + quantize.bf16"])
    assert about["parent"] == parents["test.dear"].name


def test_a_recipe_of_three_of_which_two_are_there_makes_one(settings, dear):
    lab.measure("quantize.bf16 + test.dear + quantize.rtn:bits=4,group_size=32", only="memory", **settings)
    lab.measure("quantize.bf16 + test.dear + quantize.rtn:bits=3,group_size=32", only="memory", **settings)
    assert dear.read_text() == "applied "


@pytest.mark.parametrize("raised", ["technique", "protocol", "export", "measurement"])
def test_a_raised_version_asks_again_and_alone(settings, monkeypatch, raised):
    recipe = "quantize.rtn:bits=4,group_size=32 @ llamacpp"
    other = "quantize.bf16"
    lab.compare(["none", recipe, other], only="quality", **settings)
    if raised == "technique":
        monkeypatch.setattr(recipes.techniques()["quantize.rtn"], "version", 99)
        asked_again = {recipe}
    elif raised == "export":
        monkeypatch.setattr(recipes.deployments()["llamacpp"], "version", 99)
        asked_again = {recipe}
    elif raised == "protocol":
        raised_one = replace(protocols.PROTOCOLS["edgelab-512"], version=99)
        monkeypatch.setitem(protocols.PROTOCOLS, "edgelab-512", raised_one)
        asked_again = {"none", recipe, other}
    else:
        raised_one = replace(MEASUREMENTS["last_word"], version=99)
        monkeypatch.setitem(MEASUREMENTS, "last_word", raised_one)
        asked_again = {"none", recipe, other}
    steps = lab.planned(["none", recipe, other], only="quality", **settings)
    assert {str(step.recipe) for step in steps if step.place is not None and not step.is_known} == asked_again


def test_a_changed_config_or_tokenizer_is_another_model(settings, tiny, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(tiny, changed)
    here = settings | {"model": str(changed)}
    first = lab.measure("none", only="quality", **here)
    config = json.loads((changed / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 10
    (changed / "config.json").write_text(json.dumps(config))
    second = lab.measure("none", only="quality", **here)
    assert second.row_id != first.row_id and second.ppl != pytest.approx(first.ppl, rel=1e-3)
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    third = lab.measure("none", only="quality", **here)
    assert len({first.model_sha, second.model_sha, third.model_sha}) == 3
    assert third.bits_per_byte != pytest.approx(second.bits_per_byte, rel=1e-3)


def test_a_memory_row_is_not_measured_again_because_a_newer_row_lacks_it(settings):
    first = lab.measure("none", only="memory", **settings)
    lab.measure("none", only="quality", **settings)
    assert lab.measure("none", only="memory", **settings).row_id == first.row_id


def test_a_lost_cache_of_states_asks_the_baseline_again(settings):
    lab.measure("quantize.bf16", only="quality", **settings)
    cache.clear()
    row = lab.measure("quantize.fp16", only="quality", **settings)
    assert row.kld_mean is not None and [one.recipe for one in ledger.own()].count("none") == 2


def test_a_file_that_is_damaged_after_its_export_is_an_error_row(settings):
    """Cut in the middle, where no header tells."""
    recipe = "quantize.rtn:bits=4,group_size=32 @ llamacpp"
    lab.measure(recipe, only="memory", **settings)
    (file,) = cache.place("variants").glob("*/exports/llamacpp-*/model.gguf")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    table = lab.compare([recipe], only="memory", force=True, **settings)
    assert table.status[0] == "error" and "cannot load" in table.error[0]


def test_what_an_engine_refuses_is_an_error_row_with_its_sentence(settings):
    table = lab.compare(["quantize.nf4 @ onnxruntime", "native.int4"], only="memory", **settings)
    assert list(table.status) == ["error", "error"]
    assert "a codebook runs on 'torch'" in table.error[0] and "by an engine itself" in table.error[1]
