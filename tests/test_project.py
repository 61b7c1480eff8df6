"""The project keeps its own promises: dependencies in step, direction of imports, notebooks."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = [
    *PROJECT["dependencies"],
    *(one for name in ("runtimes", "cluster", "hybrid", "test") for one in EXTRAS[name]),
]


def load_build():
    spec = importlib.util.spec_from_file_location("notebooks_build", TOP / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def tracked_files() -> list[Path]:
    listing = ["git", "-C", str(TOP), "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    return [TOP / name for name in names if (TOP / name).is_file()]


def test_environment_file_lists_the_dependencies_of_pyproject():
    dependencies = yaml.safe_load((TOP / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in dependencies if isinstance(entry, str) and entry.startswith("python"))
    assert python == f"python{PROJECT['requires-python']}"
    assert dependencies[-1]["pip"] == TESTED


def pins(name: str) -> dict[str, str]:
    """Versions by package of a lock file."""
    lines = (TOP / name).read_text().splitlines()
    pairs = (re.fullmatch(r"([\w.\-]+)==([\w.]+)", line).groups() for line in lines)
    return {canonicalize_name(package): version for package, version in pairs}


def test_locks_pin_what_pyproject_asks_for():
    first, phone = pins("requirements.lock"), pins("requirements-phone.lock")
    assert "edgelab" not in first
    assert not first.keys() & phone.keys()  # the second environment sees the first
    optional = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*TESTED, *optional["executorch"], *optional["litert"]]):
        pinned = (first | phone)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), requirement


def test_imports_keep_their_direction():
    lint = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(lint, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ci_script_can_be_run():
    assert os.access(TOP / ".ci" / "run", os.X_OK)


def test_no_file_names_a_registry_or_a_path_of_one_machine():
    hosts = [
        "pypi" + ".org",
        "pythonhosted" + ".org",
        "npmjs" + ".org",
        "deb.debian" + ".org",
        "download.pytorch" + ".org",
    ]
    paths = [f"{path}/" for path in (Path.home(), TOP) if len(path.parts) > 1]
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(TOP)}: {word}" for word in (*hosts, *paths) if word in text]
    assert not found


def notebook(*cells: nbformat.NotebookNode, kernel: bool = True) -> nbformat.NotebookNode:
    made = nbformat.v4.new_notebook(cells=list(cells))
    if kernel:
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return made


def cell(source: str, count: int | None = 1, **output) -> nbformat.NotebookNode:
    made = nbformat.v4.new_code_cell(source, execution_count=count)
    if output:
        made.outputs = [nbformat.v4.new_output(**output)]
    return made


def stream(text: str) -> dict[str, str]:
    return {"output_type": "stream", "name": "stdout", "text": text}


def check(made: nbformat.NotebookNode, tmp_path: Path) -> list[str]:
    path = tmp_path / "made.ipynb"
    nbformat.write(made, path)
    return list(build.findings(path))


def test_a_good_notebook_has_no_findings(tmp_path):
    text = nbformat.v4.new_markdown_cell("Set `EDGELAB_FAST=1` for a shorter run.")
    double = cell("%matplotlib inline\ndef double(x):\n    return 2 * x", 1)
    shown = cell("double(2)", 2, output_type="execute_result", data={"text/plain": "4"})
    assert check(notebook(text, double, shown, cell("", None)), tmp_path) == []


@pytest.mark.parametrize(
    ("cells", "finding"),
    [
        ([cell("1", 1), cell("2", 3)], "execution counts are [1, 3]"),
        ([cell("1", None)], "execution counts are [None]"),
        ([cell("1/0", output_type="error", ename="ZeroDivisionError")], "cell 1 ended in an error: ZeroDiv"),
        ([cell(f"open('{Path.home()}/text.txt')")], "cell 1 holds a path of one machine in its source"),
        ([cell("1", **stream("/home" + "/reader/model"))], "cell 1 shows a path of one machine"),
        ([cell("1", **stream(f"written to {TOP}/results"))], "cell 1 shows a path of one machine"),
        ([cell("1", **stream("lib/site-" + "packages/torch"))], "cell 1 shows a path of one machine"),
        ([cell("1", **stream("/tmp" + "/variant"))], "cell 1 shows a path of one machine"),
        ([cell("1", **stream("FAST: shrunken samples"))], "cell 1 was run in fast mode"),
        ([cell("\n".join(["1"] * 21))], "cell 1 has 21 lines"),
        ([cell("def f():\n" + "    x = 1\n" * 10)], "cell 1 defines f() of 11 lines"),
        ([cell("1", **stream("x" * 1_000_000))], "is 1.0 MB"),
    ],
)
def test_a_bad_notebook_is_found_out(cells, finding, tmp_path):
    findings = check(notebook(*cells), tmp_path)
    assert len(findings) == 1
    assert finding in findings[0]


def test_a_notebook_without_kernel_is_found_out(tmp_path):
    (finding,) = check(notebook(cell("1"), kernel=False), tmp_path)
    assert "names no kernel" in finding


def test_pictures_are_not_searched_for_words(tmp_path):
    picture = cell("1", output_type="display_data", data={"image/png": "AAAA/tmp" + "/FAST"})
    assert check(notebook(picture), tmp_path) == []


def test_committed_notebooks_are_fit():
    script = [sys.executable, str(TOP / "notebooks" / "build.py"), "check"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_running_keeps_outputs_and_drops_what_changes_with_every_run(tmp_path, monkeypatch):
    path = tmp_path / "made.ipynb"
    nbformat.write(notebook(cell("import edgelab", None), cell("6 * 7", None)), path)
    build.run(path)
    made = nbformat.read(path, as_version=4)
    assert made.cells[1].outputs[0].data["text/plain"] == "42"
    assert "execution" not in made.cells[1].metadata
    assert list(build.findings(path)) == []


def test_a_failing_notebook_is_left_as_it_was(tmp_path):
    path = tmp_path / "made.ipynb"
    nbformat.write(notebook(cell("1 / 0", None)), path)
    before = path.read_bytes()
    with pytest.raises(build.CellExecutionError):
        build.run(path)
    assert path.read_bytes() == before


def test_only_the_widgets_that_an_output_shows_are_kept():
    kind = "application/vnd.jupyter.widget-state+json"
    states = {
        "box": {"state": {"children": ["IPY_MODEL_bar"], "layout": "IPY_MODEL_look"}},
        "bar": {"state": {}},
        "look": {"state": {}},
        "progress": {"state": {"layout": "IPY_MODEL_other"}},
        "other": {"state": {}},
    }
    shown = {"application/vnd.jupyter.widget-view+json": {"model_id": "box"}}
    made = notebook(cell("box", output_type="display_data", data=shown))
    made.metadata.widgets = nbformat.from_dict({kind: {"state": states}})
    build.drop_hidden_widgets(made)
    assert set(made.metadata.widgets[kind]["state"]) == {"box", "bar", "look"}
