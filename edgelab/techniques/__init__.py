"""The techniques: importing this package enters every one of them into `edgelab.recipes.TECHNIQUES`."""

from edgelab.techniques import native
from edgelab.techniques.quantization import (
    activations,
    autoround,
    awq,
    floats,
    gptq,
    hqq,
    kv,
    mixed,
    nonuniform,
    one_bit,
    qat,
    rtn,
    smooth,
    unpack,
)

__all__ = [
    "activations",
    "autoround",
    "awq",
    "floats",
    "gptq",
    "hqq",
    "kv",
    "mixed",
    "native",
    "nonuniform",
    "one_bit",
    "qat",
    "rtn",
    "smooth",
    "unpack",
]
