"""LoftQ: what is left beside an adapter of a given rank shrinks, and the adapter behind it takes the last step."""

import pytest
import torch

from edgelab.recipes import Context, RecipeError
from edgelab.storage.adapters import adapted_layers
from edgelab.techniques.lora import QLoRA
from edgelab.techniques.quantization.loftq import LoftQ, largest_directions, quantize_beside_rank
from edgelab.techniques.quantization.rtn import RoundToNearest, quantize_affine


def left_over(weight, tensor, rank):
    lost = weight - tensor.dequantize()
    b, a = largest_directions(lost, rank)
    return (lost - b @ a).square().sum().item()


def test_the_largest_directions_by_hand():
    """diag(3, 1) of rank one is diag(3, 0), and its halves are equal in size."""
    b, a = largest_directions(torch.diag(torch.tensor([3.0, 1.0])), 1)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([3.0, 0.0])))
    torch.testing.assert_close(b.abs(), a.T.abs())


def test_what_is_left_is_the_tail_of_the_singular_values():
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    b, a = largest_directions(matrix, 5)
    tail = torch.linalg.svdvals(matrix)[5:]
    torch.testing.assert_close((matrix - b @ a).square().sum(), tail.square().sum())


@pytest.mark.parametrize("bits", [2, 3])
def test_less_is_left_than_beside_rounding(bits):
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(2))
    rounded = quantize_affine(weight, bits, 32)
    one = quantize_beside_rank(weight, bits, 32, rank=8, rounds=1)
    assert torch.equal(one.integers, rounded.integers) and torch.equal(one.scale, rounded.scale)
    few, many = (quantize_beside_rank(weight, bits, 32, rank=8, rounds=rounds) for rounds in (3, 6))
    assert left_over(weight, many, 8) <= left_over(weight, few, 8) < 0.97 * left_over(weight, rounded, 8)


def test_the_adapter_behind_it_starts_where_it_ends(new_model):
    """Before any step, base and adapter are nearer to the float weights than rounding and its own adapter."""
    reference = new_model("llama")
    start = QLoRA(rank=8, start="residual")

    def distance(base):
        layers = adapted_layers(start.started(base, Context(reference=reference)))
        return sum(
            (
                reference.get_submodule(name).weight
                - layer.get_base_layer().tensor.dequantize()
                - layer.get_delta_weight("default")
            )
            .square()
            .sum()
            .item()
            for name, layer in layers.items()
        )

    rounded = RoundToNearest(bits=2, group_size=32).apply(reference, Context())
    assert distance(LoftQ(bits=2, group_size=32).apply(reference, Context())) < 0.95 * distance(rounded)


@pytest.mark.parametrize("changes", [{"rank": 0}, {"rounds": 0}, {"bits": 1}, {"group_size": -1}], ids=str)
def test_bad_settings_are_refused(changes):
    with pytest.raises(RecipeError):
        LoftQ(**changes)
