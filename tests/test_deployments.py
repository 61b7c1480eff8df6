"""Deployments: the engines on one device, described without importing one of them."""

import subprocess
import sys
from importlib import import_module

import pytest

from edgelab import recipes, runtimes
from edgelab.deployments.hybrid import MOST_TEMPERATURE, CutError, Split
from edgelab.deployments.hybrid.answering import start
from edgelab.deployments.one_device import OneDevice
from edgelab.deployments.partition.stage import Stage
from edgelab.lab.question import Settings, ask
from edgelab.reference import load_tokenizer, resolve
from edgelab.storage import variants

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


@pytest.mark.parametrize("temperature", ["-0.5", "0.0009", "2.5"])
def test_a_temperature_that_the_server_would_refuse_is_none(temperature):
    with pytest.raises(recipes.RecipeError, match=r"should be 0\.001 to 2, or 0 for the likeliest token\."):
        recipes.parse(f"none @ speculative:temperature={temperature}")


@pytest.mark.parametrize("way", ["cloud", "cascade", "speculative", "redact", "split"])
def test_a_way_of_sharing_requests_is_no_engine(way, tmp_path):
    with pytest.raises(
        runtimes.RuntimeRefused, match=f"^@ {way} shares .* is no engine; give one, such as @ torch"
    ):
        runtimes.load(way, tmp_path)


@pytest.mark.parametrize("way", ["cloud", "cascade", "speculative", "redact", "split"])
def test_a_deadline_that_no_clock_counts_to_is_none(way):
    assert recipes.parse(f"none @ {way}:deadline_s=86400").deployment.deadline_s == 86_400
    for seconds in ("0", "-1", "86401", "1e10"):
        with pytest.raises(recipes.RecipeError, match=r"should be above 0 and at most 86400, a day\.$"):
            recipes.parse(f"none @ {way}:deadline_s={seconds}")


@pytest.mark.parametrize("way", ["cloud", "cascade", "speculative", "redact"])
def test_an_edge_that_is_no_engine_is_refused_as_it_is_read(way):
    assert recipes.parse(f"none @ {way}:edge=llamacpp").deployment.edge == "llamacpp"
    for edge, said in (
        ("litrt", r"^Unknown deployment 'litrt'; did you mean litert"),
        ("cascade", r"^edge=cascade shares requests and is no engine; give one, such as edge=torch\.$"),
        ('""', "deployment"),
    ):
        with pytest.raises(recipes.RecipeError, match=said):
            recipes.parse(f"none @ {way}:edge={edge}")


def test_a_cut_that_a_model_has_not_is_refused_before_anything_is_made(tiny):
    """By the plan, which --dry-run prints; where layers were taken out, before the first part is loaded."""
    (question,) = ask(["none @ split:cut=2"], Settings(model=str(tiny)), interleave=False)
    assert question.recipe.deployment.cut == 2
    with pytest.raises(CutError, match=r"^cut=3 is none of a model of 2 layers; give the number of layers"):
        ask(["none @ split:cut=3"], Settings(model=str(tiny)), interleave=False)


def test_a_cut_beyond_the_layers_that_are_left_is_refused_before_a_part_is_loaded(tiny, monkeypatch):
    monkeypatch.setattr(Stage, "load", lambda *given: pytest.fail("nothing is loaded"))
    source = resolve(str(tiny))
    folder = variants.build(recipes.parse("prune.layers:keep=1"), source, 0, lambda done, total: None)
    with pytest.raises(CutError, match=r"^cut=2 is none of a model of 1 layers"):
        start(Split(link="ethernet", cut=2), folder, load_tokenizer(source), str(tiny), 0)


@pytest.mark.parametrize("temperature", [0, 0.001, 1.0, 2.0])
def test_a_temperature_that_the_server_takes(temperature):
    from pydantic import ValidationError

    from edgelab.deployments.hybrid.server.messages import VerifyRequest

    assert (
        recipes.parse(f"none @ speculative:temperature={temperature}").deployment.temperature == temperature
    )
    asked = {"conversation": "conversation", "step": 0, "draft": [], "prompt": [1]}
    assert VerifyRequest(**asked, temperature=float(temperature)).temperature == temperature
    with pytest.raises(ValidationError):
        VerifyRequest(**asked, temperature=MOST_TEMPERATURE + 0.001)


def test_describing_them_imports_no_torch():
    code = "import sys; from edgelab import parse; print(parse('none @ llamacpp'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none @ llamacpp False"
