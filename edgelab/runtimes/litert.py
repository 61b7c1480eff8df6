"""LiteRT, the successor of TensorFlow Lite, and LiteRT-LM on it: a bundle that phone apps open, its model run here.

Weights are float32, or rounded by the AI Edge quantizer with activations rounded to int8 for each token:
`native.int8` and `native.int4`, one scale per row. A prompt goes through in pieces of CHUNK tokens; what the last piece
has too many is written behind the end of the text, where decoding writes again before it looks. LiteRT-LM's own
interface takes text and no tokens, so the model is taken out of the bundle; `benchmark` asks LiteRT-LM itself.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import io
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from edgelab.runtimes import EngineMissing, RuntimeRefused, cannot_load, refusals
from edgelab.runtimes.session import Can, Session
from edgelab.storage import variants
from edgelab.storage.description import Description

try:
    import ai_edge_litert
except ImportError:
    ai_edge_litert = None

BUNDLE, MODEL, NOTE = "model.litertlm", "model.tflite", "weights.json"
LAYOUTS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
WINDOWED = ("gemma2", "gemma3_text")  # whose layers may see a window of the text only
CHUNK = 128  # tokens of a prompt at once
ROOM = 2048  # tokens of the cache
RECIPES = {None: "none", "int8": "dynamic_wi8_afp32", "int4": "dynamic_wi4_afp32"}
# litert_torch 0.9 names its functions by random digits. Two were alike once, and the next attempt draws others.
TWO_ALIKE = "redefinition of symbol"
IDENTIFIER = b"TFL3"  # of a TensorFlow Lite file, at its byte 4
UNSEEN = -1e9  # added to the score of a token that lies ahead


class LiteRt(Session):
    """A compiled model on the CPU, with keys and values in float32 that it changes in place.

    What takes a prompt in pieces returns no logits, so that those of every position are steps of one token.
    """

    can = Can(every_position=False)
    tolerance = 0.02  # float32 sums in another order move the int8 grids of activations
    cache_bits = 32
    spare = (BUNDLE,)  # LiteRT-LM and a phone read it

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """Float32, or weights that the AI Edge quantizer rounds."""
        if about.matrices or about.marks.cache is not None:
            return "LiteRT runs what its own quantizer rounds; name it, as in 'native.int8 @ litert'."
        if about.dtype != "float32":
            return "LiteRT is given float32 here; the recipe 'none' is float32."
        return (
            refusals.foreign_layout(about, LAYOUTS, "LiteRT", WINDOWED)
            or refusals.own_shape(about, "LiteRT's converter")
            or refusals.rotary_scaling(about, refusals.TRACEABLE, "LiteRT's converter")
            or refusals.unusual_attention(about, "LiteRT's converter")
        )

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write the bundle, and beside it the model that lies in it; returns the bytes of that model."""
        native = variants.read_description(variant).marks.native
        try:
            size = _write(variant, folder, native)
        except Exception as error:  # its class is the converter's own
            if TWO_ALIKE not in str(error):
                raise
            size = _write(variant, folder, native)
        (folder / NOTE).write_text(json.dumps({"native": native, "bytes": size}))
        return size

    def __init__(self, folder: Path, threads: int) -> None:
        if ai_edge_litert is None:
            raise EngineMissing("LiteRT", "litert")
        super().__init__()
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.cpu_options import CpuOptions
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator
        from ai_edge_litert.options import Options

        options = Options(HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=threads))
        self._prefill = f"prefill_{CHUNK}"
        try:
            native = _read_note(folder)
            self._engine = CompiledModel.from_file(str(folder / MODEL), options=options)
            shapes = self._engine.get_input_tensor_details("decode")
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise cannot_load("LiteRT", folder, error, self.spare) from None
        self.room = int(shapes["mask"]["shape"][-1])
        self.vocabulary = int(self._engine.get_output_tensor_details("decode")["logits"]["shape"][-1])
        self._cache = {}
        for name, about in shapes.items():
            if name.startswith(
                "kv_cache"
            ):  # zeros: what lies there counts for nothing, unless it is no number
                self._cache[name] = self._engine.create_input_buffer_by_name("decode", name)
                self._cache[name].write(np.zeros(about["shape"], np.float32))
        self._inputs = {
            signature: {
                name: self._engine.create_input_buffer_by_name(signature, name)
                for name in ("tokens", "input_pos", "mask")
            }
            for signature in (self._prefill, "decode")
        }
        self._logits = self._engine.create_output_buffer_by_name("decode", "logits")
        if native is not None:  # what it rounds is worth scoring, slowly; of float32 a few answers are enough
            self.can = replace(self.can, every_position=True)
        self.kernel = f"XNNPACK {native}, int8 activations" if native else "XNNPACK float32"

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        if self.length + len(ids) > self.room:
            raise RuntimeRefused(
                f"The cache of a LiteRT model holds {self.room} tokens here; use a shorter text."
            )
        start = self.length
        if every:
            return torch.stack([self._step(token, place) for place, token in enumerate(ids, start)])
        *before, last = ids
        for first in range(0, len(before), CHUNK):
            piece = before[first : first + CHUNK]
            if start + CHUNK > self.room:  # the piece would not fit with what it has too many
                for place, token in enumerate(piece, start):
                    self._step(token, place)
            else:
                self._run(self._prefill, piece + [0] * (CHUNK - len(piece)), start, self._cache)
            start += len(piece)
        return self._step(last, start)[None]

    def _step(self, token: int, place: int) -> Tensor:
        """Logits (vocabulary,) behind one more token."""
        self._run("decode", [token], place, {**self._cache, "logits": self._logits})
        return torch.from_numpy(self._logits.read(self.vocabulary, np.float32))

    def _cut(self, length: int) -> bool:
        return True  # a step says at which position it is, and sees nothing behind it

    def _run(self, signature: str, ids: list[int], start: int, outputs: dict) -> None:
        places = np.arange(start, start + len(ids), dtype=np.int32)
        inputs = self._inputs[signature]
        inputs["tokens"].write(np.array([ids], np.int32))
        inputs["input_pos"].write(places)
        ahead = np.arange(self.room) > places[:, None]  # (time, room)
        inputs["mask"].write(np.where(ahead, np.float32(UNSEEN), np.float32(0))[None, None])
        self._engine.run_by_name(signature, {**inputs, **self._cache}, outputs)

    def close(self) -> None:
        """Forget model and cache."""
        self._cache = self._inputs = self._logits = None
        self._engine.close()


