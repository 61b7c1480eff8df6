"""Size: bytes of the stored weights by part, and what they come to in bits per weight.

In PyTorch they are counted from the tensors of the variant; for an engine from the file that it loads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab.measure import Subject, measurement
from edgelab.storage.kv_cache import head_shape
from edgelab.storage.stages import parent_of

if TYPE_CHECKING:
    from edgelab.storage.description import Description

KEYS_OR_VALUES = re.compile(r"\.(\d+)\.[^.]+\.[kv]_proj$")  # and the number of their layer


@measurement(
    "size",
    part="variant",
    needs="variant",
    fields=(
        "parameters",
        "weights_mb",
        "linear_mb",
        "embedding_mb",
        "scales_mb",
        "file_mb",
        "adapter_mb",
        "bits_per_weight",
        "kv_cache_mb_per_1k",
    ),
)
def size(subject: Subject) -> dict[str, Any]:
    """Parts are those of the variant; an engine's file is not taken apart."""
    parts, export = subject.about["size"], subject.export
    if export is None:
        stored = sum(count for name, count in parts.items() if name.endswith("_bytes"))
        found = {f"{part}_mb": parts[f"{part}_bytes"] / 1e6 for part in ("linear", "embedding", "scales")}
        found |= {
            "weights_mb": stored / 1e6,
            "file_mb": sum(file.stat().st_size for file in _files(subject)) / 1e6,
        }
        if parts.get("adapter_bytes"):
            found["adapter_mb"] = parts["adapter_bytes"] / 1e6
    else:
        found = {"weights_mb": export.weights_bytes / 1e6, "file_mb": export.file_bytes / 1e6}
    return found | {
        "parameters": parts["parameters"],
        "bits_per_weight": 8e6 * found["weights_mb"] / parts["parameters"],
        "kv_cache_mb_per_1k": kv_cache_mb_per_1k(
            subject.description, subject.cache_bytes, windows=export is None
        ),
    }


def _files(subject: Subject) -> list[Path]:
    """The weights of a variant, and below an adapter those that it stands on."""
    parent = parent_of(subject.folder)
    folders = [subject.folder] if parent is None else [subject.folder, parent]
    return [file for folder in folders for file in folder.glob("*.safetensors")]


def kv_cache_mb_per_1k(description: Description, bytes_per_value: float = 4, windows: bool = True) -> float:
    """MB of keys and values of 1,000 tokens: KV heads x head size x 2 x bytes x the tokens of each layer.

    windows: whether a layer that looks back a window keeps one token less than it, as in PyTorch, or all of them, as
    the engines do here. Where keys and values are quantized, those of the packed cache, scales and recent tokens
    included; it keeps all tokens.
    """
    from transformers import AutoConfig, DynamicCache

    config = AutoConfig.for_model(**description.config).get_text_config()
    if description.marks.cache is not None:
        return description.marks.cache.nbytes(config, 1000, bytes_per_value) / 1e6
    seen = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    tokens = [min(1000, window - 1) if windows and window else 1000 for window in seen]
    heads, head_dim = head_shape(config)
    values = sum(tokens) * heads * head_dim * 2
    for name, (out_features, *_) in description.shapes.items():  # layers with fewer heads than the others
        if found := KEYS_OR_VALUES.search(name):
            values += tokens[int(found[1])] * (out_features - heads * head_dim)
    return values * bytes_per_value / 1e6
