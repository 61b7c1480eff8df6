"""The training loop: the schedule by hand, repeatable runs, and looks at held-out text."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from edgelab import assets, corpora, training
from edgelab.corpora import CorpusError
from edgelab.errors import EdgeLabError
from edgelab.model.losses import cross_entropy
from edgelab.recipes import Context
from edgelab.training import (
    Trained,
    TrainingError,
    Validation,
    batches,
    learning_rate_factor,
    train,
    windows,
)

IDS = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def texts(home):
    """Small stand-ins for the embedded texts; every line says which text it is from and where it stands."""
    folder = home / "assets" / "texts"
    folder.mkdir(parents=True)
    for name in corpora.EMBEDDED:
        lines = {"wiki": 13_000, "web": 10_500}.get(name, 75)
        (folder / f"{name}.txt").write_text(
            "".join(f"{name[0]}{n:038d}\n" for n in range(lines)), encoding="utf-8"
        )
    assets._record(home / "assets", [f"texts/{name}.txt" for name in corpora.EMBEDDED])


def test_the_learning_rate_by_hand():
    assert [learning_rate_factor(done, 0.2) for done in (0.0, 0.1, 0.2)] == [0.0, 0.5, 1.0]
    assert learning_rate_factor(0.6, 0.2) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.2) == pytest.approx(0.0)
    assert learning_rate_factor(0.0, 0.0) == 1.0


def test_an_epoch_holds_every_window_once_and_the_seed_decides_the_order():
    rows = torch.arange(12).view(6, 2)
    stream = batches(rows, 2, seed=3)
    first, second = (torch.cat([next(stream) for _ in range(3)]) for _ in range(2))
    assert sorted(first[:, 0].tolist()) == sorted(second[:, 0].tolist()) == rows[:, 0].tolist()
    assert not torch.equal(first, second)
    again = batches(rows, 2, seed=3)
    assert torch.equal(torch.cat([next(again) for _ in range(3)]), first)
    other = batches(rows, 2, seed=4)
    assert not torch.equal(torch.cat([next(other) for _ in range(3)]), first)
    odd = batches(rows, 4, seed=0)
    assert [len(next(odd)) for _ in range(3)] == [4, 4, 4]


def test_too_few_windows_for_a_batch():
    with pytest.raises(
        TrainingError, match="has 1 windows, fewer than a batch of 4; use a shorter length or a smaller batch"
    ):
        next(batches(torch.zeros(1, 8, dtype=torch.int64), 4, 0))


def test_training_windows_are_no_text_that_is_evaluated_or_calibrated_on(texts, byte_tokenizer):
    """Every line of the stand-ins is unique, so that a line seen twice would be an overlap."""
    rows = Trained(length=128)._rows(byte_tokenizer)[0]
    assert rows.shape[1] == 128 and rows.dtype == torch.int64
    trained = {
        line for row in rows for line in byte_tokenizer.decode(row.tolist()).splitlines()[1:-1]
    }  # whole lines only
    assert {line[0] for line in trained} == {"w", "s"} and len(trained) > 400
    for name, split in corpora.SPLITS:
        if split != "training":
            assert not trained & {line.strip() for line in corpora.load(name, split)["text"]}
    with pytest.raises(CorpusError, match="'technical' is not for training"):
        windows(byte_tokenizer, 64, "technical")


class Line(nn.Module):
    """One weight; its loss is the squared distance to the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))


def squared(model: Line, ids: torch.Tensor) -> torch.Tensor:
    return (model.weight - ids.float().mean()).square().sum()


def run(steps: int = 5, **settings: object) -> tuple[Line, list[dict[str, float]]]:
    model, ids = Line(), torch.full((2, 4), 3)
    return model, train(model, iter(lambda: ids, None), squared, [model.weight], steps=steps, **settings)


def test_the_loop_equals_adamw_by_hand():
    """AdamW written out for one weight: warmup and cosine at the middle of each step, clipping to norm 1."""
    model, curve = run(4, learning_rate=0.1, warmup=0.25, weight_decay=0.5)
    weight = mean = square = 0.0
    losses = []
    for step in range(4):
        rate = 0.1 * learning_rate_factor((step + 0.5) / 4, 0.25)
        losses.append(3 * (weight - 3) ** 2)
        gradient = 2 * (weight - 3)
        gradient /= max(1.0, math.sqrt(3) * abs(gradient))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        weight *= 1 - rate * 0.5
        weight -= (
            rate * (mean / (1 - 0.9 ** (step + 1))) / (math.sqrt(square / (1 - 0.95 ** (step + 1))) + 1e-8)
        )
    torch.testing.assert_close(model.weight.detach(), torch.full((3,), weight), rtol=1e-4, atol=1e-6)
    assert [point["loss"] for point in curve] == pytest.approx(losses, rel=1e-4)
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    assert [point["tokens"] for point in curve] == [8, 16, 24, 32]
    times = [point["seconds"] for point in curve]
    assert times == sorted(times) and times[0] > 0


