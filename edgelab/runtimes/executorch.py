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

from edgelab import variants
from edgelab.runtimes import EngineMissing, RuntimeRefused, check_causal

PROGRAM = "model.pte"


class ExecuTorch:
    """A program on the CPU, with keys and values in float32."""

    badge = "runtime"
    packages = ("executorch", "torchao")
    model = None
    gives_logits = True
    version = 2
    cache_bits = 32
    spare = ()

    @staticmethod
    def refusal(about: dict) -> str | None:
        """Float32, or weights that torchao rounds."""
        if about["native"] is not None:
            return None
        if about["quantized"] or about["cache"] is not None:
            return "ExecuTorch runs what torchao rounds; name it, as in 'native.int4 @ executorch'."
        if about["dtype"] != "float32":
            return "ExecuTorch's XNNPACK is given float32 here; the recipe 'none' is float32."
        return None

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write the program; returns its bytes: weights and a few kilobytes of instructions."""
        _operators()
        native = variants.read_about(variant)["native"]
        with warnings.catch_warnings(action="ignore"):  # of names that torch is going to take away
            from edgelab.runtimes import executorch_export

            check_causal(variant, executorch_export.LAYOUTS, "ExecuTorch")
            executorch_export.write(variants.load(variant), native, folder / PROGRAM)
        return (folder / PROGRAM).stat().st_size

    def __init__(self, folder: Path, threads: int) -> None:
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
        except (RuntimeError, KeyError):
            raise RuntimeRefused(
                f"{file} is no program that ExecuTorch can run; remove its folder, and it is written anew."
            ) from None
        self.kernel = "XNNPACK float32" if rounded == 32 else f"XNNPACK int{rounded}, int8 activations"
        self._length = 0

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; returns the most likely next token."""
        self._length = 0
        return int(self._step(ids)[-1].argmax())

    def decode(self, token: int) -> int:
        """Go on by one token; returns the most likely next one."""
        return int(self._step([token])[-1].argmax())

    def _step(self, ids: list[int], everywhere: bool = False) -> Tensor:
        """Logits (time or 1, vocabulary) of the next tokens: of all of them, or of the last."""
        if self._length + len(ids) > self.room:
            raise RuntimeRefused(
                f"The cache of an ExecuTorch program holds {self.room} tokens here; use a shorter text."
            )
        found = []
        for piece in torch.tensor(ids).split(self.chunk):
            places = torch.arange(len(piece)) if everywhere else torch.tensor([len(piece) - 1])
            (logits,) = self._method.execute([piece[None], torch.tensor([self._length]), places])
            self._length += len(piece)
            found.append(logits[0].clone())
        return torch.cat(found)

    def logits(self, ids: list[int]) -> Tensor:
        """Logits at every position of a new sequence, (time, vocabulary) float32."""
        self._length = 0
        return self._step(ids, everywhere=True)

    def top(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The most likely next tokens of a new sequence with their log-probabilities, best first."""
        self._length = 0
        found = torch.log_softmax(self._step(ids)[-1], -1).topk(count)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def close(self) -> None:
        """Forget the program."""
        self._method = None


def _operators() -> None:
    """Load the operators of language models and of rounded embeddings. Raises EngineMissing without the package."""
    try:
        with warnings.catch_warnings(action="ignore"):
            import executorch.kernels.quantized  # noqa: F401
            from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    except ImportError:
        raise EngineMissing("ExecuTorch", "executorch") from None
