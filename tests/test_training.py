"""The training loop and its losses: slices against plain autograd, the schedule by hand, repeatable runs."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgelab import assets, corpora, training
from edgelab.corpora import CorpusError
from edgelab.recipes import Context
from edgelab.training import (
    Divergence,
    Trained,
    TrainingError,
    batches,
    cross_entropy,
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


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def plain_cross_entropy(model, ids):
    logits = model(ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def plain_divergence(model, reference, ids):
    log_p = torch.log_softmax(model(ids).logits, -1)
    log_r = torch.log_softmax(reference(ids).logits.detach(), -1)
    return functional.kl_div(log_p, log_r, log_target=True, reduction="none").sum(-1).mean()


@pytest.mark.parametrize(
    "size", [7, 20, 1000]
)  # slices that do not divide, cross windows, and hold everything
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_slices_equal_all_logits_at_once(new_model, layout, loss, size, monkeypatch):
    """Loss and the gradients of every parameter, heads with biases and tied heads among them."""
    monkeypatch.setattr(training, "SLICE", size)
    model, reference = new_model(layout), new_model(layout)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    sliced = cross_entropy(model, IDS) if loss == "ce" else Divergence(reference)(model, IDS)
    plain = plain_cross_entropy(model, IDS) if loss == "ce" else plain_divergence(model, reference, IDS)
    torch.testing.assert_close(sliced, plain, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(model, sliced), gradients(model, plain)
    assert ours.keys() == theirs.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert not any(weight.grad is not None for weight in reference.parameters())


def test_slices_with_a_softcap_equal_all_logits_at_once(new_model, monkeypatch):
    monkeypatch.setattr(training, "SLICE", 16)
    model = new_model("gemma2", head_dim=16, final_logit_softcapping=2.0)
    torch.testing.assert_close(
        cross_entropy(model, IDS), plain_cross_entropy(model, IDS), rtol=1e-5, atol=1e-6
    )


def test_a_frozen_head_gets_no_gradient(new_model):
    model = new_model("phi")
    model.lm_head.weight.requires_grad_(False)
    found = gradients(model, cross_entropy(model, IDS))
    assert "lm_head.weight" not in found and "lm_head.bias" in found and "model.embed_tokens.weight" in found


def test_divergence_of_a_model_to_itself_is_zero(new_model):
    model = new_model("llama")
    assert abs(Divergence(model)(model, IDS).item()) < 1e-6


def test_two_tokens_by_hand():
    """Logits (0, log 3): p = (1/4, 3/4). The reference is even: KL = log 2 - log 3 / 2, gradient p - 1/2."""
    logits = torch.tensor([[0.0, math.log(3)]])
    loss, gradient = training.divergence_score(lambda where: torch.zeros(1, 2), logits, slice(0, 1))
    torch.testing.assert_close(loss, torch.tensor([math.log(2) - math.log(3) / 2]))
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.25]]))
    loss, gradient = training.next_token_score(torch.tensor([9, 1]), logits, slice(1, 2))
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3)]))
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25]]))


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
    with pytest.raises(TrainingError, match="has 1 windows, fewer than a batch of 4; use a shorter length"):
        next(batches(torch.zeros(1, 8, dtype=torch.int64), 4, 0))


def test_training_windows_are_no_text_that_is_evaluated_or_calibrated_on(texts, byte_tokenizer):
    """Every line of the stand-ins is unique, so that a line seen twice would be an overlap."""
    rows = windows(byte_tokenizer, 128)
    assert rows.shape[1] == 128 and rows.dtype == torch.int64
    trained = {
        line for row in rows for line in byte_tokenizer.decode(row.tolist()).splitlines()[1:-1]
    }  # whole lines only
    assert {line[0] for line in trained} == {"w", "s"} and len(trained) > 400
    for name, split in corpora.SPLITS:
        if split != "training":
            assert not trained & {line.strip() for line in corpora.load(name, split)["text"]}
    with pytest.raises(CorpusError, match="'code' is not for training"):
        windows(byte_tokenizer, 64, "wiki/code")


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
        ({"steps": 0}, "at least 1 step of 1 window of 2 tokens, not steps=0,batch=4,length=256"),
        ({"batch": 0}, "not steps=80,batch=0,length=256"),
        ({"length": 1}, "not steps=80,batch=4,length=1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0,minutes=0.0 should be above 0 and at least 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"minutes": -1.0}, "minutes=-1.0 should be"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(TrainingError, match=message):
        Trained(**values)


def test_windows_longer_than_the_model_can_see(new_model):
    model = new_model("llama")
    with pytest.raises(TrainingError, match="length=5000 is longer than the 4096 tokens the model can see"):
        Trained(length=5000).fit(model, cross_entropy, list(model.parameters()), Context(), half=False)
