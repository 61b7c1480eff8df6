"""The command line as a user meets it: help, JSON, one sentence for what can be mended, and never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import edgelab as el
from edgelab import cli, ledger
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudDenied, CloudRefused
from edgelab.deployments.hybrid.server import serving
from edgelab.deployments.hybrid.server.limits import Limits


def edgelab(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "edgelab.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1", "EDGELAB_FAST": "1", "COLUMNS": "200"} | environment,
        timeout=300,
    )


@pytest.fixture
def inside(monkeypatch, capsys):
    """As `edgelab`, in this process, which has imported everything already."""

    def run(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["edgelab", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, said.out, said.err)

    return run


@pytest.fixture
def place(tiny, tmp_path, story):
    file = tmp_path / "story.txt"
    file.write_text(story.text, encoding="utf-8")
    return ["--model", str(tiny), "--corpus", str(file), "--windows", "2", "--threads", "1"]


@pytest.mark.parametrize(
    "command",
    [
        "fetch",
        "doctor",
        "list",
        "devices",
        "measure",
        "serve",
        "compare",
        "export",
        "plan",
        "report",
        "ledger show",
        "ledger export",
        "cache show",
        "lab",
    ],
)
def test_every_command_shows_an_example(command):
    shown = edgelab(*command.split(), "--help")
    assert shown.returncode == 0 and f"edgelab {command}" in shown.stdout


def test_measure_prints_one_json_object_per_row_and_nothing_else(place):
    done = edgelab("measure", "none", "quantize.rtn:bits=4", "--only", "quality", "--json", *place)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [row["recipe"] for row in rows] == ["none", "quantize.rtn:bits=4,group_size=64"]
    assert set(rows[0]) == set(ledger.FIELDS) - {"window_nll", "extra"}
    assert rows[1]["delta_nll"] is not None and rows[1]["decode_tok_s"] is None


def test_a_comparison_prints_a_table_and_writes_a_report(place, tmp_path):
    page = tmp_path / "results" / "report.html"
    done = edgelab("compare", "none", "quantize.bf16", "--only", "quality", "--report", str(page), *place)
    assert done.returncode == 0, done.stderr
    assert "quantize.bf16" in done.stdout and "bf16" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["measure", "none", "--model", "nobody/nothing"],
            "neither a local folder nor can it be had from the Hub",
        ),
        (["ledger", "export", "rows.docx"], "not to '.docx'"),
    ],
)
def test_bad_input_is_one_sentence_and_a_failure(arguments, sentence):
    done = edgelab(*arguments, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and sentence in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("quantise.rtn", "did you mean quantize.rtn"),
        ("quantize.rtn:bit=4", "did you mean bits"),
        ("quantize.rtn:bits=9", "outside 2 to 8"),
    ],
)
def test_a_recipe_that_is_none_is_one_sentence(inside, recipe, sentence, place):
    done = inside("measure", recipe, *place)
    assert done.returncode == 1 and sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_without_a_model_is_one_sentence(inside):
    done = inside("measure", "none", "--model", ".")
    assert done.returncode == 1 and "holds no model" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_group_size_that_does_not_divide_is_answered_with_those_that_do(place):
    done = edgelab("measure", "quantize.rtn:group_size=128", "--only", "quality", *place)
    assert done.returncode == 1 and "use 32, 64, 0 (one group per row)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_cannot_be_written_is_one_sentence(inside, place, tmp_path):
    (tmp_path / "file").write_text("")
    done = inside("measure", "none", "--only", "quality", *place, EDGELAB_HOME=str(tmp_path / "file"))
    assert done.returncode == 1 and "EDGELAB_HOME" in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_keeps_the_rows_so_far(place):
    command = [sys.executable, "-m", "edgelab.cli", "compare", "--only", "quality", "--json", *place]
    recipes = ["none", *(f"quantize.rtn:bits={bits}" for bits in (8, 7, 6, 5, 4, 3, 2))]
    run = subprocess.Popen(
        [*command, *recipes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1", "EDGELAB_FAST": "1"},
    )
    first = json.loads(run.stdout.readline())
    time.sleep(1)  # into the next row
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130 and "kept in the ledger" in said and "Traceback" not in said
    assert first["row_id"] in [row.row_id for row in ledger.own()]


def test_list_and_cache_and_ledger_answer_in_json(place):
    techniques = [json.loads(line) for line in edgelab("list", "techniques", "--json").stdout.splitlines()]
    assert {"quantize.rtn", "quantize.bf16", "quantize.fp16"} <= {one["technique"] for one in techniques}
    edgelab("measure", "quantize.bf16", "--only", "quality", *place)
    cached = [json.loads(line) for line in edgelab("cache", "show", "--json").stdout.splitlines()]
    assert any("quantize.bf16" in one["what"] for one in cached)
    rows = [json.loads(line) for line in edgelab("ledger", "show", "--json").stdout.splitlines()]
    assert [row["recipe"] for row in rows] == ["none", "quantize.bf16"]
    assert edgelab("cache", "clear").returncode == 0 and edgelab("cache", "show", "--json").stdout == ""
    listed = [json.loads(line) for line in edgelab("list", "measurements", "--json").stdout.splitlines()]
    assert {"perplexity", "latency", "story_cloze"} <= {one["measurement"] for one in listed}
    listed = [json.loads(line) for line in edgelab("list", "fields", "--json").stdout.splitlines()]
    assert [one["field"] for one in listed] == list(ledger.FIELDS)


def test_a_dry_run_prints_the_plan_and_does_nothing(place):
    done = edgelab("compare", "quantize.bf16", "--only", "quality", "--dry-run", "--json", *place)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["step"], one["recipe"], one["for"], one["state"]) for one in steps] == [
        ("stage", "none", "what follows", "to do"),
        ("row", "none", "what follows", "to do"),
        ("stage", "quantize.bf16", "what follows", "to do"),
        ("row", "quantize.bf16", "you", "to do"),
    ]
    assert ledger.own() == []


def test_doctor_says_how_to_mend_what_is_missing():
    done = edgelab("doctor", "--json")
    checks = {one["check"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert checks["assets"]["state"] == "note" and checks["assets"]["mend"] == "edgelab fetch"
    assert done.returncode == 0 and checks["torch"]["state"] == "ok"
    assert {one for one in checks if one.startswith("runtime ")} <= {"runtime litert", "runtime executorch"}
    assert "runtime litert" not in checks or checks["runtime litert"]["mend"] == "make phone"


def test_the_machine_is_named_in_one_line():
    known = ledger.machine()
    line = el.machine()
    assert known["cpu"] in line and known["os"] in line and "\n" not in line
    assert f"{known['ram_gb']:.0f} GB of memory" in line


def test_a_plan_is_made_saved_and_read(tiny, tmp_path):
    saved, profile = str(tmp_path / "plan.json"), str(tmp_path / "profile.json")
    where = "none @ partition:fleet=two_here,use=cloud"
    done = edgelab("plan", where, "--model", str(tiny), "--profile", profile, "--save", saved)
    assert done.returncode == 0, done.stderr
    assert "cloud runs" in done.stdout and "Predicted:" in done.stdout and "edge_solo" in done.stdout
    again = edgelab("plan", where, "--model", str(tiny), "--profile", profile)
    first, second = (re.sub(r" of [\d,.]+ MB", "", one.stdout) for one in (done, again))
    assert first == second  # from the file, nothing is timed; memory is what is free now
    other = edgelab("plan", "quantize.bf16 @ partition", "--model", str(tiny), "--profile", profile)
    assert other.returncode != 0
    assert "is a profile of none, and the recipe is quantize.bf16; measure that one" in other.stderr
    read = edgelab("plan", "--read", saved, "--json")
    assert [json.loads(line)["device"] for line in read.stdout.splitlines()] == ["edge", "cloud"]
    formats = json.loads((tmp_path / "plan.json").read_text())["formats"]
    assert [one["wire"] for one in formats] == ["float32", "float16", "int8", "int4"]
    assert formats[0]["delta_nll"] == 0
    assert formats[0]["bytes"] > formats[1]["bytes"] > formats[2]["bytes"] > formats[3]["bytes"]


def test_a_plan_of_a_published_model():
    done = edgelab("plan", "none @ partition:fleet=edgeshard", "--published", "Llama-2-70B")
    assert done.returncode == 0 and "agx 1 runs" in done.stdout and "nan" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none @ torch"], "is no partition; write it as 'none @ partition:fleet=NAME'"),
        (["--published", "Llama-9"], "No model is called 'Llama-9'; there are"),
        (
            ["none @ partition:fleet=moon", "--published", "Llama-2-7B"],
            "moon is no file and no fleet of edgelab",
        ),
        (
            ["none @ partition:fleet=edge_and_cloud", "--published", "Llama-2-70B"],
            "all devices together have",
        ),
        (["--read", "nothing.json"], "cannot be read"),
    ],
)
def test_plans_that_cannot_be(inside, arguments, said):
    done = inside("plan", *arguments)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_recipe_is_served_until_ctrl_c(tiny, tmp_path):
    """Everything the edge needs is the line that is printed, and a file that only its owner reads."""
    token = tmp_path / "token"
    command = [
        sys.executable,
        "-m",
        "edgelab.cli",
        "serve",
        "none",
        "--model",
        str(tiny),
        "--token-file",
        str(token),
        "--name",
        "tiny",
        "--max-tokens",
        "4",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url, name = process.stdout.readline().strip(), process.stdout.readline().strip()
        with Cloud(url, token.read_text().strip()) as cloud:
            assert cloud.health()["model"] == name == "tiny"
            assert cloud.complete("Once upon", 3).ids is not None
            with pytest.raises(CloudRefused, match="max_tokens may be 4 at most"):
                cloud.complete("Once upon", 5)
        with Cloud(url, "another") as cloud, pytest.raises(CloudDenied):
            cloud.health()
        assert token.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none @ cascade:cloud=(none)"], "a server runs one engine"),
        (["none", "--token-file", "nofolder/token"], "There is no folder nofolder"),
        (["none", "--token-file", "/"], "/ is there and no file"),
        (["none", "--max-tokens", "0"], "max_tokens is 0 and should be at least 1"),
        (["none", "--seconds", "0"], "request_s is 0.0 and should be above 0 seconds"),
    ],
)
def test_what_cannot_be_served_is_one_sentence_before_anything_is_loaded(
    inside, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(serving, "serve", lambda *given: pytest.fail("It was to be served all the same."))
    done = inside("serve", *arguments)
    assert done.returncode == 1 and sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "limits", "whole_context"),
    [
        ([], {}, True),
        (["--prompt-tokens", "300"], {"prompt_tokens": 300}, False),
        (["--max-tokens", "4096", "--seconds", "600"],
         {"max_tokens": 4096, "request_s": 600, "waiting_s": 600}, True),
        (["--seconds", "5"], {"request_s": 5}, True),
    ],
)  # fmt: skip
def test_limits_of_a_server_are_options(inside, monkeypatch, arguments, limits, whole_context):
    asked = []
    monkeypatch.setattr(serving, "serve", lambda settings, announce: asked.append(settings))
    assert inside("serve", *arguments).returncode == 0
    assert asked[0].limits == Limits(**limits)
    assert asked[0].whole_context == whole_context


def test_a_device_of_ones_own_is_kept_and_listed(inside):
    kept = inside("devices", "My phone", "--memory-gb", "8", "--bandwidth-gb-s", "51.2")
    assert kept.returncode == 0 and "My phone is kept in" in kept.stderr
    rows = [json.loads(line) for line in inside("devices", "--json").stdout.splitlines()]
    (own,) = [row for row in rows if row["name"] == "My phone"]
    assert own["memory_gb"] == 8 and own["memory_bandwidth_gb_s"] == 51.2 and len(rows) > 10
    lacking = inside("devices", "Another", "--memory-gb", "8")
    assert lacking.returncode == 1 and "--bandwidth-gb-s" in lacking.stderr
