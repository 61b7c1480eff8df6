"""Integers and values of torchao on the same scales, which `tests/data/torchao_values.py` wrote down."""

import json
from pathlib import Path

import pytest
import torch

from edgelab.techniques.quantization.rtn import quantize_affine

VALUES = json.loads((Path(__file__).parent / "data" / "torchao.json").read_text())
WEIGHT = torch.tensor(VALUES["weight"])  # (4, 64)


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "symmetric"),
    [("int8 per row", 8, 0, True), ("int4 per group", 4, 32, False)],
)
def test_integers_and_values_are_those_of_torchao(name, bits, group_size, symmetric):
    theirs = {key: torch.tensor(value) for key, value in VALUES[name].items()}
    tensor = quantize_affine(WEIGHT, bits, group_size, symmetric)
    scale = theirs["chosen_scale"].view(tensor.scale.shape)
    assert torch.equal(tensor.scale, scale.half())
    middle = 128 if symmetric else 0  # torchao stores symmetric integers with a sign
    assert torch.equal(tensor.integers.int() - middle, theirs["integers"].int())
    assert torch.equal(tensor.centre().int() - middle, theirs["zero_point"].view(tensor.scale.shape))
    assert torch.equal(tensor.dequantize(), theirs["dequantized"])
    assert tensor.integers.unique().numel() > 12  # the example uses the grid