def test_progress_counts_steps():
    seen = []
    run(3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_clock_stops_a_run(monkeypatch):
    """Steps of one second: the sixth would end after 5.5 s. The rate follows the clock to its end."""
    now = iter(range(1000))
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(now)))
    seen = []
    _, curve = run(2, seconds=5.5, progress=lambda done, total: seen.append((done, total)))
    assert [point["seconds"] for point in curve] == [1, 2, 3, 4, 5]
    assert seen == [(second, 5) for second in range(1, 6)]


def test_fast_takes_few_steps_and_the_same_road(monkeypatch):
    monkeypatch.setenv("EDGELAB_FAST", "1")
    assert len(run(100)[1]) == training.FAST_STEPS


def test_a_run_that_diverges_says_so():
    model = Line()
    with pytest.raises(TrainingError, match=r"loss is nan at step 1; use a learning_rate below 0\.5"):
        train(
            model,
            iter(lambda: IDS, None),
            lambda model, ids: model.weight.sum() * math.nan,
            [model.weight],
            steps=2,
            learning_rate=0.5,
        )


@pytest.fixture
def settings(monkeypatch):
    """Settings of a short run on two windows that repeat."""
    monkeypatch.setattr(training, "windows", lambda *arguments: IDS)
    return Trained(steps=15, batch=3, length=20, learning_rate=0.01)


def test_a_tiny_model_learns_and_the_seed_makes_it_repeatable(new_model, settings):
    def trained(seed: int):
        model, context = new_model("llama"), Context(seed=seed)
        state = torch.get_rng_state()
        settings.fit(model, cross_entropy, list(model.parameters()), context, half=False)
        assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are its own
        return model, context.record

    model, record = trained(0)
    losses = [point["loss"] for point in record.curve]
    assert losses[-1] < 0.5 * losses[0]
    assert record.train_tokens == 15 * IDS.numel() == record.curve[-1]["tokens"]
    again, _ = trained(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    other, _ = trained(1)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_a_second_run_adds_to_the_record(new_model, settings):
    model, context = new_model("llama"), Context()
    for _ in range(2):
        settings.fit(model, cross_entropy, [model.lm_head.weight], context, half=False)
    assert context.record.train_tokens == 2 * 15 * IDS.numel()
    assert len(context.record.curve) == 30


def test_bfloat16_products_give_nearly_the_same_loss(new_model, settings):
    losses = []
    for half in (False, True):
        model, context = new_model("llama"), Context()
        slow = dataclasses.replace(settings, learning_rate=1e-3)
        slow.fit(model, cross_entropy, list(model.parameters()), context, half)
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        losses.append([point["loss"] for point in context.record.curve])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"steps": 0},
            "at least 1 step of 1 window of 2 tokens, not steps=0,batch=4,accumulate=1,length=256",
        ),
        ({"batch": 0}, "not steps=80,batch=0,accumulate=1,length=256"),
        ({"length": 1}, "not steps=80,batch=4,accumulate=1,length=1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0,minutes=0.0 should be above 0 and at least 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"minutes": -1.0}, "minutes=-1.0 should be"),
        ({"accumulate": 0}, "accumulate=0,length=256"),
        ({"patience": 2}, "validate=0,patience=2 should be at least 0, and patience needs looks"),
        ({"text": "wiki"}, "text=wiki is a corpus, part of which is for evaluation; use corpus=wiki"),
        ({"validate": -1}, "validate=-1,patience=0 should be at least 0"),
        (
            {"corpus": "wiki/wob"},
            "There is no corpus 'wob' for training; use one of wiki, web",
        ),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(EdgeLabError, match=message):
        Trained(**values)


def test_windows_longer_than_the_model_can_see(new_model):
    model = new_model("llama")
    with pytest.raises(TrainingError, match="length=5000 is longer than the 4096 tokens the model can see"):
        Trained(length=5000).fit(model, cross_entropy, list(model.parameters()), Context(), half=False)


def test_accumulated_batches_are_one_large_one(new_model):
    """Two batches of two windows move the weights as one of four does."""
    rows, found = torch.randint(2, 300, (4, 20), generator=torch.Generator().manual_seed(3)), []
    for size, accumulate in ((4, 1), (2, 2)):
        model = new_model("llama")
        data = iter(rows.split(size) * 3)
        curve = train(
            model,
            data,
            cross_entropy,
            list(model.parameters()),
            steps=3,
            accumulate=accumulate,
            learning_rate=1e-3,
        )
        found.append((curve, model.model.layers[0].mlp.up_proj.weight.detach()))
    (whole, weight), (pieces, again) = found
    assert [point["tokens"] for point in whole] == [point["tokens"] for point in pieces] == [80, 160, 240]
    assert [point["loss"] for point in pieces] == pytest.approx([point["loss"] for point in whole], rel=1e-5)
    torch.testing.assert_close(again, weight, rtol=1e-4, atol=1e-5)


def test_masked_weights_stay_zero_and_the_others_move():
    model = Line()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([0.0, 2.0, -1.0]))
    start = model.weight.detach().clone()
    train(
        model, iter(lambda: IDS, None), squared, [model.weight],
        steps=4, learning_rate=0.1, weight_decay=0.1, masks={0: model.weight.detach() != 0},
    )  # fmt: skip
    assert model.weight[0] == 0 and (model.weight[1:] != start[1:]).all()
    train(model, iter(lambda: IDS, None), squared, [model.weight], steps=1, learning_rate=0.1)
    assert model.weight[0] != 0  # the mask is gone with its run


