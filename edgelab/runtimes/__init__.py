"""Runtimes: what executes a variant. One file per engine; `RUNTIMES` says which class of which file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedModel

# name -> "module:class"; imported on use, since an engine may be an optional dependency
RUNTIMES = {
    "torch": "edgelab.runtimes.eager:Eager",
    "simulated": "edgelab.runtimes.eager:Simulated",
    "compiled": "edgelab.runtimes.compiled:Compiled",
}


class Runtime(Protocol):
    """A loaded variant. `model` is None for an engine that gives no logits; `badge` and `kernel` name what runs."""

    badge: str
    kernel: str
    model: PreTrainedModel | None

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; returns the most likely next token."""

    def decode(self, token: int) -> int:
        """Go on by one token; returns the most likely next one."""


def load(runtime: str, variant: Path) -> Runtime:
    """Load a variant's folder into a runtime of RUNTIMES."""
    module, _, name = RUNTIMES[runtime].partition(":")
    return getattr(importlib.import_module(module), name)(variant)
