"""Runs of training that are stopped, killed, watched or that diverge: what is kept, and how they go on."""

import signal

import pytest
import torch
from torch import nn

from edgelab import training
from edgelab.model.losses import cross_entropy
from edgelab.storage.checkpoints import Checkpoint
from edgelab.training import TrainingError, Validation, batches, train

IDS = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(1))


class Line(nn.Module):
    """One weight; its loss is the squared distance to the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


def squared(model: Line, ids: torch.Tensor) -> torch.Tensor:
    return (model.weight - ids.float().mean()).square().sum()


def stopped_after(step: int) -> object:
    """Progress that sends this process the signal of Ctrl-C in the middle of the step that follows."""

    def progress(done: int, total: int) -> None:
        if done == step:
            signal.raise_signal(signal.SIGINT)

    return progress


@pytest.mark.parametrize("patience", [0, 2])
def test_a_run_that_was_stopped_ends_at_the_same_weights(new_model, tmp_path, patience):
    """Stopped twice, once before and once after the lowest look."""
    ids = torch.randint(2, 300, (6, 20), generator=torch.Generator().manual_seed(4))

    def run(kept: Checkpoint | None, progress=lambda done, total: None):
        model = new_model("llama", attention_dropout=0.1).train()  # random numbers are part of the state
        validation = Validation(ids[4:], {"validation_loss": cross_entropy}, 2, patience)
        curve = train(
            model, batches(ids[:4], 2, 0), cross_entropy, list(model.parameters()), steps=9, accumulate=2,
            learning_rate=0.01, validation=validation, checkpoint=kept, progress=progress, seed=5,
        )  # fmt: skip
        return model, [{name: value for name, value in point.items() if name != "seconds"} for point in curve]

    expected, points = run(None)
    kept = Checkpoint(tmp_path / "run")
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            run(kept, stopped_after(step))
        assert len(kept.load()[1]["curve"]) == step + 1  # the step that was under way is finished
    model, curve = run(kept)
    assert curve == points
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert kept.load() is None


def test_a_run_is_kept_every_so_often(tmp_path, monkeypatch):
    """A killed process loses what came after the last checkpoint. Steps take a second here."""
    now = iter(range(1000))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(now)))
    kept, model = Checkpoint(tmp_path / "run", every_s=2.0), Line()
    seen = []

    def progress(done: int, total: int) -> None:
        found = kept.load()
        seen.append(len(found[1]["curve"]) if found else 0)

    train(
        model, iter(lambda: IDS, None), squared, [model.weight], steps=5, checkpoint=kept, progress=progress
    )
    assert seen == [0, 2, 2, 4, 4]


def test_a_run_can_be_watched(new_model, tmp_path):
    """The points so far lie beside the checkpoint, also when it goes on; at its end nothing is left."""
    kept, seen = Checkpoint(tmp_path / "run"), []
    ids = torch.randint(2, 300, (4, 20), generator=torch.Generator().manual_seed(4))

    def follow(done: int, total: int) -> None:
        seen.append([point["step"] for point in kept.points()])

    def go(progress):
        model = new_model("llama")
        return train(
            model, batches(ids, 2, 0), cross_entropy, list(model.parameters()), steps=4, checkpoint=kept,
            progress=progress,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        go(stopped_after(2))
    assert [point["step"] for point in kept.points()] == [1, 2, 3]
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a line that is being written
    assert [point["step"] for point in kept.points()] == [1, 2, 3]
    go(follow)
    assert seen == [[1, 2, 3, 4]] and kept.points() == [] and not list(tmp_path.iterdir())


def test_a_run_that_diverges_keeps_what_was_kept_before(tmp_path, monkeypatch):
    """The loss is no number at step 4, long after the checkpoint of step 2."""
    now = iter(range(1000))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(now)))
    kept, model, steps = Checkpoint(tmp_path / "run", every_s=2.0), Line(), iter(range(10))

    def loss(model, ids):
        return squared(model, ids) * (float("nan") if next(steps) == 3 else 1)

    with pytest.raises(TrainingError, match="nan at step 4"):
        train(model, iter(lambda: IDS, None), loss, [model.weight], steps=6, checkpoint=kept)
    tensors, about = kept.load()
    assert len(about["curve"]) == 2 and torch.isfinite(tensors["0.weight"]).all()


def test_signals_are_heard_again_after_a_run():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    model = Line()
    train(model, iter(lambda: IDS, None), squared, [model.weight], steps=1)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
