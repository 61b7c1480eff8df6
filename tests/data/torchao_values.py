"""Write torchao.json: what torchao makes of one small matrix at int8 per row and at int4 per group of 32.

Run it where torchao is installed (`pip install torchao==0.18.0`). It is no dependency of the tests: wherever torchao is
installed, transformers imports it in every process, 40 MB and messages on stderr beside each measurement.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)

weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) / 8
weight[1, 7], weight[3, 40] = 1.5, -0.75  # outliers
weight = torch.round(weight * 2**14) / 2**14  # short in decimal, exact in float32

values = {"torchao": version("torchao"), "weight": weight.tolist()}
for name, mapping, block, dtype, lowest, highest in (
    ("int8 per row", MappingType.SYMMETRIC, (1, 64), torch.int8, -127, 127),
    ("int4 per group", MappingType.ASYMMETRIC, (1, 32), torch.uint8, 0, 15),
):
    chosen, zero_point = choose_qparams_affine(weight, mapping, block, dtype, lowest, highest, eps=2**-14)
    scale = chosen.half().float()  # the scale that a packed layer stores
    integers = quantize_affine(weight, block, scale, zero_point, dtype, lowest, highest)
    restored = dequantize_affine(integers, block, scale, zero_point, dtype, lowest, highest)
    values[name] = {
        "chosen_scale": chosen.tolist(),
        "zero_point": zero_point.tolist(),
        "integers": integers.tolist(),
        "dequantized": restored.tolist(),
    }
Path(__file__).with_name("torchao.json").write_text(json.dumps(values) + "\n")
