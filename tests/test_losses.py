"""Losses in slices: against plain autograd over all logits at once, and two tokens by hand."""

import math

import pytest
import torch
from torch.nn import functional

from edgelab.model import losses
from edgelab.model.divergences import DIVERGENCES, kl
from edgelab.model.losses import Divergence, cross_entropy, live

IDS = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(1))


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
    monkeypatch.setattr(losses, "SLICE", size)
    monkeypatch.setattr(losses, "SLICE_TRAINED", size)
    model, reference = new_model(layout), new_model(layout)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    sliced = cross_entropy(model, IDS) if loss == "ce" else Divergence(live(reference))(model, IDS)
    plain = plain_cross_entropy(model, IDS) if loss == "ce" else plain_divergence(model, reference, IDS)
    torch.testing.assert_close(sliced, plain, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(model, sliced), gradients(model, plain)
    assert ours.keys() == theirs.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert not any(weight.grad is not None for weight in reference.parameters())


def test_slices_with_a_softcap_equal_all_logits_at_once(new_model, monkeypatch):
    monkeypatch.setattr(losses, "SLICE_TRAINED", 16)
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
    assert abs(Divergence(live(model))(model, IDS).item()) < 1e-6


def test_two_tokens_by_hand():
    """Logits (0, log 3): p = (1/4, 3/4). The reference is even: KL = log 2 - log 3 / 2, gradient p - 1/2."""
    logits = torch.tensor([[0.0, math.log(3)]])
    loss, gradient = losses.divergence_score(
        lambda where: torch.full((1, 2), 0.5).log(), kl, 1.0, logits, slice(0, 1)
    )
    torch.testing.assert_close(loss, torch.tensor([math.log(2) - math.log(3) / 2]))
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, 0.25]]))
    loss, gradient = losses.next_token_score(torch.tensor([9, 1]), logits, slice(1, 2))
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3)]))
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25]]))


@pytest.mark.parametrize("loss", [cross_entropy, "kl"])
def test_a_look_without_gradients_gives_the_same_value(new_model, loss, monkeypatch):
    monkeypatch.setattr(losses, "SLICE", 16)
    model = new_model("llama")
    loss = Divergence(live(new_model("qwen3"))) if loss == "kl" else loss
    with torch.no_grad():
        looked = loss(model, IDS)
    torch.testing.assert_close(looked, loss(model, IDS).detach())


def test_a_frozen_head_is_cast_once_and_is_itself_again(new_model, monkeypatch):
    """Under autocast the slices read one copy in bfloat16, and give what casting for each slice gives."""
    monkeypatch.setattr(losses, "SLICE", 16)
    model = new_model("llama")
    head = model.lm_head.weight
    with torch.autocast("cpu", torch.bfloat16):
        expected = cross_entropy(model, IDS)  # a head that is trained
        head.requires_grad_(False)
        found = cross_entropy(model, IDS)
    assert model.lm_head.weight is head and head.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def softened(model, reference, ids, name, temperature, hard):
    """A mixed loss over all logits at once, by autograd."""
    given, targets = ids[:, :-1], ids[:, 1:].flatten()
    logits = model(given).logits.flatten(0, 1)
    p = (reference(given).logits.detach().flatten(0, 1) / temperature).log_softmax(-1)
    soft = DIVERGENCES[name](0.3)(p, (logits / temperature).log_softmax(-1))[0].mean() * temperature**2
    return (1 - hard) * soft + hard * functional.cross_entropy(logits, targets)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("temperature", "hard"), [(1.0, 0.25), (3.0, 0.5)])
def test_slices_of_a_mixed_loss_equal_all_logits_at_once(new_model, name, temperature, hard, monkeypatch):
    monkeypatch.setattr(losses, "SLICE_TRAINED", 16)
    model, reference = new_model("llama"), new_model("phi")
    loss = Divergence(live(reference), DIVERGENCES[name](0.3), temperature, hard=hard)
    sliced, plain = loss(model, IDS), softened(model, reference, IDS, name, temperature, hard)
    torch.testing.assert_close(sliced, plain, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(model, sliced), gradients(model, plain)
    for which, gradient in theirs.items():
        torch.testing.assert_close(ours[which], gradient, rtol=1e-3, atol=1e-5)


def test_a_hot_divergence_tends_to_half_the_variance_of_the_difference():
    teacher, logits = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, -1.0]])

    def at(temperature: float) -> float:
        log_p = (teacher / temperature).double().log_softmax(-1)
        found, _ = losses.divergence_score(lambda where: log_p, kl, temperature, logits.double(), slice(0, 1))
        return found.item()

    assert at(1000.0) == pytest.approx(0.7783, abs=1e-4)
    assert (teacher - logits).var(correction=0).item() / 2 == pytest.approx(0.7778, abs=1e-4)


def test_difference_of_logits_by_hand():
    loss, gradient = losses.logit_score(
        lambda where: torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), slice(0, 1)
    )
    assert loss.tolist() == [5.0] and gradient.tolist() == [[1.0, 3.0]]
