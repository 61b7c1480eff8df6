"""Files of others: they register what edgelab lists and reads, and say in one sentence what is wrong with them."""

import os
import sys

import pytest

from edgelab import plugins, recipes
from edgelab.plugins import PluginError

TECHNIQUE = """
from __future__ import annotations
from dataclasses import dataclass
from edgelab.recipes import register

@register("test.{name}", kept=True)
@dataclass(frozen=True)
class Mine:
    '''A technique of a stranger.'''
    share: float = 0.5

    def apply(self, model, context):
        return model
"""


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """A home of one's own; what a test has registered goes with it."""
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGELAB_PLUGINS", raising=False)
    recipes.techniques()
    before = dict(recipes.TECHNIQUES)
    yield
    recipes.TECHNIQUES.clear()
    recipes.TECHNIQUES.update(before)
    for name in [name for name in sys.modules if name.startswith("edgelab_plugin_")]:
        del sys.modules[name]


def test_a_technique_of_a_stranger_is_read_and_listed(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text(TECHNIQUE.format(name="mine"))
    monkeypatch.setenv("EDGELAB_PLUGINS", str(file))
    assert str(recipes.parse("test.mine:share=0.25")) == "test.mine:share=0.25"
    assert recipes.catalogue().techniques["test.mine"].kept
    assert recipes.techniques()["test.mine"].__doc__ == "A technique of a stranger."


def test_the_folder_in_the_home_is_the_default(tmp_path):
    (tmp_path / "home" / "plugins").mkdir(parents=True)
    (tmp_path / "home" / "plugins" / "mine.py").write_text(TECHNIQUE.format(name="of_home"))
    assert "test.of_home" in recipes.techniques()


def test_each_file_is_imported_once_and_new_ones_later(tmp_path, monkeypatch):
    first, folder = tmp_path / "first.py", tmp_path / "more"
    count = "import pathlib\nwith pathlib.Path(__file__ + '.txt').open('a') as file: file.write('x')\n"
    folder.mkdir()
    first.write_text(count)
    (folder / "first.py").write_text(count)  # of the same name elsewhere
    monkeypatch.setenv("EDGELAB_PLUGINS", str(first))
    plugins.load()
    monkeypatch.setenv("EDGELAB_PLUGINS", os.pathsep.join([str(first), str(folder)]))
    plugins.load()
    plugins.load()
    assert [(place / "first.py.txt").read_text() for place in (tmp_path, folder)] == ["x", "x"]
    assert plugins.files() == [first, folder / "first.py"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("1 +", "SyntaxError: invalid syntax"),
        (
            TECHNIQUE.replace("test.{name}", "quantize.rtn"),
            "RecipeError: 'quantize.rtn' is registered already",
        ),
    ],
)
def test_a_file_that_fails_is_named(text, reason, tmp_path, monkeypatch):
    file = tmp_path / "broken.py"
    file.write_text(text)
    monkeypatch.setenv("EDGELAB_PLUGINS", str(file))
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            recipes.techniques()
        assert str(caught.value).startswith(f"{file} cannot be imported ({reason}")
    assert str(recipes.parse("quantize.bf16")) == "quantize.bf16"


def test_a_place_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELAB_PLUGINS", str(tmp_path / "absent"))
    with pytest.raises(PluginError, match=r"^EDGELAB_PLUGINS names .*absent, which does not exist\.$"):
        plugins.load()
