"""Runtimes: what executes a variant. One file per engine; `RUNTIMES` says which class of which file.

PyTorch runs a variant as it is. An engine runs what its `export` makes of it: a file in the engine's own format, with
the integers that our techniques chose, written once beside the variant and found there afterwards.
"""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgelab import assets, variants
from edgelab.errors import EdgeLabError, to_install

# name -> "module:class"; imported on use, since an engine may be an optional dependency
RUNTIMES = {
    "torch": "edgelab.runtimes.eager:Eager",
    "simulated": "edgelab.runtimes.eager:Simulated",
    "compiled": "edgelab.runtimes.compiled:Compiled",
    "onnxruntime": "edgelab.runtimes.onnxruntime:OnnxRuntime",
    "openvino": "edgelab.runtimes.openvino:OpenVino",
    "llamacpp": "edgelab.runtimes.llamacpp:LlamaCpp",
    "executorch": "edgelab.runtimes.executorch:ExecuTorch",
    "litert": "edgelab.runtimes.litert:LiteRt",
}
IN_TORCH = ("torch", "simulated", "compiled")


class RuntimeRefused(EdgeLabError):
    """A variant that a runtime cannot run; the sentence says which one can, or what would be right."""


class EngineMissing(EdgeLabError):
    """An engine whose package is not installed."""

    def __init__(self, engine: str, extra: str) -> None:
        super().__init__(
            f"{engine} is not installed here; `{to_install(extra)}` in the project's folder installs it."
        )


class Runtime(Protocol):
    """A loaded variant. `badge` and `kernel` name what runs. `model` is None for what is no PyTorch model."""

    badge: str
    kernel: str
    model: PreTrainedModel | None
    packages: ClassVar[tuple[str, ...]]  # beside PyTorch, whose versions decide what it does
    gives_logits: bool  # of every position of a sequence, and not only the most likely next tokens

    @staticmethod
    def refusal(about: dict) -> str | None:
        """Why the variant that `variant.json` describes cannot run here, in one sentence; None where it can."""

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; returns the most likely next token."""

    def decode(self, token: int) -> int:
        """Go on by one token; returns the most likely next one."""

    def logits(self, ids: list[int]) -> Tensor:
        """Logits at every position of a new sequence, (time, vocabulary) float32, where `gives_logits`."""

    def top(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The most likely next tokens of a new sequence with their log-probabilities, best first."""

    def close(self) -> None:
        """Give back what it holds."""


class Engine(Runtime, Protocol):
    """A runtime that loads a file of its own, `Engine(folder, threads)`."""

    version: ClassVar[int]  # raise it when the export of the same variant changes
    cache_bits: ClassVar[int]  # of a key or value that is kept
    spare: ClassVar[tuple[str, ...]]  # files of the export that running it does not need

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write all that the engine loads into an empty folder; returns the bytes of the weights in it."""


@dataclass(frozen=True)
class Export:
    """What an engine loads: its folder, bytes of weights and of the files it reads, and the seconds it took to make."""

    folder: Path
    weights_bytes: int
    file_bytes: int
    seconds: float


def find(runtime: str) -> type[Runtime]:
    """The class of a runtime of RUNTIMES."""
    module, _, name = RUNTIMES[runtime].partition(":")
    return getattr(importlib.import_module(module), name)


def check_causal(variant: Path, layouts: tuple[str, ...], engine: str) -> None:
    """Raise RuntimeRefused for another layout than these, or one whose attention forgets what is far back."""
    config = variants.load_config(variant)
    if config.model_type not in layouts:
        raise RuntimeRefused(
            f"The export to {engine} knows {', '.join(layouts)}, not {config.model_type}; use 'torch'."
        )
    if getattr(config, "use_sliding_window", False):
        raise RuntimeRefused(f"The export to {engine} knows no sliding window here; use 'torch'.")


def exported(runtime: str, variant: Path) -> Export | None:
    """What an engine loads, made now unless it is there already; None for PyTorch, which loads the variant itself.

    Raises RuntimeRefused where the engine cannot run the variant, EngineMissing where it is not installed.
    """
    kind, about = find(runtime), variants.read_about(variant)
    if about["native"] and (about["quantized"] or about["cache"] is not None or about["dtype"] != "float32"):
        raise RuntimeRefused(
            f"native.{about['native']} leaves float32 weights to an engine; take the other quantization out."
        )
    if reason := kind.refusal(about):
        raise RuntimeRefused(reason)
    if runtime in IN_TORCH:
        return None
    folder = variant / "exports" / f"{runtime}-{kind.version}"
    note = folder / "export.json"
    if not note.is_file():
        with assets.staged(folder) as draft:
            started = time.perf_counter()
            weights = kind.export(variant, draft)
            spent = time.perf_counter() - started
            files = variants.folder_bytes(draft) - sum((draft / name).stat().st_size for name in kind.spare)
            found = {"weights_bytes": weights, "file_bytes": files, "seconds": spent}
            (draft / note.name).write_text(json.dumps(found))
        variants.trim(keep=variant)
    return Export(folder, **json.loads(note.read_text()))


def load(runtime: str, variant: Path) -> Runtime:
    """Load a variant's folder into a runtime of RUNTIMES, on as many threads as torch uses."""
    found = exported(runtime, variant)
    kind = find(runtime)
    return kind(variant) if found is None else kind(found.folder, torch.get_num_threads())
