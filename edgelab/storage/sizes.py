"""Bytes of a model as it is stored, by part, and the parameters they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from edgelab.storage.layers import packed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUT_PARTS = ("input_scale", "input_zero_point")  # of a layer whose inputs are rounded on one grid


@dataclass(frozen=True)
class Size:
    """Bytes of the stored tensors, by part, and the parameters they stand for."""

    parameters: int
    linear_bytes: int
    embedding_bytes: int
    scales_bytes: int  # scales and zero-points, wherever they belong
    other_bytes: int
    adapter_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(n_bytes for part, n_bytes in vars(self).items() if part != "parameters")


def measure_size(model: PreTrainedModel, tensors: dict[str, Tensor], matrices: dict[str, dict]) -> Size:
    """Count the bytes of stored weights by part. The embedding part holds the embedding and an untied head.

    Buffers (rotary frequencies, a few hundred bytes) are stored, but they are no weights.
    """
    buffers = {name for name, _ in model.named_buffers()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {name for name, module in model.named_modules() if module in ends}
    sides = {name: layer.tensor.side | {*INPUT_PARTS} for name, layer in packed_layers(model).items()}
    parts = dict.fromkeys(("linear", "embedding", "scales", "other"), 0)
    parameters = sum(how["shape"][0] * how["shape"][1] for how in matrices.values() if "shape" in how)
    for name in tensors.keys() - buffers:
        tensor = tensors[name]
        layer, _, kind = name.rpartition(".")
        if layer in matrices and kind in sides[layer]:
            part = "scales"
        elif layer in embeddings:
            part = "embedding"
        else:
            part = "linear" if tensor.dim() == 2 or (layer in matrices and kind != "bias") else "other"
        parts[part] += tensor.nbytes
        if layer not in matrices or kind == "bias":
            parameters += tensor.numel()
    return Size(parameters, *(parts[part] for part in ("linear", "embedding", "scales", "other")))