def benchmark(folder: Path, threads: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """What LiteRT-LM itself measures on the bundle of `folder`: tokens per second of the prompt and of decoding."""
    try:
        import litert_lm
    except ImportError:
        raise EngineMissing("LiteRT-LM", "litert") from None
    backend = litert_lm.Backend.CPU(thread_count=threads)
    found = litert_lm.Benchmark(
        str(folder / BUNDLE), backend, prefill_tokens=prompt_tokens, decode_tokens=new_tokens
    ).run()
    return found.last_prefill_tokens_per_second, found.last_decode_tokens_per_second


def _write(variant: Path, folder: Path, native: str | None) -> int:
    """Write the bundle and the model in it, of which the bytes are returned."""
    convert, recipe = _converter(), RECIPES[native]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, made = Path(work) / "source", Path(work) / "made"
        variants.load(variant).save_pretrained(source)
        AutoTokenizer.from_pretrained(variant).save_pretrained(source)
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            _length_of_the_cache(),
        ):
            convert(
                model=str(source),
                output_dir=str(made),
                quantization_recipe=recipe,
                prefill_lengths=[CHUNK],
                cache_length=ROOM,
                bundle_litert_lm=True,
                keep_temporary_files=True,
            )
        (made / BUNDLE).replace(folder / BUNDLE)
        model = made / (MODEL if recipe == "none" else "model_quantized.tflite")
        return model.replace(folder / MODEL).stat().st_size


def _read_note(folder: Path) -> str | None:
    """How the weights were rounded. Raises ValueError for a file that LiteRT would crash on instead of refusing it."""
    note = json.loads((folder / NOTE).read_text())
    with (folder / MODEL).open("rb") as stream:
        whole = os.fstat(stream.fileno()).st_size == note["bytes"]
        if not whole or stream.read(8)[4:] != IDENTIFIER:
            raise ValueError("not the model that was exported")
    return note["native"]


def _converter():
    """`export` of litert_torch. Raises EngineMissing without the package."""
    with warnings.catch_warnings(action="ignore"), _schema_for_tensorflow():
        try:
            from litert_torch.generative.export_hf.export import export
        except ImportError:
            raise EngineMissing("LiteRT's converter", "litert") from None
    return export


@contextlib.contextmanager
def _length_of_the_cache() -> Iterator[None]:
    """Let the converter's cache say its length, for which litert_torch 0.9 asks a method that transformers took away.

    Only the mask of a sliding window asks for it.
    """
    from litert_torch.generative.export_hf.core.cache import LiteRTLMCache

    if hasattr(LiteRTLMCache, "get_max_cache_shape"):
        yield
        return
    LiteRTLMCache.get_max_cache_shape = lambda _: ROOM
    try:
        yield
    finally:
        del LiteRTLMCache.get_max_cache_shape


@contextlib.contextmanager
def _schema_for_tensorflow() -> Iterator[None]:
    """Let one module of LiteRT stand in for the only one of TensorFlow that the converter imports.

    litert_torch 0.9 imports `tensorflow.lite.python.schema_py_generated`, 600 MB for the generated classes of the
    file format, which ai_edge_litert has as well. TensorFlow itself is used where it is installed.
    """
    parts = ("tensorflow", "tensorflow.lite", "tensorflow.lite.python")
    if ai_edge_litert is None or importlib.util.find_spec(parts[0]) is not None:
        yield
        return
    from ai_edge_litert import schema_py_generated

    stand_in = {name: types.ModuleType(name) for name in parts}
    for name, module in stand_in.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # torch asks for it
    stand_in[parts[-1]].schema_py_generated = schema_py_generated
    sys.modules.update(stand_in)
    try:
        yield
    finally:
        for name in parts:
            sys.modules.pop(name, None)
