"""The documentation: its examples work when they are saved as files, and its tables are those of the registries."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgelab import cli, lab, ledger, plots, recipes, report, runtimes
from edgelab.devices import catalogue, tables
from edgelab.ledger.row import OTHERS
from edgelab.measure import MEASUREMENTS, measurements
from edgelab.runtimes import support

DOCS = Path(__file__).resolve().parent.parent / "docs"
build = runpy.run_path(str(DOCS / "build.py"))
RECIPES = [
    "none",
    "quantize.powers:bits=4,group_size=32",
    "quantize.powers:bits=3,group_size=32 @ unpacked",
    "quantize.powers:bits=4,group_size=32 @ numpy",
]


def examples(kind: str = "python") -> dict[str, str]:
    """The code of extending.md by the path in its first line, as a reader would save it."""
    blocks = re.findall(
        rf"^```{kind}\n(.*?)^```$", (DOCS / "extending.md").read_text(encoding="utf-8"), re.M | re.S
    )
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks}


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """The files of extending.md in a folder that EDGELAB_PLUGINS names. What they enter goes with the test."""
    for path, code in examples().items():
        if path.startswith("plugins/"):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(code, encoding="utf-8")
    measurements()
    registries = recipes.techniques(), recipes.deployments(), MEASUREMENTS, OTHERS
    before = [dict(one) for one in registries]
    monkeypatch.setenv("EDGELAB_PLUGINS", str(tmp_path / "plugins"))
    yield tmp_path
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)
    for name in [name for name in sys.modules if name.startswith("edgelab_plugin_")]:
        del sys.modules[name]


@pytest.fixture
def settings(tiny, story, tmp_path, monkeypatch):
    text = tmp_path / "story.txt"
    text.write_text(story.text, encoding="utf-8")
    monkeypatch.setenv("EDGELAB_FAST", "1")
    return {"model": str(tiny), "corpus": str(text), "windows": 2, "threads": 1, "only": "quality,repetition"}


def command(*arguments: str) -> str:
    """What the command line prints, in a process of its own: nothing is registered but by the files."""
    code = "from edgelab.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "250"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(what: str) -> list[dict]:
    """What `edgelab list` prints, in this process, which has imported no plugin yet."""
    printed = CliRunner().invoke(cli.app, ["list", what, "--json"]).output
    return [json.loads(line) for line in printed.splitlines()]


def test_a_stranger_s_files_are_measured_like_our_own(followed, settings, tmp_path):
    table = lab.compare(RECIPES, **settings)
    assert list(table.status) == ["ok"] * 4, list(table.error)
    none, four, three, numpy = (table.iloc[place] for place in range(4))

    # The technique is stored in 4 and 3 bits, and costs more where it has fewer.
    assert four.kernel == "unpacked when used, float32" and three.kernel == "unpacked when used"
    assert three.weights_mb < four.weights_mb < none.weights_mb
    assert 0 < four.kld_mean < three.kld_mean

    # The measurements: what they gave is in the ledger, by name, and in its table.
    assert 0 < none.entropy < 300 and (table.repetition >= 0).all()
    (row,) = [row for row in ledger.own() if row.recipe == RECIPES[1]]
    assert row.extra == {"entropy": four.entropy, "repetition": four.repetition}
    assert ledger.frame().set_index("recipe").entropy[RECIPES[3]] == numpy.entropy

    # The engine computes what PyTorch computes, and has been through the gate.
    assert numpy.badge == "runtime" and numpy.kernel == "numpy float32" and numpy.parity == "passed"
    assert numpy.ppl == pytest.approx(four.ppl, rel=1e-4)
    assert [row.parity for row in ledger.own() if row.runtime == "unpacked"] == [None]

    # A plot, the report and the command line read the declaration of the field.
    figure = plots.tradeoff(table, x="weights_mb", y="entropy")
    assert figure.axes[0].get_ylabel() == "Entropy of the next token (nats), lower is better"
    page = report.write(table, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Entropy of the next token" in page and f"{four.entropy:.3f}" in page
    shown = command("ledger", "show")
    assert "entropy" in shown and "repeats" in shown and f"{four.entropy:.4g}" in shown

    # Equal questions have equal answers; a version that is raised asks again.
    assert all(step.is_known for step in lab.planned(RECIPES, **settings))
    file = tmp_path / "plugins" / "entropy.py"
    file.write_text(file.read_text().replace('part="quality",', 'part="quality",\n    version=2,'))
    dry = command(
        "compare", *RECIPES, "--dry-run", "--json", "--model", settings["model"], "--corpus", settings["corpus"],
        "--windows", "2", "--threads", "1", "--only", settings["only"],
    )  # fmt: skip
    assert {json.loads(line)["state"] for line in dry.splitlines() if '"row"' in line} == {"to do"}


def test_a_stranger_s_files_are_listed(followed):
    (technique,) = [one for one in listed("techniques") if one["technique"] == "quantize.powers"]
    assert technique["what"] == "Every linear layer but the head on signed powers of two, without data."
    names = {one["measurement"]: one["needs"] for one in listed("measurements")}
    assert names["entropy"] == "logits" and names["repetition"] == "session"
    assert {"entropy", "repetition"} <= {one["field"] for one in listed("fields")}
    runs = {
        (one["recipe"], one["runtime"]): one["reason"]
        for one in listed("runtimes")
        if "model" not in one["alike"]
    }
    assert runs["quantize.rtn:bits=4,group_size=64", "unpacked"] is None
    assert runs["quantize.fp16", "numpy"] is None
    assert runs["quantize.kv:bits=4", "numpy"].startswith("NumPy runs plain float32 products here")


def test_a_stranger_s_files_are_in_the_references(followed, tmp_path):
    build["write"](tmp_path)
    page = (tmp_path / "recipes.md").read_text(encoding="utf-8")
    assert "### `quantize.powers`" in page and "### `@ numpy`" in page and "### `@ unpacked`" in page
    assert (
        "| `bits` | whole number | 4 | 2 to 5; more would need exponents that float16 does not have |" in page
    )
    assert "| `entropy` | Entropy of the next token | nats | lower |" in (tmp_path / "fields.md").read_text(
        "utf-8"
    )


def test_levels_of_the_technique_and_pairs_of_the_measurement(followed):
    technique = sys.modules[recipes.techniques()["quantize.powers"].__module__]
    assert technique.powers_of_two(3).tolist() == [-1, -0.5, -0.25, 0, 0.125, 0.25, 0.5, 1]
    with pytest.raises(recipes.RecipeError, match="outside 2 to 5"):
        recipes.parse("quantize.powers:bits=6")
    measured = sys.modules[measurements()["repetition"].run.__module__]
    assert measured.repeated([1, 2, 3, 4]) == 0  # 12 23 34
    assert measured.repeated([1, 2, 1, 2, 1]) == 0.5  # 12 21, and both again


def test_the_engine_goes_on_and_back_like_pytorch(followed, variant):
    folder = variant("quantize.rtn:bits=8,group_size=0")
    ids = [5, 200, 31, 7, 7, 120, 64, 2]
    expected = runtimes.load("simulated", folder).logits(ids)
    session = runtimes.load("numpy", folder)
    assert torch.allclose(session.logits(ids), expected, atol=session.tolerance * expected.std())
    session.rewind(5)
    assert torch.allclose(session.extend(ids[3:]), expected[3:], atol=session.tolerance * expected.std())
    with pytest.raises(runtimes.RuntimeRefused, match=r"^The export to NumPy knows llama, not gemma"):
        runtimes.load("numpy", variant("none", "gemma", hidden_act="silu"))


def test_a_device_in_python_and_as_a_line_of_the_catalogue(tmp_path, monkeypatch):
    made = runpy.run_path(str(_saved(tmp_path / "device.py", examples()["device.py"])))
    assert list(made["table"].fits) == [True, True] and (made["table"].decode_tok_s > 0).all()
    (line,) = examples("csv")
    ours = (tables.data_dir() / "devices.csv").read_text(encoding="utf-8")
    _saved(tmp_path / "devices.csv", f"{ours.rstrip()}\n{line}\n")
    monkeypatch.setattr(tables, "data_dir", lambda: tmp_path)
    assert [one for one in catalogue() if one.name == "My board"] == [made["board"]]


def _saved(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_generated_pages_are_those_of_the_registries():
    assert build["stale"]() == [], "run `python docs/build.py`"


def test_the_pages_name_every_technique_deployment_field_and_measurement():
    known, page = recipes.catalogue(), (DOCS / "recipes.md").read_text(encoding="utf-8")
    assert all(f"### `{name}`" in page for name in known.techniques)
    assert all(f"### `@ {name}`" in page for name in known.deployments)
    page = (DOCS / "fields.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in (*ledger.FIELDS, *measurements()))
    page = (DOCS / "engines.md").read_text(encoding="utf-8")
    assert all(f"| `{recipe}`" in page for recipe in {answer.recipe for answer in support.table()})


@pytest.mark.parametrize(
    "page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files_of_the_project(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        place, _, anchor = target.partition("#")
        if "://" in place:
            continue
        file = page.parent / place if place else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_recipes_of_the_documentation_can_be_read(followed):
    words = re.compile(r"^edgelab (?:compare|measure) (.+)$", re.M)
    for page in (DOCS.parent / "README.md", DOCS / "extending.md", DOCS / "measuring.md"):
        for line in words.findall(page.read_text(encoding="utf-8")):
            quoted = re.findall(r'"([^"]+)"|(\S+)', line.partition(" --")[0])
            for text in filter(None, (part for pair in quoted for part in pair)):
                recipes.parse(text)
