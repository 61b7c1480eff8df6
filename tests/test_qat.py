"""Quantization-aware training: gradients by finite differences, a model that packing does not change, two starts."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgelab import training
from edgelab.model import losses
from edgelab.recipes import Context, RecipeError, parse
from edgelab.storage import variants
from edgelab.storage.codebook import CodebookTensor
from edgelab.storage.layers import ActivationGrid, PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.one_bit import Ternary, quantize_binary, quantize_ternary
from edgelab.techniques.quantization.qat import (
    FakeQuantize,
    FakeQuantLinear,
    QuantizationAwareTraining,
    convert,
)
from edgelab.techniques.quantization.ranges import mse_grid
from edgelab.techniques.quantization.rtn import GroupSizeError, RoundToNearest, linear_layers, quantize_affine

ROWS = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(5))
SHORT = {"steps": 6, "batch": 2, "length": 24, "group_size": 32}
IDS = torch.arange(2, 40)[None]


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Random tokens in place of the training texts."""
    monkeypatch.setattr(training, "windows", lambda *arguments: ROWS)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def fake(weight: Tensor, scale: Tensor, centre: Tensor, bounded: bool = True) -> Tensor:
    return FakeQuantize.apply(weight, scale, centre, 0, 3, bounded, torch.float32)


def test_two_bits_by_hand():
    """Levels -1, 0, 1, 2. One group: below the grid, within three times (half a step beyond the end counts), above."""
    weight = torch.tensor([[-3.0, 0.25, 1.75, 2.375, 5.0]], requires_grad=True)
    scale = torch.ones(1, 1, requires_grad=True)
    outer = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10_000.0]])
    rounded = fake(weight, scale, torch.ones(1, 1))
    assert rounded.tolist() == [[-1.0, 0.0, 2.0, 2.0, 2.0]]
    rounded.backward(outer)
    assert weight.grad.tolist() == [[0.0, 10.0, 100.0, 1000.0, 0.0]]
    slopes = torch.tensor([[-1.0, -0.25, 0.25, -0.375, 2.0]])  # q(w) - w within, the end of the grid outside
    torch.testing.assert_close(scale.grad, (slopes * outer).sum(-1, keepdim=True) / math.sqrt(5 * 3))


def test_a_grid_that_moves_passes_every_gradient():
    weight = torch.tensor([[-3.0, 0.25, 5.0]], requires_grad=True)
    fake(weight, torch.ones(1, 1), torch.ones(1, 1), bounded=False).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (1, 1)])  # groups, rows, the whole matrix
