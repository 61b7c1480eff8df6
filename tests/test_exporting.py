"""Recipes as files: what is written is what our engines run, whole or not at all, and refusals come before."""

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import psutil
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import edgelab as el
from edgelab import cli, recipes, reference, runtimes
from edgelab.errors import EdgeLabError
from edgelab.lab import ExportError, exporting
from edgelab.runtimes import EngineMissing, RuntimeRefused
from edgelab.storage import adapters, stages, variants

FOUR = "quantize.rtn:bits=4,group_size=32"
IDS = torch.arange(2, 60)[None]


def variant_of(recipe, model):
    """The folder of the variant that an export has made."""
    return stages.address(recipes.parse(recipe), reference.resolve(str(model)), 0)


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits[0].float()


def started(*arguments, **environment):
    """`edgelab export` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "edgelab.cli", "export", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"} | environment,
    )


@pytest.fixture
def place(tmp_path):
    """An empty folder for files."""
    folder = tmp_path / "files"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("recipe", ["none", "quantize.bf16", FOUR, f"{FOUR} + quantize.embedding"])
def test_a_gguf_file_holds_the_weights_of_the_variant(recipe, tiny, place):
    done = el.export(recipe, "gguf", place / "tiny.gguf", model=str(tiny))
    read = reference.load_model(reference.resolve(str(place / "tiny.gguf")))
    expected = logits(variants.load(variant_of(recipe, tiny)))
    assert (logits(read) - expected).norm() < 0.02 * expected.norm()  # minima in float16, and bfloat16's sums
    assert done.file_mb == (place / "tiny.gguf").stat().st_size / 1e6
    assert 0 < done.weights_mb < done.file_mb
    assert [file.name for file in place.iterdir()] == ["tiny.gguf"]


def test_four_bits_are_five_with_scale_and_minimum(tiny, place):
    """2 layers of 49,152 weights in blocks of 32 at 20 bytes; 300 x 64 floats; 5 norms of 64."""
    done = el.export(FOUR, "gguf", place / "tiny.gguf", model=str(tiny))
    assert done.weights_mb * 1e6 == 2 * 49152 / 32 * 20 + 300 * 64 * 4 + 5 * 64 * 4
    assert done.predicted_mb == pytest.approx(done.file_mb, abs=0.02)  # what is left is the tokenizer


@pytest.mark.parametrize("recipe", ["none", f"{FOUR} + quantize.embedding", "native.int8"])
def test_a_folder_of_onnx_runtime_runs_elsewhere(recipe, tiny, tmp_path, place):
    engine = pytest.importorskip("onnxruntime_genai")
    done = el.export(recipe, "onnx", place / "tiny", model=str(tiny))
    moved = (place / "tiny").rename(tmp_path / "moved")
    generator = engine.Generator(engine.Model(str(moved)), engine.GeneratorParams(engine.Model(str(moved))))
    generator.append_tokens(IDS.numpy().astype("int32"))
    expected = logits(variants.load(variant_of(recipe, tiny)))[-1]
    found = torch.from_numpy(generator.get_logits()[0, -1])
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert done.predicted_mb is None and not (moved / runtimes.NOTE).exists()
    assert {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json"} <= {
        file.name for file in moved.iterdir()
    }


def test_a_bundle_of_litert(tiny, place):
    pytest.importorskip("litert_torch")
    done = el.export("native.int8", "litertlm", place / "tiny.litertlm", model=str(tiny))
    assert (place / "tiny.litertlm").read_bytes()[:8] == b"LITERTLM"
    assert 0 < done.weights_mb < done.file_mb and "litert-lm run" in done.then
    assert [file.name for file in place.iterdir()] == ["tiny.litertlm"]


def test_an_engine_that_is_not_installed_is_named(tiny, place, home, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "litert_torch" else there(name)
    )
    with pytest.raises(EngineMissing, match=r"LiteRT's converter is not installed here; `make phone`"):
        el.export("native.int8", "litertlm", place / "tiny.litertlm", model=str(tiny))
    assert not list(place.iterdir()) and not (home / "variants").exists()


def test_the_file_of_a_row_is_taken_and_not_made_again(tiny, place, monkeypatch):
    el.export(FOUR, "gguf", place / "first.gguf", model=str(tiny))
    variant = variant_of(FOUR, tiny)
    kept = runtimes.exported("llamacpp", variant).folder / "model.gguf"
    assert kept.read_bytes() == (place / "first.gguf").read_bytes()
    writer = exporting.Writer(str(variant), "gguf")
    monkeypatch.setattr(runtimes, "export_to", None)
    (place / "second").mkdir()
    assert (
        writer.write(str(place / "second"), "there") == runtimes.exported("llamacpp", variant).weights_bytes
    )
    assert [file.name for file in (place / "second").iterdir()] == ["model.gguf"]
    assert (place / "second" / "model.gguf").read_bytes() == kept.read_bytes()
    kept.write_bytes(kept.read_bytes()[:-1])  # one that was changed since is not taken
    with pytest.raises(TypeError):
        writer.write(str(place / "second"), "there")


# Refusals


@pytest.mark.parametrize(
    ("recipe", "to", "name", "sentence"),
    [
        ("none", "pdf", "tiny.pdf", "No file is called 'pdf'; there are gguf, onnx, litertlm."),
        (
            "none",
            "gguf",
            "tiny.bin",
            "The name of a GGUF file ends in .gguf, and .*tiny.bin does not; add it.",
        ),
        ("none", "onnx", "tiny.onnx", "has several files; name a folder instead of .*tiny.onnx"),
        ("none", "gguf", "no/such/tiny.gguf", "There is no folder .*no/such; make it first"),
        (
            "none @ onnxruntime",
            "gguf",
            "tiny.gguf",
            "is for llamacpp, and this recipe runs on onnxruntime; leave",
        ),
        (
            "none @ cascade:cloud=(none)",
            "gguf",
            "tiny.gguf",
            "is for llamacpp, and this recipe runs on cascade",
        ),
        ("quantise.rtn", "gguf", "tiny.gguf", "did you mean quantize.rtn"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_made(
    recipe, to, name, sentence, tiny, place, home
):
    with pytest.raises(EdgeLabError, match=sentence):
        el.export(recipe, to, place / name, model=str(tiny))
    assert not list(place.iterdir()) and not (home / "variants").exists()


@pytest.mark.parametrize(("to", "name"), [("gguf", "bloom.gguf"), ("onnx", "bloom")])
def test_a_layout_is_refused_before_anything_is_built(to, name, folder_of, place, home):
    with pytest.raises(RuntimeRefused, match="not bloom; use 'torch'"):
        el.export(FOUR, to, place / name, model=str(folder_of("bloom")))
    assert not list(place.iterdir()) and not (home / "variants").exists()


@pytest.mark.parametrize(
    ("recipe", "to", "name", "sentence"),
    [
        ("quantize.nf4:group_size=32", "gguf", "tiny.gguf", "GGUF has no type for the codebook"),
        ("quantize.nf4:group_size=32", "onnx", "tiny", "MatMulNBits has uniform grids only"),
        ("quantize.bf16", "onnx", "tiny", "computes in float32"),
        ("native.int8", "gguf", "tiny.gguf", "llama.cpp runs integers that a technique chose"),
    ],
)
def test_what_an_engine_refuses_leaves_nothing(recipe, to, name, sentence, tiny, place):
    with pytest.raises(EdgeLabError, match=sentence) as caught:
        el.export(recipe, to, place / name, model=str(tiny))
    assert "\n" not in str(caught.value) and not list(place.iterdir())


def test_an_adapter_has_to_be_merged(variant, new_model):
    base, model = variant("none"), new_model("llama")
    adapters.attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    folder = base.with_name("adapter")
    variants.save_adapter(model, folder, {"recipe": "lora"}, base)
    with pytest.raises(ExportError, match="holds no adapter beside the weights; put merge behind the recipe"):
        exporting.Writer(str(folder), "gguf").check()


def test_a_tokenizer_that_a_file_cannot_hold_is_refused(new_model, place, tmp_path, home):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    new_model("llama").save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match="WordLevel"):
        el.export("none", "gguf", place / "words.gguf", model=str(tmp_path / "model"))
    assert not list(place.iterdir()) and not (home / "variants").exists()


def test_a_tokenizer_is_refused_before_weights_are_asked_for(new_model, place, tmp_path, home, monkeypatch):
    """From the Hub, of which the JSON files are there."""
    snapshots = tmp_path / "hub" / "models--someone--words"
    folder = snapshots / "snapshots" / ("a" * 40)
    (snapshots / "refs").mkdir(parents=True)
    (snapshots / "refs" / "main").write_text(folder.name)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    new_model("llama").config.save_pretrained(folder)
    asked = []

    def fetched(name, allow_patterns, **_):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(exporting, "resolve", None)
    with pytest.raises(ExportError, match="WordLevel"):
        el.export("none", "gguf", place / "words.gguf", model="someone/words")
    assert asked and {*map(tuple, asked)} == {("*.json",)}
    assert not list(place.iterdir()) and not (home / "variants").exists()


def test_texts_that_get_other_tokens_are_told(new_model, byte_tokenizer, place, tmp_path):
    described = json.loads(byte_tokenizer.backend_tokenizer.to_str()) | {"normalizer": {"type": "NFC"}}
    new_model("llama").save_pretrained(tmp_path / "model")
    composing = Tokenizer.from_str(json.dumps(described))
    PreTrainedTokenizerFast(tokenizer_object=composing, bos_token="<s>").save_pretrained(tmp_path / "model")
    done = el.export("none", "gguf", place / "one.gguf", model=str(tmp_path / "model"))
    assert done.notes.startswith("This tokenizer composes characters that come in parts (NFC) and llama.cpp")
    arguments = [
        "export",
        "none",
        str(place / "two.gguf"),
        "--to",
        "gguf",
        "--model",
        str(tmp_path / "model"),
    ]
    *_, last = CliRunner().invoke(cli.app, arguments).stdout.strip().splitlines()
    assert last == done.notes
    pytest.importorskip("onnxruntime_genai")
    assert el.export("none", "onnx", place / "onnx", model=str(tmp_path / "model")).notes == ""


# What is there already


def test_an_earlier_file_is_replaced_only_when_asked(tiny, place):
    file = place / "tiny.gguf"
    file.write_text("mine")
    with pytest.raises(
        ExportError, match=r"is there already; name another place, or replace it with --force"
    ):
        el.export("none", "gguf", file, model=str(tiny))
    assert file.read_text() == "mine"
    el.export("none", "gguf", file, model=str(tiny), force=True)
    assert file.read_bytes()[:4] == b"GGUF" and len(list(place.iterdir())) == 1


@pytest.mark.parametrize(
    ("to", "name", "sentence"),
    [
        ("onnx", "mine", "holds something else than a folder of ONNX Runtime GenAI, and is not replaced"),
        ("gguf", "mine.gguf", "is no place for a GGUF file, and is not replaced"),
    ],
)
def test_a_folder_of_something_else_is_never_replaced(to, name, sentence, tiny, place):
    (place / name).mkdir()
    (place / name / "letter.txt").write_text("mine")
    with pytest.raises(ExportError, match=sentence):
        el.export("none", to, place / name, model=str(tiny), force=True)
    assert (place / name / "letter.txt").read_text() == "mine"


def test_a_folder_is_replaced_whole(tiny, place):
    pytest.importorskip("onnxruntime_genai")
    el.export("none", "onnx", place / "tiny", model=str(tiny))
    (place / "tiny" / "old.txt").write_text("of the earlier one")
    el.export("none", "onnx", place / "tiny", model=str(tiny), force=True)
    assert not (place / "tiny" / "old.txt").exists() and (place / "tiny" / "model.onnx").is_file()


# A full disk, and ends in the middle


def test_a_full_disk_leaves_nothing_and_is_said(tiny, place):
    """The system lets no file of this process grow beyond 100 kB; the variant of 395 kB is there already."""
    el.export("none", "gguf", place / "tiny.gguf", model=str(tiny))
    (place / "tiny.gguf").unlink()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    options = ["--to", "gguf", "--model", str(tiny)]
    done = subprocess.run(
        [sys.executable, "-m", "edgelab.cli", "export", "none", str(place / "tiny.gguf"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
        preexec_fn=limited,
    )
    said = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(said) == 1, done.stderr
    assert f"Cannot write to {place}" in said[0] and "free some space there, or name a file" in said[0]
    assert not list(place.iterdir())


SLOW = """
import time
from pathlib import Path

