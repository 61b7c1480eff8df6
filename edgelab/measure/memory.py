"""Memory: the peak of a process, and the key-value cache by shape."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Protocol

from transformers import PretrainedConfig


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM starts anew with the process; ru_maxrss is inherited from the parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


class CacheGrid(Protocol):
    """How a model keeps its keys and values where they are quantized."""

    def nbytes(self, config: PretrainedConfig, tokens: int, bytes_per_value: float) -> float: ...


def kv_cache_mb_per_1k(
    config: PretrainedConfig, bytes_per_value: float = 4, grid: CacheGrid | None = None
) -> float:
    """MB of keys and values of 1,000 tokens: layers x KV heads x head size x 2 x bytes.

    grid: how they are quantized; the bytes are then those of the packed cache, scales and recent tokens included.
    """
    if grid is not None:
        return grid.nbytes(config, 1000, bytes_per_value) / 1e6
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * heads * head_dim * 2 * bytes_per_value * 1000 / 1e6
