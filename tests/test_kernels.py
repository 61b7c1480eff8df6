"""Packed layers against their simulated twins: float32 products with the dequantized matrix.

Precision. bfloat16 keeps 8 significant bits, so that rounding to it changes a value by at most u = 2**-8 of itself.
The kernels round the inputs, the scales, the offsets of asymmetric grids, and the outputs (the dense int8 road twice);
sums are float32. With a weight split as the kernel splits it, (q - m) s + (m - z) s, m the middle of the grid:

    |error| <= 2 u (1 + u) A + 2 u Y + g A,    A = sum |x| (|q - m| + |m - z|) s,    Y = |sum x (q - m) s|,

where g = 2 k 2**-24 covers float32 sums of k products. That is the worst case, when all roundings conspire. As they do
not, at most five independent roundings of root-mean-square u / sqrt(3) leave an error of 2-norm below 0.5 % of the
output's: a kernel that loses more has lost bits on the way.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgelab.recipes import Context, parse
from edgelab.runtimes import load
from edgelab.runtimes.eager import Eager, Int4Linear, Int8Linear, Simulated, int4_group_size, kernel_for
from edgelab.storage import variants
from edgelab.storage.layers import PackedEmbedding, PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.quantization.rtn import quantize_affine

U = 2.0**-8
NORM = math.sqrt(5 / 3) * U  # 0.5 %
IDS = torch.arange(2, 66)[None]


def example(bits: int, group_size: int, symmetric: bool, tokens: int, out_features: int = 64):
    """A quantized matrix with rows of different ranges, some of one sign, and inputs (tokens, 576)."""
    generator = torch.Generator().manual_seed(100 * bits + group_size + tokens)
    weight = 0.05 * torch.randn(out_features, 576, generator=generator)
    weight[::4] = weight[::4].abs()
    weight[1::4] *= torch.rand(len(weight[1::4]), 1, generator=generator)
    inputs = torch.randn(tokens, 576, generator=generator)
    return quantize_affine(weight, bits, group_size, symmetric), inputs


def check(layer: nn.Module, tensor: QuantizedTensor, inputs: Tensor) -> None:
    twin = inputs.double() @ tensor.dequantize().double().T
    error = (layer(inputs).double() - twin).abs()
    middle = 2 ** (tensor.bits - 1)
    scale, centre = (
        part.double().repeat_interleave(tensor.group_size, 1) for part in (tensor.scale, tensor.centre())
    )
    steps = tensor.integers.double() - middle
    spread = inputs.double().abs() @ ((steps.abs() + (middle - centre).abs()) * scale).T
    product = (inputs.double() @ (steps * scale).T).abs()
    sums = 2 * inputs.shape[1] * 2.0**-24
    assert (error <= (2 * U * (1 + U) + sums) * spread + 2 * U * product).all()
    assert error.norm() <= NORM * twin.norm()
    assert error.max() > 0  # it is the kernel that ran, not the twin


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 96, 192, 0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_kernel(bits, group_size, symmetric, tokens):
    tensor, inputs = example(bits, group_size, symmetric, tokens)
    assert kernel_for(tensor) is Int4Linear
    check(Int4Linear(tensor, None), tensor, inputs)


@pytest.mark.parametrize("tokens", [1, 15, 16, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
def test_int8_kernel(bits, symmetric, tokens):
    tensor, inputs = example(bits, 0, symmetric, tokens)
    check(Int8Linear(tensor, None), tensor, inputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_bias_shape_and_dtype(bits):
    tensor, inputs = example(bits, 0, False, 6)
    bias = torch.linspace(-3, 3, 64)
    kernel = kernel_for(tensor)
    plain, biased = kernel(tensor, None)(inputs), kernel(tensor, bias)(inputs)
    torch.testing.assert_close(biased - plain, bias.expand(6, 64), rtol=0, atol=1e-5)
    nested = kernel(tensor, bias)(inputs.reshape(2, 3, 576))
    assert nested.dtype == torch.float32
    assert torch.equal(nested, biased.reshape(2, 3, 64))
    assert kernel(tensor, None)(inputs.bfloat16()).dtype == torch.bfloat16


def test_which_matrix_runs_where():
    def kind(bits: int, group_size: int, out_features: int = 64):
        return kernel_for(example(bits, group_size, False, 1, out_features)[0])

    assert {kind(bits, size) for bits in (2, 3, 4) for size in (32, 64, 96, 192, 288, 576, 0)} == {Int4Linear}
    assert {kind(bits, size) for bits in (5, 6, 7, 8) for size in (576, 0)} == {Int8Linear}
    assert {kind(bits, 64) for bits in (5, 6, 7, 8)} == {None}
    assert kind(4, 48) is None and kind(4, 16) is None  # no group size of the kernel divides them
    assert kind(4, 0, 300) is Int8Linear and kind(4, 64, 300) is None  # rows in blocks of 16 only


@pytest.mark.parametrize(
    ("group_size", "used"), [(32, 32), (64, 64), (96, 32), (192, 64), (288, 32), (576, 64), (48, 0)]
)
def test_group_size_of_the_int4_kernel(group_size, used):
    assert int4_group_size(example(4, group_size, False, 1)[0]) == used


def test_packed_layers_are_their_dequantized_twins():
    tensor, inputs = example(3, 64, False, 5)
    bias = torch.ones(64)
    expected = nn.functional.linear(inputs, tensor.dequantize(), bias)
    assert torch.equal(PackedLinear(tensor, bias)(inputs), expected)
    ids = torch.tensor([[0, 63, 5], [5, 5, 1]])
    assert torch.equal(PackedEmbedding(tensor)(ids), tensor.dequantize()[ids])
    assert torch.equal(PackedEmbedding(tensor, torch.bfloat16)(ids), tensor.dequantize(torch.bfloat16)[ids])


def variant(text: str, model: nn.Module, folder: Path) -> Path:
    for technique in parse(text).techniques:
        model = technique.apply(model, Context())
    variants.save(model, folder, {})
    return folder


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


NAMED = {
    "none": "float32 linear",
    "quantize.bf16": "bfloat16 linear",
    "quantize.rtn:bits=4": "int4pack_mm bf16",
    "quantize.rtn:bits=3": "int4pack_mm bf16 (3 bits unpacked to 4)",
    "quantize.rtn:bits=8,group_size=0": "int8pack_mm bf16",
    "quantize.rtn:bits=6,group_size=0": "int8pack_mm bf16 (6 bits unpacked to 8)",
    "quantize.rtn:bits=8,group_size=32": "unpacked when used, float32",
    "quantize.bf16 + quantize.rtn:bits=8,group_size=32": "unpacked when used, bfloat16",
    "quantize.rtn:bits=4,embedding_bits=8": "int4pack_mm bf16 + int8pack_mm bf16",
}


@pytest.mark.parametrize(("text", "kernel"), NAMED.items())
def test_the_kernel_is_named(text, kernel, tiny_reference, tmp_path):
    runtime = load("torch", variant(text, tiny_reference.model, tmp_path / "variant"))
    assert isinstance(runtime, Eager)
    assert (runtime.badge, runtime.kernel) == ("packed", kernel)
    left = [layer for layer in runtime.model.modules() if isinstance(layer, PackedLinear)]
    assert bool(left) == ("unpacked when used" in kernel)


@pytest.mark.parametrize("embedding_bits", [0, 8])
@pytest.mark.parametrize(
    "setting", ["bits=2,group_size=32", "bits=4", "bits=4,symmetric=true", "bits=8,group_size=0", "bits=8"]
)
def test_model_on_kernels_equals_its_simulation(setting, embedding_bits, layout, new_model, tmp_path):
    """Logits within 3 % in norm: some thirty products, each within NORM, whose errors add up as independent ones."""
    text = f"quantize.rtn:{setting},embedding_bits={embedding_bits}"
    folder = variant(text, new_model(layout), tmp_path / "variant")
    simulated, packed = logits(load("simulated", folder).model), logits(load("torch", folder).model)
    assert (packed - simulated).norm() <= 0.03 * simulated.norm()
    if setting == "bits=8,group_size=32" and not embedding_bits:
        assert torch.equal(packed, simulated)  # no kernel takes part


@pytest.mark.parametrize(
    "text",
    ["none", "quantize.bf16", "quantize.rtn:bits=3,embedding_bits=5", "quantize.bf16 + quantize.rtn:bits=4"],
)
def test_simulation_equals_the_packed_definition(text, layout, new_model, tmp_path):
    folder = variant(text, new_model(layout), tmp_path / "variant")
    simulated = load("simulated", folder)
    assert isinstance(simulated, Simulated)
    assert simulated.badge == "simulated" and simulated.kernel.startswith("dense ")
    assert not any(isinstance(layer, PackedLinear | PackedEmbedding) for layer in simulated.model.modules())
    assert torch.equal(logits(simulated.model), logits(variants.load(folder)))


@pytest.mark.parametrize("name", ["torch", "simulated"])
@pytest.mark.parametrize("text", ["none", "quantize.rtn:bits=8,embedding_bits=8"])
def test_decoding_with_a_cache_equals_reading_everything_again(text, name, layout, new_model, tmp_path):
    runtime = load(name, variant(text, new_model(layout), tmp_path / "variant"))
    ids = IDS[0, :16].tolist()
    for _ in range(2):  # prefill starts anew
        token = runtime.prefill(ids)
        generated = [token]
        for _ in range(6):
            token = runtime.decode(token)
            generated.append(token)
        with torch.inference_mode():
            answers = runtime.model(torch.tensor([ids + generated[:-1]])).logits[0, 15:]
        chosen = answers.gather(1, torch.tensor(generated)[:, None])[:, 0]
        torch.testing.assert_close(
            chosen, answers.amax(-1), rtol=0.02, atol=0.02
        )  # ties of bfloat16 may fall otherwise
