"""llama.cpp, through the library of the package xllamacpp: a GGUF file with our integers, llama.cpp's kernels."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgelab.runtimes import cannot_load, exported, gguf, llama_c
from edgelab.runtimes.llama_c import LlamaError, library
from edgelab.runtimes.session import Session
from edgelab.storage import variants
from edgelab.storage.description import Description

FILE = "model.gguf"
ADAPTER = "adapter.gguf"
CONTEXT = 1024  # tokens of keys and values at first; it doubles where a sequence outgrows it
BATCH = 512  # tokens that are computed at once, llama.cpp's default
# What llama.cpp rounds the inputs of a product to, by the type of the weights; blocks of int8 for all others.
ACTIVATIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _link(file: Path, other: Path) -> None:
    """Let a file appear at a second place, at no cost in bytes where the file system can do that."""
    try:
        other.hardlink_to(file)
    except OSError:
        shutil.copy2(file, other)


class LlamaCpp(Session):
    """A variant in llama.cpp on the CPU. Greedy decoding; keys and values in float16, which is llama.cpp's default."""

    adapters = True
    tolerance = 0.1  # one token runs on other kernels than many, which round inputs to int8 elsewhere
    cache_bits = 16
    cache_type = 1  # of keys and values: GGML_TYPE_F16

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """llama.cpp runs uniform grids in groups of whole blocks, and rounds the inputs in its own way."""
        if about.marks.native is not None:
            return f"llama.cpp runs integers that a technique chose, not native.{about.marks.native}; use quantize.rtn."
        if about.marks.cache is not None:
            return "llama.cpp keeps keys and values in float16 here; run quantize.kv on torch."
        if any("activation" in how for how in about.matrices.values()):
            return (
                "llama.cpp rounds inputs on a grid of its own, for each 32 of them; leave them to it and quantize "
                "the weights only, or run this on torch."
            )
        if about.adapter == "dora":
            return "llama.cpp has adapters without DoRA's lengths of columns; put merge behind it for this engine."
        return gguf.refusal(about)

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write the GGUF file, and that of an adapter; returns the bytes of the weights in them."""
        base = variants.parent_of(variant)
        if base is None:
            return gguf.write(variant, folder / FILE)
        shared = exported("llamacpp", base)  # so that adapters of one base have one file of it
        _link(shared.folder / FILE, folder / FILE)
        return shared.weights_bytes + gguf.write_adapter(variant, folder / ADAPTER)

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__()
        file = folder / FILE
        self._c = library()
        self._threads = threads
        self._context: int | None = None
        llama_c.said.clear()
        self._model = self._c.llama_model_load_from_file(
            os.fsencode(file), self._c.llama_model_default_params()
        )
        if not self._model:
            reason = next(iter(llama_c.said), "").rpartition("error loading model: ")[2]
            raise cannot_load("llama.cpp", folder, reason)
        self.kernel = self._kernel()
        self._adapter: int | None = None
        if (adapter := folder / ADAPTER).is_file():
            self._adapter = self._c.llama_adapter_lora_init(self._model, os.fsencode(adapter))
            if not self._adapter:
                raise cannot_load("llama.cpp", folder, next(iter(llama_c.said), "the adapter"))
        self.vocabulary = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(self._model))
        self._longest = self._c.llama_model_n_ctx_train(self._model)
        self.short = self._before_scaling()
        self._open(CONTEXT if self.short == math.inf else self.short)
        self.prefill([0, 0])  # warm-up: weights are read, buffers allocated
        self.decode(0)
        self._start()

    def _stated(self, key: str) -> str:
        """What the file says under a key; nothing where it does not."""
        answer = ctypes.create_string_buffer(256)
        self._c.llama_model_meta_val_str(self._model, key.encode(), answer, len(answer))
        return answer.value.decode()

    def _before_scaling(self) -> float:
        """Tokens up to which LongRoPE has its short factors; infinity for a model without it.

        llama.cpp goes by the room of the context, and transformers by the length of the text.
        """
        scaling = f"{self._stated('general.architecture')}.rope.scaling"
        if self._stated(f"{scaling}.type") != "longrope":
            return math.inf
        return int(self._stated(f"{scaling}.original_context_length"))

    def _kernel(self) -> str:
        types = self._stated(gguf.TYPES_KEY).split()
        if not types:
            return "ggml"
        return "ggml " + " + ".join(f"{kind} ({ACTIVATIONS.get(kind, 'int8')} activations)" for kind in types)

    def _open(self, context: int) -> None:
        """An empty context for so many tokens, in place of the one there is."""
        self._c.llama_free(self._context)
        params = self._c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.type_k = params.type_v = self.cache_type
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = False  # for `own_timings`
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise LlamaError(
                f"llama.cpp has no memory for a context of {context} tokens; use a shorter text."
            )
        self._room = self._c.llama_n_ctx(self._context)
        if self._adapter:
            adapter, scale = ctypes.c_void_p(self._adapter), ctypes.c_float(1.0)
            if self._c.llama_set_adapters_lora(self._context, ctypes.byref(adapter), 1, ctypes.byref(scale)):
                raise LlamaError("llama.cpp does not take this adapter; put merge behind it.")

    def _cut(self, length: int) -> bool:
        memory = self._c.llama_get_memory(self._context)
        if length:
            return self._c.llama_memory_seq_rm(memory, -1, length, -1)
        if self._room > self.short:
            self._open(self.short)
            return True
        self._c.llama_memory_clear(memory, False)
        self._c.llama_perf_context_reset(self._context)
        return True

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        wanted = len(ids) if every else 1
        if (length := self.length + len(ids)) > self._longest:
            raise LlamaError(
                f"This model on llama.cpp is for texts of up to {self._longest} tokens; use a shorter one."
            )
        if length > self._room:  # all of it again, in a larger context
            self._open(1 << (length - 1).bit_length())
            ids = self.ids + ids
        found = []
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            tokens = (ctypes.c_int32 * len(part))(*part)  # the batch only points at them
            batch = self._c.llama_batch_get_one(tokens, len(part))
            if every:
                batch.logits = (ctypes.c_int8 * len(part))(*[1] * len(part))
            if status := self._c.llama_decode(self._context, batch):
                raise LlamaError(f"llama.cpp cannot compute {len(part)} tokens (status {status}).")
            rows = len(part) if every else 1
            logits = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (rows, self.vocabulary))
            # llama.cpp overwrites them with those of the next part
            found.append(torch.tensor(logits) if every else torch.from_numpy(logits))
        return torch.cat(found)[-wanted:] if every else found[-1]

    def own_timings(self) -> dict[str, float]:
        """llama.cpp's own rates in this sequence, tokens per second: of parts of several tokens, and of single ones."""
        timings = self._c.llama_perf_context(self._context)
        counted = {
            "prefill_tok_s": (timings.n_p_eval, timings.t_p_eval_ms),
            "decode_tok_s": (timings.n_eval, timings.t_eval_ms),
        }
        return {name: 1e3 * tokens / spent for name, (tokens, spent) in counted.items() if spent}

    def close(self) -> None:
        """Give back its memory."""
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)
        self._context = self._model = None
