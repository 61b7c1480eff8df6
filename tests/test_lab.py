"""The one road, gone with the tiny model: recipe, variant, fresh process, row."""

import math

import pytest

from edgelab import lab, ledger, recipes, runtimes, variants
from edgelab.errors import EdgeLabError
from edgelab.ledger import Row
from edgelab.measure import isolation


@pytest.fixture
def text(tmp_path, story):
    file = tmp_path / "story.txt"
    file.write_text(story.text, encoding="utf-8")
    return str(file)


@pytest.fixture
def settings(tiny, text, monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    return {"model": str(tiny), "corpus": text, "windows": 3, "threads": 1}


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
        if method == "quality":
            self._process.kill()
        return real(self, method, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(isolation.Isolated, "call", killed)
        (row,) = lab.stream(["quantize.bf16"], only="quality", **settings)
    assert row.status == "oom" and "memory ran out" in row.error
    (row,) = lab.stream(["quantize.fp16"], only="quality", timeout_s=0.01, **settings)
    assert row.status == "timeout"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"only": "size"}, "none of quality, speed, memory"),
        ({"windows": 0}, "from 1 on"),
        ({"protocol": "gptq"}, "use one of edgelab-512"),
        ({"corpus": "nowhere"}, "There is no corpus"),
        ({"runtime": "llama"}, "Unknown runtime"),
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
        assert row.energy_j_per_token == pytest.approx(10 / row.decode_tok_s, rel=0.5)
        assert row.energy_basis.startswith("estimated: 10 W")
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
    twin = lab.measure("quantize.rtn:bits=8,group_size=0,symmetric=true", only="quality", **settings)
    assert f"{row.ppl:.3f} against {twin.ppl:.3f}" in row.parity_detail
    native = lab.measure("native.int8 @ onnxruntime", only="quality", **settings)
    assert native.parity == "own weights" and native.ppl > 0


def test_an_engine_whose_twin_cannot_be_measured_has_failed_the_gate(monkeypatch):
    monkeypatch.setattr(lab, "_known", lambda *_: Row("quantize.rtn", status="oom", error="memory ran out"))
    row, recipe = Row("quantize.rtn @ llamacpp", ppl=20.0), recipes.parse("quantize.rtn @ llamacpp")
    lab._gate(row, recipe, None, lab.Settings(model="embedded"))
    assert row.parity == "failed" and row.parity_detail == "PyTorch could not be asked: memory ran out"


def test_a_row_of_an_older_export_is_measured_again(settings, monkeypatch):
    recipe = "quantize.rtn:bits=4,group_size=32 @ llamacpp"
    first = lab.measure(recipe, only="memory", **settings)
    assert lab.measure(recipe, only="memory", **settings).row_id == first.row_id
    monkeypatch.setattr(runtimes.find("llamacpp"), "version", 99)
    chosen = lab.Settings(only="memory", **settings)
    assert lab._known(recipes.parse(recipe), chosen) is None
    assert "export" not in lab._provenance(lab.NOTHING, chosen)["versions"]


def test_a_file_that_is_damaged_after_its_export_is_an_error_row(settings):
    """Cut in the middle, where no header tells."""
    recipe = "quantize.rtn:bits=4,group_size=32 @ llamacpp"
    lab.measure(recipe, only="memory", **settings)
    (file,) = variants.cache_dir().glob("*/exports/llamacpp-*/model.gguf")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    table = lab.compare([recipe], only="memory", force=True, **settings)
    assert table.status[0] == "error" and "cannot load" in table.error[0]


def test_what_an_engine_refuses_is_an_error_row_with_its_sentence(settings):
    table = lab.compare(["quantize.nf4 @ onnxruntime", "native.int4"], only="memory", **settings)
    assert list(table.status) == ["error", "error"]
    assert "a codebook runs on 'torch'" in table.error[0] and "by an engine itself" in table.error[1]
