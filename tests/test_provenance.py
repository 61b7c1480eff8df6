"""The commit of a row is that of edgelab's own checkout, and of no other repository around the package."""

import importlib
import subprocess
from pathlib import Path

import pytest

provenance = importlib.import_module("edgelab.ledger.provenance")  # the package gives a function this name


def git(folder: Path, *words: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", folder, *named, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def around(tmp_path, monkeypatch):
    """`around(project)`: puts the package into a repository of that project, and gives its commit."""

    def make(project: str | None) -> str:
        package = tmp_path / "edgelab" / "ledger"
        package.mkdir(parents=True)
        monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
        if project is not None:
            (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
        git(tmp_path, "init", "--quiet")
        git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "one")
        return git(tmp_path, "rev-parse", "--short=12", "HEAD")

    return make


def test_the_own_checkout(around, monkeypatch, tmp_path):
    sha = around("edgelab")
    assert provenance._git_sha.__wrapped__() == sha
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert provenance._git_sha.__wrapped__() == sha


@pytest.mark.parametrize("project", ["theirs", None])
def test_another_repository_around_an_installed_package(project, around):
    around(project)
    assert provenance._git_sha.__wrapped__() is None


def test_a_repository_further_up(around, tmp_path, monkeypatch):
    around("edgelab")
    installed = tmp_path / ".venv" / "lib" / "edgelab" / "ledger"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance._git_sha.__wrapped__() is None