def test_gradients_by_finite_differences(shape):
    """Straight through means: the rounding error, in steps, is a constant. With it frozen, q(w) is differentiable."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(4, 12, generator=generator).requires_grad_()
    scale = (torch.rand(shape, generator=generator) + 0.3).half().float().requires_grad_()
    centre = torch.randint(0, 4, shape, generator=generator).float()
    outer = torch.randn(4, 12, generator=generator)
    (fake(weight, scale, centre) * outer).sum().backward()

    def wide(grid: Tensor) -> Tensor:
        return grid.double().repeat_interleave(12 // shape[1], 1).expand(4, 12)

    place = weight.detach().double() / wide(scale.detach()) + wide(centre)
    within = (place.round() >= 0) & (place.round() <= 3)
    assert 0 < within.sum() < within.numel()
    error = place.round() - place

    def value(weight: Tensor, scale: Tensor) -> float:
        inner = (weight / wide(scale) + error) * wide(scale)
        ends = (place.round().clamp(0, 3) - wide(centre)) * wide(scale)
        return float((torch.where(within, inner, ends) * outer.double()).sum())

    step = 1e-4
    at = (weight.detach().double(), scale.detach().double())
    for which, tensor in enumerate((weight, scale)):
        share = math.sqrt(weight.numel() / scale.numel() * 3) if which else 1.0
        for index in range(tensor.numel()):
            up, down = ([part.clone() for part in at] for _ in range(2))
            up[which].view(-1)[index] += step
            down[which].view(-1)[index] -= step
            slope = (value(*up) - value(*down)) / (2 * step)
            assert tensor.grad.flatten()[index].item() * share == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_outside_the_grid_the_gradients_are_those_of_the_function_itself():
    """No straight-through there: small changes of weight and scale change q(w) as the gradient says."""
    weight, scale, centre = torch.tensor([[-7.0, 9.0]]), torch.ones(1, 1), torch.ones(1, 1)
    step = 2**-6  # on the float16 grid of the scale
    slope = (fake(weight, scale + step, centre) - fake(weight, scale - step, centre)) / (2 * step)
    assert slope.tolist() == [[-1.0, 2.0]]
    assert torch.equal(fake(weight + step, scale, centre), fake(weight, scale, centre))


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("bits", ["1", "1.58", "2", "3", "4", "8"])
def test_before_training_it_is_rounding(tiny_reference, bits, group_size):
    technique = QuantizationAwareTraining(bits=bits, group_size=group_size)
    model = convert(technique.prepare(tiny_reference.model))
    known = {"1": quantize_binary, "1.58": quantize_ternary}.get(
        bits, lambda weight, size: quantize_affine(weight, int(bits), size, range="mse")
    )
    for name, layer in linear_layers(tiny_reference.model).items():
        ours, theirs = model.get_submodule(name).tensor, known(layer.weight.detach(), group_size)
        assert torch.equal(ours.integers, theirs.integers) and torch.equal(ours.scale, theirs.scale)
        assert ours.bits == theirs.bits and ours.scale.dtype == torch.float16
        if theirs.zero_point is None:
            assert ours.zero_point is None
        else:
            assert torch.equal(ours.zero_point, theirs.zero_point) and ours.zero_point.dtype == torch.uint8


def test_the_mse_range_is_the_start(tiny_reference):
    model = QuantizationAwareTraining(bits=2, group_size=32, range="mse").prepare(tiny_reference.model)
    name, layer = next(iter(linear_layers(tiny_reference.model).items()))
    scale, _ = mse_grid(layer.weight.detach().unflatten(-1, (2, 32)), 2, symmetric=False)
    assert torch.equal(model.get_submodule(name).scale, scale.float())
    assert not model.get_submodule(name).scale.requires_grad


RECIPES = [
    "qat:bits=3",
    "qat:bits=2,learned_step=true",
    "qat:bits=4,range=minmax,loss=ce",
    "qat:bits=3,range=percentile,learned_step=true",
    "qat:bits=3,activation_bits=8",
    "qat:bits=1.58",
    "qat:bits=1.58,learned_step=true",
    "qat:bits=1",
    "qat:bits=1,learned_step=true",
]


@pytest.mark.parametrize("text", RECIPES)
def test_packing_changes_nothing(new_model, text):
    """After some training, the logits of the layers that were trained are those of the layers that are stored."""
    technique = parse(text + ",group_size=32,steps=3,batch=2,length=24,learning_rate=0.01").techniques[0]
    model = technique.prepare(new_model("llama"))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    technique.fit(model, training.cross_entropy, trained, Context(), half=False)
    before = logits(model)
    packed = convert(model)
    assert not any(isinstance(module, FakeQuantLinear) for module in packed.modules())
    torch.testing.assert_close(logits(packed), before, rtol=1e-4, atol=1e-4)


def test_the_result_is_stored_and_sized_like_rounding(tiny_reference, tmp_path):
    technique = QuantizationAwareTraining(bits=3, **SHORT)
    trained = technique.apply(tiny_reference.model, Context())
    rounded = RoundToNearest(bits=3, group_size=32).apply(tiny_reference.model, Context())
    sizes = [variants.measure_size(model, *variants.stored_tensors(model)) for model in (trained, rounded)]
    assert sizes[0] == sizes[1]
    variants.save(trained, tmp_path / "variant", {"recipe": "", "model": "", "model_sha": ""})
    assert torch.equal(logits(variants.load(tmp_path / "variant")), logits(trained))


@pytest.mark.parametrize("bits", ["3", "1.58"])
def test_training_brings_every_layout_nearer_to_its_reference(new_model, layout, bits):
    model = new_model(layout)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    technique = QuantizationAwareTraining(bits=bits, **SHORT | {"steps": 20}, learning_rate=3e-3)
    context = Context()
    trained = technique.apply(model, context)
    start = convert(technique.prepare(model))
    divergence = losses.Divergence(losses.live(model))
    with torch.no_grad():
        assert divergence(trained, ROWS) < 0.85 * divergence(start, ROWS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert context.record.train_tokens == 20 * 2 * 24 and len(context.record.curve) == 20
    assert torch.equal(trained.get_input_embeddings().weight, model.get_input_embeddings().weight)
    packed = [name for name, m in trained.named_modules() if isinstance(m, PackedLinear)]
    assert packed == list(linear_layers(model))


def test_the_same_seed_gives_the_same_weights(tiny_reference):
    technique = QuantizationAwareTraining(bits=2, **SHORT)
    first, second, other = (
        logits(technique.apply(tiny_reference.model, Context(seed=seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_only_the_learned_step_changes_the_scale(new_model):
    model, name = new_model("llama"), "model.layers.0.mlp.up_proj"
    at_start = mse_grid(model.get_submodule(name).weight.detach().unflatten(-1, (2, 32)), 3, symmetric=False)
    scales = [
        QuantizationAwareTraining(
            bits=3, range="mse", learned_step=learned, learning_rate=0.01, **SHORT
        ).apply(model, Context())
        for learned in (False, True)
    ]
    fixed, learned = (trained.get_submodule(name).tensor for trained in scales)
    assert torch.equal(fixed.scale, at_start[0]) and torch.equal(fixed.zero_point, at_start[1])
    assert not torch.equal(learned.scale, at_start[0]) and torch.equal(learned.zero_point, at_start[1])
    assert learned.scale.dtype == torch.float16 and (learned.scale > 0).all()


def test_activations_are_rounded_per_token_in_the_result(tiny_reference):
    technique = QuantizationAwareTraining(bits=4, activation_bits=8, **SHORT)
    trained = technique.apply(tiny_reference.model, Context())
    layers = [module for module in trained.modules() if isinstance(module, PackedLinear)]
    assert layers and all(layer.activation == ActivationGrid() for layer in layers)


def test_the_gradient_passes_rounded_activations():
    layer = FakeQuantLinear(
        torch.eye(4),
        None,
        QuantizationAwareTraining(bits=8, group_size=4).prepare_layer(nn.Linear(4, 4, bias=False)).grid,
        1,
        activation=ActivationGrid(),
    )
    inputs = torch.tensor([[1.0, 0.3, -0.2, 0.1]], requires_grad=True)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, torch.ones(1, 4), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("learned", [False, True])
def test_a_quantized_model_starts_from_its_own_grid(tiny_reference, learned):
    rounded = RoundToNearest(bits=3, group_size=32).apply(tiny_reference.model, Context())
    technique = QuantizationAwareTraining(bits=3, learned_step=learned, **SHORT)
    start = convert(technique.prepare(rounded))
    for name in linear_layers(tiny_reference.model):
        ours, theirs = start.get_submodule(name).tensor, rounded.get_submodule(name).tensor
        assert torch.equal(ours.integers, theirs.integers)
        assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.zero_point, theirs.zero_point)
    trained = technique.apply(rounded, Context(reference=tiny_reference.model))
    tensors = [
        (trained.get_submodule(name).tensor, rounded.get_submodule(name).tensor)
        for name in linear_layers(tiny_reference.model)
    ]
    assert all(torch.equal(a.scale, b.scale) for a, b in tensors) is not learned
    assert all(torch.equal(a.zero_point, b.zero_point) for a, b in tensors)


def test_a_quantized_model_is_drawn_to_the_reference_not_to_itself(new_model):
    reference = new_model("llama")
    rounded = RoundToNearest(bits=2, group_size=32).apply(reference, Context())
    technique = QuantizationAwareTraining(bits=2, **SHORT | {"steps": 12}, learning_rate=2e-2)
    trained = technique.apply(rounded, Context(reference=reference))
    divergence = losses.Divergence(losses.live(reference))
    with torch.no_grad():
        assert divergence(trained, ROWS) < 0.85 * divergence(rounded, ROWS)


def test_zero_points_between_integers_are_kept():
    tensor = QuantizedTensor(
        torch.tensor([[0, 1, 2, 3, 3, 0, 1, 2]], dtype=torch.uint8),
        torch.tensor([[0.5, 0.25]]).half(),
        torch.tensor([[1.375, 2.625]]).half(),
        2,
    )
    layer = QuantizationAwareTraining(bits=2, group_size=4).prepare_layer(PackedLinear(tensor))
    assert torch.equal(layer.rounded().detach(), tensor.dequantize())
    packed = layer.packed().tensor
    assert torch.equal(packed.integers, tensor.integers) and torch.equal(packed.zero_point, tensor.zero_point)


def test_without_a_reference_a_quantized_model_needs_the_text(tiny_reference):
    rounded = RoundToNearest(bits=3, group_size=32).apply(tiny_reference.model, Context())
    with pytest.raises(RecipeError, match="needs the reference for its loss; use loss=ce"):
        QuantizationAwareTraining(bits=3, **SHORT).apply(rounded, Context())
    trained = QuantizationAwareTraining(bits=3, loss="ce", **SHORT).apply(rounded, Context())
    assert not torch.equal(logits(trained), logits(rounded))


def test_another_width_or_group_than_the_model_has(tiny_reference):
    rounded = RoundToNearest(bits=4, group_size=32).apply(tiny_reference.model, Context())
    for settings in ({"bits": 3, "group_size": 32}, {"bits": 4, "group_size": 64}):
        with pytest.raises(
            RecipeError, match="is quantized to 4 bits in groups of 32, and qat keeps its grid"
        ):
            QuantizationAwareTraining(**settings).apply(rounded, Context())


def test_ternary_training_starts_from_three_levels(tiny_reference):
    model = tiny_reference.model
    technique = QuantizationAwareTraining(bits=1.58, loss="ce", **SHORT)
    with pytest.raises(RecipeError, match=r"q_proj is not ternary, .*; start from quantize\.ternary"):
        technique.apply(RoundToNearest(bits=2, group_size=32).apply(model, Context()), Context())
    rounded = Ternary(group_size=32).apply(model, Context())
    trained = technique.apply(rounded, Context())
    name = next(iter(linear_layers(model)))
    ours, theirs = (each.get_submodule(name).tensor for each in (trained, rounded))
    assert torch.equal(ours.scale, theirs.scale) and ours.zero_point is None
    assert set(ours.integers.flatten().tolist()) == {1, 2, 3}


def test_a_codebook_is_refused(new_model):
    model = new_model("llama")
    tensor = CodebookTensor(
        torch.zeros(192, 64, dtype=torch.uint8), torch.zeros(1, 4).half(), torch.ones(192, 1).half(), 2
    )
    model.set_submodule("model.layers.0.mlp.up_proj", PackedLinear(tensor))
    with pytest.raises(
        RecipeError, match=r"uniform grids, and model\.layers\.0\.mlp\.up_proj has a codebook"
    ):
        QuantizationAwareTraining(group_size=32).apply(model, Context())


def test_recipes_round_trip():
    assert str(parse("qat:bits=1.58 , steps=76")) == "qat:bits=1.58,group_size=64,steps=76"
    assert parse("qat").techniques[0] == QuantizationAwareTraining(bits=3) == QuantizationAwareTraining("3")
    assert str(parse("quantize.rtn:bits=3 + qat:loss=ce").techniques[1].bits) == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qat:bits=9", "qat:bits is one of 1, 1.58, 2, 3, 4, 5, 6, 7, 8, not '9'"),
        ("qat:group_size=-1", "qat:group_size=-1 is negative; 0 means one group per row"),
        ("qat:activation_bits=4", r"qat:activation_bits=4 is neither 8 nor 0 \(float\)"),
        (
            "qat:bits=1.58,range=minmax",
            r"qat:bits=1\.58 takes its scale from mean magnitudes; leave out range=minmax",
        ),
        ("qat:loss=mse", "qat:loss is one of kl, ce, not 'mse'"),
        ("qat:steps=0", "at least 1 step"),
        ("qat:learning_rate=-1", "learning_rate=-1.0"),
    ],
)
def test_bad_settings(text, message):
    with pytest.raises(RecipeError, match=message):
        parse(text)


def test_bad_settings_in_python(tiny_reference):
    with pytest.raises(RecipeError, match=r"qat:bits=1\.5 is none of 1, 1\.58 and 2 to 8"):
        QuantizationAwareTraining(bits=1.5)
    with pytest.raises(GroupSizeError, match="group_size=48 does not divide the 64 and 192 inputs"):
        QuantizationAwareTraining(group_size=48).apply(tiny_reference.model, Context())
