"""The few functions of llama.h that are needed, in the library that the package xllamacpp brings.

Its Python classes speak to a server that samples and gives no logits; the C functions under them give both logits and
llama.cpp's own timings, and a step costs what llama.cpp takes. llama.h comes with no
package and changes: the structures here are laid out as in the version TESTED, and `library` makes sure of it by the
values that llama.cpp fills in.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from functools import cache

from edgelab.errors import EdgeLabError
from edgelab.runtimes import EngineMissing

ROOM = ("rest", ctypes.c_byte * 512)  # fields we do not touch, with room to spare


class LlamaError(EdgeLabError):
    """Something llama.cpp cannot read or do."""


class ModelParams(Structure):
    """`llama_model_params`: passed on as llama.cpp fills it."""

    _fields_ = (ROOM,)


class ContextParams(Structure):
    """`llama_context_params`."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int32) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", c_int32),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale")),
        *((name, c_float) for name in ("yarn_ext", "yarn_attn", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        *((name, c_int32) for name in ("type_k", "type_v")),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("added", c_void_p),  # null by default
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full")),
        ROOM,
    )


class Batch(Structure):
    """`llama_batch`: tokens of one sequence; `logits` marks those whose logits are wanted."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    )


class Timings(Structure):
    """`llama_perf_context_data`: milliseconds and tokens of batches (prefill) and of single tokens (decoding)."""

    _fields_ = (
        *((name, c_double) for name in ("t_start_ms", "t_load_ms", "t_p_eval_ms", "t_eval_ms")),
        *((name, c_int32) for name in ("n_p_eval", "n_eval", "n_reused")),
    )


TESTED = "2026.10.11549"
ERROR = 4  # GGML_LOG_LEVEL_ERROR
DEFAULTS = {  # from the first field used to the last: another layout would show other values
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 4,
    "n_threads_batch": 4,
    "flash_attn_type": -1,
    "yarn_ext": -1,
    "type_k": 1,  # float16
    "type_v": 1,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}
Logger = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
FUNCTIONS = {  # name -> (result, *arguments)
    "llama_backend_init": (None,),
    "llama_log_set": (None, Logger, c_void_p),
    "llama_model_default_params": (ModelParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_model_n_ctx_train": (c_int32, c_void_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, c_size_t),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_context_default_params": (ContextParams,),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_free": (None, c_void_p),
    "llama_adapter_lora_init": (c_void_p, c_void_p, c_char_p),  # freed with its model
    "llama_set_adapters_lora": (c_int32, c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)),
    "llama_n_ctx": (c_uint32, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_clear": (None, c_void_p, c_bool),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),  # sequence, first, end; -1 for all
    "llama_batch_get_one": (Batch, POINTER(c_int32), c_int32),
    "llama_decode": (c_int32, c_void_p, Batch),
    "llama_get_logits": (POINTER(c_float), c_void_p),
    "llama_perf_context": (Timings, c_void_p),
    "llama_perf_context_reset": (None, c_void_p),
}


said: list[str] = []  # errors that llama.cpp has logged


@Logger
def _listen(level: int, text: bytes, data: int) -> None:
    """Of llama.cpp's log, which is pages long, only the errors are kept."""
    if level == ERROR:
        said.append(text.decode(errors="replace").strip())


def library() -> ctypes.CDLL:
    """llama.cpp, ready for use and silent. Raises EngineMissing without the package, LlamaError where it is foreign.

    The process has one log, and a server of llama.cpp started in it takes the log over: it is taken back at every call.
    """
    found = opened()
    found.llama_log_set(_listen, None)
    return found


@cache
def opened() -> ctypes.CDLL:
    try:
        from xllamacpp import xllamacpp as package
    except ImportError:
        raise EngineMissing("llama.cpp (xllamacpp)", "runtimes") from None
    found = ctypes.CDLL(package.__file__)
    try:
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise LlamaError(f"This build of xllamacpp hides llama.cpp's C functions ({error}).") from None
    found.llama_log_set(_listen, None)  # before its first words
    found.llama_backend_init()
    defaults = found.llama_context_default_params()
    if any(getattr(defaults, name) != value for name, value in DEFAULTS.items()):
        raise LlamaError(
            "This xllamacpp brings a llama.cpp of another layout; "
            f"`pip install xllamacpp=={TESTED}` brings the one that edgelab knows."
        )
    return found
