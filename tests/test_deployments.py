"""Deployments: the engines on one device, described without importing one of them."""

import subprocess
import sys
from importlib import import_module

import pytest

from edgelab import recipes
from edgelab.deployments.one_device import OneDevice

ENGINES = {name: kind for name, kind in recipes.deployments().items() if issubclass(kind, OneDevice)}


def test_the_engines():
    assert list(ENGINES) == [
        "torch", "simulated", "compiled", "onnxruntime", "openvino", "llamacpp", "executorch", "litert",
    ]  # fmt: skip
    assert [name for name, kind in ENGINES.items() if kind.in_torch] == ["torch", "simulated", "compiled"]
    assert [name for name, kind in ENGINES.items() if not kind.timed] == ["simulated"]


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_names_the_class_that_runs_it(name):
    module, _, runtime = ENGINES[name].engine.partition(":")
    assert isinstance(getattr(import_module(module), runtime), type)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_a_recipe(name):
    recipe = recipes.parse(f"none @ {name}")
    assert recipe.deployment == ENGINES[name]() and recipe.runtime == name
    assert (
        bool(recipe.deployment.packages) == bool(recipe.deployment.extra) == (not recipe.deployment.in_torch)
    )


def test_describing_them_imports_no_torch():
    code = "import sys; from edgelab import parse; print(parse('none @ llamacpp'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none @ llamacpp False"