def test_recomputed_activations_give_the_same_weights(new_model, settings):
    weights = []
    for recompute in (False, True):
        model = new_model("llama")
        one = dataclasses.replace(settings, activation_checkpointing=recompute, steps=3)
        one.fit(model, cross_entropy, list(model.parameters()), Context(), half=False)
        assert not any("forward" in block.__dict__ for block in model.model.layers)
        weights.append([weight.detach() for weight in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# Held-out text


def test_a_look_is_the_mean_over_windows_whatever_the_batch(new_model):
    model = new_model("llama")
    with torch.no_grad():
        expected = sum(cross_entropy(model, row[None]).item() for row in IDS) / 3
    for size in (1, 2, 3):
        found = Validation(IDS, {"validation_nll": cross_entropy}).look(model, size)
        assert found == {"validation_nll": pytest.approx(expected, rel=1e-5)}


def looking(
    values: list[float], every: int, patience: int, steps: int = 9
) -> tuple[Line, list[dict[str, float]]]:
    """A run whose looks find these values."""
    model, left = Line(), iter(values)
    validation = Validation(IDS, {"validation_loss": lambda *_: torch.tensor(next(left))}, every, patience)
    data = iter(lambda: IDS, None)
    return model, train(
        model, data, squared, [model.weight], steps=steps, learning_rate=0.1, validation=validation
    )


def test_looks_come_every_so_many_steps_and_at_the_end():
    _, curve = looking([5.0, 4.0, 3.0], every=2, patience=0, steps=5)
    assert {point["step"]: point["validation_loss"] for point in curve if "validation_loss" in point} == {
        2: 5.0, 4: 4.0, 5: 3.0
    }  # fmt: skip
    _, curve = looking([1.0], every=0, patience=0, steps=3)
    assert [point.get("validation_loss") for point in curve] == [None, None, 1.0]


def test_patience_stops_a_run_and_takes_its_best_weights_back():
    """Looks after 1, 2, 3 and 4 steps find 5, 3, 4, 6: the lowest is the second, and two looks later the run ends."""
    model, curve = looking([5.0, 3.0, 4.0, 6.0], every=1, patience=2)
    assert [point["validation_loss"] for point in curve] == [5.0, 3.0, 4.0, 6.0]
    best, data = Line(), iter(lambda: IDS, None)

    def stop_after_two(done: int, total: int) -> None:
        if done == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(best, data, squared, [best.weight], steps=9, learning_rate=0.1, progress=stop_after_two)
    assert torch.equal(model.weight, best.weight)


def test_the_readers_own_text_keeps_its_tail_for_looks(tmp_path, byte_tokenizer):
    file = tmp_path / "mine.txt"
    file.write_text("".join(f"{n:09d}\n" for n in range(100)))  # 1,000 bytes, as many tokens
    trained, held_out = Trained(text=str(file), length=20)._rows(byte_tokenizer)
    lines = [byte_tokenizer.decode(rows.flatten().tolist()).split() for rows in (trained, held_out)]
    assert [len(rows) for rows in (trained, held_out)] == [45, 5]
    assert [int(line) for line in lines[0]] == list(range(90)) and int(lines[1][0]) == 90


def test_a_file_is_named_by_its_content(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one")
    before = Trained(text=str(file)).reads()
    file.write_text("other")
    assert before != Trained(text=str(file)).reads() and before[0].startswith("mine.txt-")
    assert Trained().reads() == []
    with pytest.raises(TrainingError, match=r"text=.*nope\.txt is no file; give a UTF-8 text file"):
        Trained(text=str(tmp_path / "nope.txt")).reads()


def test_no_look_no_text_held_out(texts, byte_tokenizer):
    rows, held_out = Trained(length=64)._rows(byte_tokenizer)
    fewer, looked_at = Trained(length=64, validate=5)._rows(byte_tokenizer)
    assert len(held_out) == 0 and len(looked_at) > 0 and len(fewer) + len(looked_at) == len(rows)
    assert not {tuple(row) for row in fewer.tolist()} & {tuple(row) for row in looked_at.tolist()}
