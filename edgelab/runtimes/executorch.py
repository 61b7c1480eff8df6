"""ExecuTorch with XNNPACK, the path of PyTorch to a phone: a program of `executorch_export`, run by its own runtime.

Weights are float32, or rounded by torchao with activations rounded to int8 for each token: `native.int8` one scale
per row, `native.int4` one per 32 weights of a row. The tied head is stored beside the embedding, since XNNPACK wants
it packed in its own way. XNNPACK has one pool of threads for a process.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from edgelab.runtimes import EngineMissing, RuntimeRefused, cannot_load, refusals
from edgelab.runtimes.session import Session
from edgelab.storage import variants
from edgelab.storage.description import Description

LAYOUTS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
WINDOWED = ("gemma2", "gemma3_text")  # whose layers may see a window of the text only
PROGRAM = "model.pte"


class ExecuTorch(Session):
    """A program on the CPU, with keys and values in float32."""

    tolerance = 0.02  # float32 sums in another order move the int8 grids of activations
    cache_bits = 32

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """Float32, or weights that torchao rounds."""
        if about.matrices or about.marks.cache is not None:
            return "ExecuTorch runs what torchao rounds; name it, as in 'native.int4 @ executorch'."
        if about.dtype != "float32":
            return "ExecuTorch's XNNPACK is given float32 here; the recipe 'none' is float32."
        return (
            refusals.foreign_layout(about, LAYOUTS, "ExecuTorch", WINDOWED)
            or refusals.rotary_scaling(about, refusals.TRACEABLE, "The export to ExecuTorch")
            or refusals.unusual_attention(about, "The export to ExecuTorch")
            or _foreign_heads(about)
        )

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write the program; returns its bytes: weights and a few kilobytes of instructions."""
        _operators()
        native = variants.read_description(variant).marks.native
        with warnings.catch_warnings(action="ignore"):  # of names that torch is going to take away
            from edgelab.runtimes import executorch_export

            executorch_export.write(variants.load(variant), native, folder / PROGRAM)
        return (folder / PROGRAM).stat().st_size

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__()
        _operators()
        with warnings.catch_warnings(action="ignore"):  # that the interface is young
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        if portable_lib._threadpool_get_thread_count() != threads:
            portable_lib._unsafe_reset_threadpool(threads)
        file = folder / PROGRAM
        try:
            program = Runtime.get().load_program(file)
            self._method = program.load_method("forward")
            self.room, self.chunk, rounded = (
                int(program.load_method(name).execute([])[0]) for name in ("room", "chunk", "bits")
            )
        except (RuntimeError, KeyError) as error:
            raise cannot_load("ExecuTorch", folder, error) from None
        self.kernel = "XNNPACK float32" if rounded == 32 else f"XNNPACK int{rounded}, int8 activations"
        self.vocabulary = self._method.metadata.output_tensor_meta(0).sizes()[-1]

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        if self.length + len(ids) > self.room:
            raise RuntimeRefused(
                f"The cache of an ExecuTorch program holds {self.room} tokens here; use a shorter text."
            )
        found, start = [], self.length
        for piece in torch.tensor(ids).split(self.chunk):
            places = torch.arange(len(piece)) if every else torch.tensor([len(piece) - 1])
            (logits,) = self._method.execute([piece[None], torch.tensor([start]), places])
            start += len(piece)
            found.append(logits[0].clone())
        return torch.cat(found) if every else found[-1]

    def _cut(self, length: int) -> bool:
        return True  # a step says at which position it starts

    def close(self) -> None:
        """Forget the program."""
        self._method = None


def _foreign_heads(about: Description) -> str | None:
    """Attention of another shape than the configuration gives: keys and values have one shape in all layers."""
    name = next((name for name in about.shapes if ".self_attn." in name), None)
    return (
        name
        and f"The cache of an ExecuTorch program has one shape for all layers, and {name} has its own; use 'torch'."
    )


def _operators() -> None:
    """Load the operators of language models and of rounded embeddings. Raises EngineMissing without the package."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import executorch.kernels.quantized  # noqa: F401
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    except ImportError:
        raise EngineMissing("ExecuTorch", "executorch") from None
