"""PyTorch compiled: the decode step as one graph of fused C++ loops, over a cache of fixed length.

Eager starts hundreds of small operations per token from Python. `torch.compile` traces the step once; inductor, its
backend, writes C++ for everything between the packed kernels of `eager`, which stay as they are. What has no kernel
("unpacked when used") is unpacked in one fused loop, whose dense matrix a library then multiplies.
Nothing may change its shape from token to token: the cache is allocated whole, and attention looks at all of it.

Prefill stays eager: it is bound by arithmetic, and every length of prompt would be compiled anew.
Ansel et al. 2024 (PyTorch 2), doi:10.1145/3620665.3640366.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import PreTrainedModel, StaticCache

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.model.logits import head_logits, hidden_states
from edgelab.runtimes.eager import Eager
from edgelab.runtimes.session import Can, Session
from edgelab.storage.description import Description

PAGE = 256  # tokens by which the cache is longer than it has to be, at most


class CompileError(EdgeLabError):
    """What is asked for cannot be compiled here."""


def use_compiler() -> str:
    """Find the C++ compiler that inductor calls, and keep what it makes below `home()`; returns its command.

    Raises CompileError, naming what to install, where there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(assets.home() / "inductor")
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        raise CompileError(
            "The runtime 'compiled' needs a C++ compiler and found none; install g++, or name another in CXX."
        ) from None


def step(model: PreTrainedModel, cache: StaticCache, ids: Tensor) -> Tensor:
    """Logits after the last of `ids`, (1, time) -> (vocabulary,). Appends their keys and values to the cache."""
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]


class Compiled(Eager):
    """A variant on the kernels of `Eager`, its decode step compiled on first use or by `compile`."""

    backend = "inductor"
    can = Can()

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """As for eager; and the cache has to be a plain one of fixed length."""
        if about.marks.cache is not None:
            return (
                "The runtime 'compiled' keeps keys and values as they are; a quantized cache runs on 'torch'."
            )
        return super()._refusal(about)

    def __init__(self, variant: Path) -> None:
        use_compiler()
        super().__init__(variant)
        if self._cache.recurrent:
            raise CompileError(
                f"The runtime 'compiled' needs keys and values, and a {self.model.config.model_type} model keeps a "
                "state; use 'torch'."
            )
        self.kernel = f"compiled, {self.kernel}"
        self._static: StaticCache | None = None
        self._room = 0
        self._step = torch.compile(step, backend=self.backend, fullgraph=True, dynamic=False)

    def compile(self) -> float:
        """Compile the decode step for sequences up to PAGE tokens; returns the seconds, fewer from the disk cache."""
        self.prefill([0])
        started = time.perf_counter()
        self.decode(0)
        return time.perf_counter() - started

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        try:
            return self._go_on(ids, every)
        except (RuntimeError, FailOnRecompileLimitHit) as error:
            reason = str(error).split("\n")[0].strip(" .")
            if "allocate memory" in reason:
                raise
            raise CompileError(
                f"The decode step of this model is no one graph over a cache of fixed length ({reason}); use 'torch'."
            ) from error

    def _go_on(self, ids: list[int], every: bool) -> Tensor:
        length = self.length + len(ids)
        fresh = not self.ids or length > self._room  # what outgrows the cache is read into a longer one
        if fresh:
            self._empty(PAGE * math.ceil((length + PAGE // 2) / PAGE))
        tokens = torch.tensor([self.ids + ids if fresh else ids])
        with torch.no_grad():
            if not fresh and len(ids) == 1:
                return self._step(self.model, self._static, tokens)[None].float()
            hidden = hidden_states(self.model, tokens, self._static)[0]
            return head_logits(self.model, hidden[-len(ids) if every else -1 :])

    def _empty(self, room: int) -> None:
        if self._room == room:
            self._static.reset()
        else:
            self._static, self._room = StaticCache(config=self.model.config, max_cache_len=room), room

    def _cut(self, length: int) -> bool:
        if length == 0:  # the next step empties the cache
            return True
        if any(layer.is_sliding for layer in self._static.layers):
            return False
        for layer in self._static.layers:
            layer.cumulative_length.fill_(length)
        return True

    continuations = Session.continuations  # the cache is of one sequence, and steps write into it
