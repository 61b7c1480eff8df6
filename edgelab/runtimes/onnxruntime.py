"""ONNX Runtime, through its generation library: a graph of few, large operators and kernels for 4 and 8 bits.

| stored                                 | runs as                                                              |
| -------------------------------------- | -------------------------------------------------------------------- |
| float32                                | float32                                                              |
| 1 to 8 bits, whole zero-points         | MatMulNBits over 4 or 8 bits, activations rounded to int8 by block   |
| the same, zero-points between integers | MatMulNBits that unpacks the weights first                           |
| native.int4, native.int8               | MatMulNBits over what the builder rounds by itself, in blocks of 32  |
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgelab.runtimes import EngineMissing, RuntimeRefused, cannot_load, refusals
from edgelab.runtimes.session import Graph, TwoGraphs
from edgelab.storage import variants
from edgelab.storage.description import Description

GEMMAS = ("gemma", "gemma2", "gemma3_text")
PARTLY_TURNED = ("phi", "phi3")  # whose rotary embedding may turn a part of a head only
LAYOUTS = ("llama", "mistral", "qwen2", "qwen3", *PARTLY_TURNED, *GEMMAS)  # that the export knows
WINDOWED = ("mistral", "phi3", "gemma2", "gemma3_text")  # whose layers may see a window of the text only
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")
HEADS = 16  # what the attention kernel wants the size of a head to be a multiple of
SCORING = "scoring.onnx"
PAGE = 1024  # tokens the cache is made for; a longer text doubles them

try:
    import onnxruntime
    import onnxruntime_genai
except ImportError:
    onnxruntime_genai = None


class OnnxRuntime(TwoGraphs):
    """The graphs of `onnx_export` on the CPU: the generation library writes, the scoring graph reads whole texts."""

    tolerance = 0.02  # float32 sums in another order move the int8 grids of activations
    cache_bits = 32
    provider = "CPUExecutionProvider"

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """Weights on uniform grids, or float32; activations and cache are the engine's affair."""
        if about.marks.cache is not None:
            return "ONNX Runtime keeps keys and values in float32 here; a quantized cache runs on 'torch'."
        if about.dtype != "float32":
            return "ONNX Runtime computes in float32 on a CPU; give it float32 or integers."
        for name in about.matrices:
            how = about.how(name)
            if how["format"] != "uniform":
                return f"MatMulNBits has uniform grids only; a {how['format']} runs on 'torch'."
            if how.get("activation"):
                return "MatMulNBits rounds activations in a way of its own; calibrated or row-wise ones run on 'torch'."
            if how["group_size"] % 16:
                return f"MatMulNBits wants groups that 16 divides, not {how['group_size']}; use 32 or 64."
        return (
            refusals.foreign_layout(about, LAYOUTS, "ONNX", WINDOWED)
            or refusals.own_shape(about, "The export to ONNX")
            or refusals.rotary_scaling(about, refusals.known_scaling(about), "The export to ONNX")
            or refusals.unusual_attention(about, "The export to ONNX")
            or _foreign_block(about)
        )

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write the graphs."""
        if onnxruntime_genai is None:
            raise EngineMissing("ONNX Runtime GenAI", "runtimes")
        from edgelab.runtimes import onnx_export

        native = variants.read_description(variant).marks.native
        return onnx_export.export(variant, folder, native or "fp32")

    def __init__(self, folder: Path, threads: int) -> None:
        if onnxruntime_genai is None:
            raise EngineMissing("ONNX Runtime GenAI", "runtimes")
        super().__init__()
        self.folder, self.threads = folder, threads
        options = {"intra_op_num_threads": threads, "log_severity_level": 3}
        with _refusing(folder):
            config = onnxruntime_genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.engine = onnxruntime_genai.Model(config)
            self.kernel = describe(folder)
            self._about = json.loads((folder / "genai_config.json").read_text())["model"]
        self.vocabulary, self.room = self._about["vocab_size"], self._about["context_length"]

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        if self.length + len(ids) > self.room:
            raise RuntimeRefused(
                f"An ONNX graph has rotary tables for the model's {self.room} positions; use a shorter text."
            )
        return super()._feed(ids, every)

    def _open(self, every: bool) -> Graph:
        if not every:
            return Writing(self.engine, self.room)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        with _refusing(self.folder):
            session = onnxruntime.InferenceSession(self.folder / SCORING, options, providers=[self.provider])
        return Reading(session, self._about["decoder"])

    def close(self) -> None:
        """Forget graphs and caches."""
        super().close()
        self.engine = None


def _foreign_block(about: Description) -> str | None:
    """An activation or a size of heads that has no operator."""
    config = about.config
    activation = config["hidden_activation" if about.layout in GEMMAS[1:] else "hidden_act"]
    if activation not in ACTIVATIONS:
        return f"The export to ONNX knows {', '.join(ACTIVATIONS)}, not {activation}; use 'torch'."
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head % HEADS:
        return f"ONNX Runtime's attention wants heads whose size {HEADS} divides, not {head}; use 'torch'."
    part = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1)
    if about.layout in PARTLY_TURNED and (turned := int(head * part)) % HEADS:
        return (
            f"ONNX Runtime turns a part of a head that {HEADS} divides, not {turned} of {head}; use 'torch'."
        )
    return None


class Writing:
    """The generation library: logits of the last token, keys and values in a buffer of fixed length."""

    def __init__(self, engine: onnxruntime_genai.Model, limit: int) -> None:
        self._engine, self._limit, self._ids = engine, limit, []
        self._room, self._generator = 0, None

    @property
    def length(self) -> int:
        return len(self._ids)

    def read(self, ids: list[int]) -> Tensor:
        self._ids = self._ids + ids
        if len(self._ids) >= self._room < self._limit:  # all of it again, into a longer buffer
            self._start(min(max(PAGE, 2 * len(self._ids)), self._limit))
            ids = self._ids
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        return torch.from_numpy(self._generator.get_logits()[0, -1:])

    def _start(self, room: int) -> None:
        parameters = onnxruntime_genai.GeneratorParams(self._engine)
        parameters.set_search_options(max_length=room, do_sample=False, past_present_share_buffer=True)
        self._generator, self._room = onnxruntime_genai.Generator(self._engine, parameters), room

    def cut(self, length: int) -> None:
        self._generator.rewind_to(length)
        self._ids = self._ids[:length]


class Reading:
    """The scoring graph: logits of every token; keys and values go out of one step and into the next."""

    def __init__(self, session: onnxruntime.InferenceSession, decoder: dict) -> None:
        self._session = session
        self._outputs = [one.name for one in session.get_outputs()]
        empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
        self._past = {name.replace("present", "past_key_values"): empty for name in self._outputs[1:]}
        self.length = 0

    def read(self, ids: list[int]) -> Tensor:
        self.length += len(ids)
        inputs = {"input_ids": np.array([ids], np.int64)}
        inputs["attention_mask"] = np.ones((1, self.length), np.int64)
        logits, *present = self._session.run(self._outputs, inputs | self._past)
        self._past = dict(zip(self._past, present, strict=True))
        return torch.from_numpy(logits[0])

    def cut(self, length: int) -> None:
        self._past = {name: np.ascontiguousarray(kept[:, :, :length]) for name, kept in self._past.items()}
        self.length = length


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """One sentence for what the library says of a damaged file; its errors have no common class."""
    try:
        yield
    except Exception as error:
        raise cannot_load("ONNX Runtime", folder, error) from None


def describe(folder: Path) -> str:
    """What multiplies, read from the graph: its operators, their bits and how exact they are."""
    import onnx

    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    names = {}
    for node in nodes:
        if node.op_type == "MatMulNBits":
            about = {one.name: one.i for one in node.attribute}
            sums = "int8 activations" if about.get("accuracy_level") == 4 else "unpacked when used"
            names[f"MatMulNBits {about['bits']} bits, {sums}"] = None
    return " + ".join(names) or "MatMul float32"