from edgelab.runtimes.llamacpp import LlamaCpp


def export(variant: Path, folder: Path) -> int:
    (folder / "model.gguf").write_bytes(b"GGUF")
    time.sleep(600)


LlamaCpp.export = staticmethod(export)
"""


@pytest.fixture
def half_way(tiny, place, tmp_path):
    """An export that has written half of its file and is busy: its process, and that of its writer."""
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW)
    run = started("none", place / "tiny.gguf", "--to", "gguf", "--model", tiny, EDGELAB_PLUGINS=str(plugin))
    deadline = time.monotonic() + 120
    while not list(place.glob(".tiny.gguf.*.part/made/model.gguf")):
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield run
    run.kill()
    run.communicate()


def test_an_export_that_is_ended_leaves_nothing(half_way, place):
    half_way.send_signal(signal.SIGTERM)
    assert half_way.wait(60) == 143
    assert not list(place.iterdir())


def test_a_writer_that_is_killed_leaves_nothing_and_is_said(half_way, place):
    writers = [one for one in psutil.Process(half_way.pid).children(recursive=True) if not one.children()]
    for one in writers:
        one.kill()
    _, said = half_way.communicate(timeout=60)
    assert half_way.returncode == 1 and "memory ran out" in said and "Traceback" not in said
    assert not list(place.iterdir())


def test_what_a_killed_export_leaves_goes_with_the_next_one(half_way, place, tiny):
    half_way.kill()
    half_way.wait(60)
    assert [file.name.startswith(".tiny.gguf.") for file in place.iterdir()] == [True]
    other = place / ".other.gguf.1-x.part"
    other.write_text("of another file")
    el.export("none", "gguf", place / "tiny.gguf", model=str(tiny))
    assert sorted(file.name for file in place.iterdir()) == [other.name, "tiny.gguf"]


# The command line


def test_the_command_line_says_size_and_what_comes_next(tiny, place):
    file = place / "tiny.gguf"
    arguments = ["export", FOUR, str(file), "--to", "gguf", "--model", str(tiny)]
    before = signal.getsignal(signal.SIGTERM)
    first, second = CliRunner().invoke(cli.app, arguments).stdout.strip().splitlines()
    assert f"{file.stat().st_size / 1e6:.1f} MB (predicted 0." in first and f"{FOUR} of tiny-llama" in first
    assert second.startswith(f"`llama-cli -m {file}`")
    again = CliRunner().invoke(cli.app, arguments)
    assert isinstance(again.exception, ExportError) and "is there already" in str(again.exception)
    again = CliRunner().invoke(cli.app, [*arguments, "--force", "--json"])
    (row,) = map(json.loads, again.stdout.splitlines())
    assert signal.getsignal(signal.SIGTERM) == before
    assert row["path"] == str(file) and row["file_mb"] == file.stat().st_size / 1e6 and row["to"] == "gguf"


@pytest.mark.embedded
def test_the_size_of_the_embedded_model_is_predicted(tmp_path):
    done = el.export(FOUR, "gguf", tmp_path / "embedded.gguf")
    assert done.predicted_mb == pytest.approx(done.file_mb, rel=0.005)
    assert Path(done.path).stat().st_size == done.file_mb * 1e6
