"""Sensitivity: measures worked by hand, gradients against those of the whole model, predicted against measured."""

import copy

import numpy as np
import pytest
import torch

from edgelab.model import blocks as structure
from edgelab.recipes import Context
from edgelab.techniques import sensitivity as measuring
from edgelab.techniques.quantization.rtn import linear_layers, quantize_affine
from edgelab.techniques.sensitivity import MEASURES, fisher_cost, fisher_costs, kl_costs


@pytest.fixture
def tokens():
    return torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(0))


def test_fisher_cost_by_hand():
    error = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    inputs = torch.tensor([[1.0, 1.0], [0.0, 3.0]])  # outputs move by (1, 2) and (0, 6)
    gradients = torch.tensor([[1.0, -1.0], [5.0, 0.5]])  # by 1 - 2 = -1 and 0 + 3 = 3 along the gradient
    assert fisher_cost(error, inputs, gradients) == pytest.approx((np.log(1 + 1) + np.log(1 + 9)) / 2 / 2)


def test_skipped_blocks_give_the_logits_of_the_model(new_model, layout, tokens):
    model = new_model(layout)
    found, hidden = structure.blocks(model, tokens)
    leaving = measuring.walk(found, hidden)[-1]
    with torch.inference_mode():
        expected = model(tokens[1:2]).logits[0]
        torch.testing.assert_close(measuring.logits(model, found, tokens[1], leaving[1:2]), expected)
        torch.testing.assert_close(model(tokens[1:2]).logits[0], expected)  # and leave no trace


def test_gradients_block_by_block_equal_those_of_the_whole(new_model, layout, tokens):
    model = new_model(layout)
    found, hidden = structure.blocks(model, tokens)
    states = measuring.walk(found, hidden)
    gradient = measuring.tail_gradient(model, found, tokens, states[-1], seed=0)
    sums = {}
    for block, entering in zip(reversed(found), reversed(states[:-1]), strict=True):
        gradient, seen = measuring.block_gradients(block, entering, gradient)
        sums |= {f"{block.name}.{name}": grad.T @ inputs for name, (inputs, grad) in seen.items()}
    assert set(sums) == set(linear_layers(model))
    # The gradient in a weight is the sum over tokens of output gradient times input.
    generator = torch.Generator().manual_seed(0)
    loss = 0
    for ids in tokens:
        log_p = torch.log_softmax(model(ids[None]).logits[0].float(), -1)
        loss = loss - log_p.gather(1, torch.multinomial(log_p.detach().exp(), 1, generator=generator)).sum()
    loss.backward()
    for name, expected in sums.items():
        actual = model.get_submodule(name).weight.grad
        torch.testing.assert_close(expected, actual, rtol=1e-3, atol=1e-4 * float(actual.abs().max()))


def test_measured_divergence_by_hand(new_model, tokens):
    model = new_model("llama")
    name = "model.layers.0.mlp.up_proj"
    costs = kl_costs(
        model, tokens[:2], lambda _, weight: [quantize_affine(weight, 3, 0).dequantize()], Context()
    )
    changed = copy.deepcopy(model)
    weight = changed.get_submodule(name).weight
    with torch.no_grad():
        weight.copy_(quantize_affine(weight, 3, 0).dequantize())
        log_p, log_q = (torch.log_softmax(each(tokens[:2]).logits, -1) for each in (model, changed))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert costs[name] == [pytest.approx(expected, rel=1e-3)]


def test_prediction_from_gradients_agrees_with_measured_divergence(new_model, tokens):
    """Second order: for small errors the mean over many tokens is right within the noise of the draws."""
    model = new_model("llama")
    many = torch.randint(2, 300, (24, 48), generator=torch.Generator().manual_seed(1))

    def rounded(name, weight):
        return [quantize_affine(weight, 6, 0).dequantize()]

    fisher, measured = (each(model, many, rounded, Context()) for each in (fisher_costs, kl_costs))
    assert fisher.keys() == measured.keys() and len(fisher) == 14
    ratios = [fisher[name][0] / measured[name][0] for name in fisher]
    assert 0.7 < np.median(ratios) < 1.4
    assert (
        np.corrcoef(*(np.log([costs[name][0] for name in fisher]) for costs in (fisher, measured)))[0, 1]
        > 0.8
    )


def test_cheap_measures_by_hand(new_model, tokens, monkeypatch):
    """Against a second way to each: gradients of the loss of transformers, inputs seen by a hook."""
    monkeypatch.setattr(structure, "bfloat16_is_fast", lambda: False)
    model = new_model("qwen3")
    name = "model.layers.1.self_attn.q_proj"
    layer = model.get_submodule(name)
    error = torch.zeros_like(layer.weight)
    error[3, 5], error[7, 9] = 0.5, -0.25

    def candidates(each, weight):
        return [weight.detach() + error] if each == name else []

    gradient, activation, magnitude = (
        MEASURES[each](model, tokens, candidates, Context())[name][0]
        for each in ("gradient", "activation", "magnitude")
    )
    assert all(parameter.grad is None for parameter in model.parameters())  # the model is as it was
    assert magnitude == pytest.approx(0.5**2 + 0.25**2)
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
    model(tokens, labels=tokens).loss.backward()
    hook.remove()
    square = inputs[0].flatten(0, 1).square().mean(0)
    assert activation == pytest.approx(float(0.5**2 * square[5] + 0.25**2 * square[9]), rel=1e-4)
    slope = layer.weight.grad
    assert gradient == pytest.approx(float(0.5 * slope[3, 5].abs() + 0.25 * slope[7, 9].abs()), rel=1e-3)


def test_an_interrupted_measurement_leaves_the_model_as_it_was(new_model, tokens):
    model = new_model("llama")
    before = copy.deepcopy(model.state_dict())

    def candidates(name, weight):
        yield weight * 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kl_costs(model, tokens, candidates, Context())
    wrong = torch.zeros(1)
    with pytest.raises(RuntimeError):
        kl_costs(model, tokens, lambda name, weight: [wrong], Context())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
