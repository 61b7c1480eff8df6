"""Recovery: what has gone stays gone, what is left learns, and a stopped run goes on in the next process."""

import dataclasses
import json

import pytest
import torch

from edgelab import training
from edgelab.model.marks import marked, marks_of
from edgelab.recipes import Context, RecipeError, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.techniques.pruning.magnitude import Magnitude
from edgelab.techniques.pruning.store import Store
from edgelab.techniques.quantization.rtn import RoundToNearest, linear_layers
from edgelab.techniques.recovery import Recover

ROWS = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(5))
SHORT = Recover(steps=8, batch=4, length=24, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Random tokens in place of the training texts."""
    monkeypatch.setattr(training, "windows", lambda *arguments: ROWS)


def zeros(model) -> dict[str, int]:
    return {name: int((layer.weight == 0).sum()) for name, layer in linear_layers(model).items()}


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_zeros_stay_and_the_rest_learns(new_model, layout, loss):
    reference = new_model(layout)
    pruned = Magnitude(sparsity=0.5).apply(reference, Context())
    context = Context(reference=reference)
    recovered = dataclasses.replace(SHORT, loss=loss).apply(pruned, context)
    assert zeros(recovered) == zeros(pruned) and marks_of(recovered).pruned
    assert all(
        torch.equal(layer.weight == 0, linear_layers(pruned)[name].weight == 0)
        for name, layer in linear_layers(recovered).items()
    )
    assert not torch.equal(recovered.get_input_embeddings().weight, pruned.get_input_embeddings().weight)
    losses = [point["loss"] for point in context.record.curve]
    assert losses[-1] < losses[0] and context.record.train_tokens == 8 * 4 * 24


def test_a_model_without_zeros_of_pruning_has_none_held(new_model):
    """A weight that happens to be zero may move."""
    model = new_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
    one = dataclasses.replace(SHORT, loss="ce", steps=2)
    assert one.apply(model, Context()).model.layers[0].mlp.up_proj.weight[0, 0] != 0
    assert one.apply(marked(model, pruned=True), Context()).model.layers[0].mlp.up_proj.weight[0, 0] == 0


def test_fewer_layers_learn_from_all(new_model):
    reference = new_model("qwen3")
    shorter = parse("prune.layers:drop=1").apply(reference, Context())
    context = Context(reference=reference)
    recovered = SHORT.apply(shorter, context)
    assert len(recovered.model.layers) == len(reference.model.layers) - 1
    assert context.record.curve[-1]["loss"] < context.record.curve[0]["loss"]


@pytest.mark.parametrize("after", [RoundToNearest(bits=4, group_size=32), None])
def test_stored_layers_are_refused(new_model, after):
    model = new_model("llama")
    if after is None:
        model = Magnitude(sparsity=0.5).apply(model, Context())
        after = Store()
    with pytest.raises(
        RecipeError, match=r"recover trains float weights, and .* put it before quantizing and"
    ):
        SHORT.apply(after.apply(model, Context()), Context(reference=model))


def test_sixteen_bits_are_too_coarse_to_train_in(new_model):
    model = parse("quantize.bf16").apply(new_model("llama"), Context())
    with pytest.raises(
        RecipeError, match="recover trains in float32, and the model is in bfloat16, whose steps"
    ):
        SHORT.apply(model, Context(reference=model))


def test_what_the_loss_needs(new_model):
    model = new_model("llama")
    with pytest.raises(RecipeError, match="recover needs the reference for its loss; use loss=ce"):
        SHORT.apply(model, Context())
    with pytest.raises(
        RecipeError, match="predicts 300 tokens and the reference 200, which have no divergence"
    ):
        SHORT.apply(model, Context(reference=new_model("llama", vocab_size=200)))


def test_a_stopped_run_goes_on_where_it_was(new_model, home):
    """The model has an address here, as it has on the road: the second call finds the checkpoint of the first."""
    reference = new_model("llama")
    pruned = Magnitude(sparsity=0.5).apply(reference, Context())

    def run(stop_at: int | None = None, stage: str = "a"):
        def progress(done: int, total: int) -> None:
            seen.append(done)
            if done == stop_at:
                training.signal.raise_signal(training.signal.SIGINT)

        seen: list[int] = []
        context = Context(progress=progress, reference=reference, stage=stage)
        return SHORT.apply(pruned, context), seen

    expected, _ = run(stage="")
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=3)
    found, seen = run()
    assert seen == [5, 6, 7, 8]
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert not list((home / "training").iterdir())


def test_what_a_stopped_run_has_cost_is_counted(tiny, home, monkeypatch):
    """A checkpoint of a run that had taken 1,000 s when it was stopped."""
    recipe, source = parse("recover:loss=ce,steps=3,batch=2,length=24"), resolve(str(tiny))

    def build(stop: bool) -> float:
        def progress(done: int, total: int) -> None:
            if stop and (done, total) == (1, 3):
                training.signal.raise_signal(training.signal.SIGINT)

        return variants.read_about(variants.build(recipe, source, 0, progress))["apply_s"]

    with pytest.raises(KeyboardInterrupt):
        build(stop=True)
    (folder,) = (path for path in (home / "training").iterdir() if path.is_dir())
    state = json.loads((folder / "state.json").read_text())
    state["curve"][-1]["seconds"] += 1000
    (folder / "state.json").write_text(json.dumps(state))
    assert 1000 < build(stop=False) < 1100


def test_only_the_same_run_goes_on():
    places = {
        dataclasses.replace(SHORT, **changed).checkpoint(Context(seed=seed, stage=stage))
        for changed in ({}, {"steps": 16}, {"learning_rate": 0.02})
        for seed in (0, 1)
        for stage in ("a", "b")
    }
    assert len(places) == 12 and SHORT.checkpoint(Context()) is None
