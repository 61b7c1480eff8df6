"""OpenVINO: the ONNX graph with our integers, its cache made a state of the engine, compiled for this CPU.

Weights of 4 and 8 bits stay what they are until they are multiplied; the CPU plugin rounds activations to int8 in
blocks of 32 for that. All else is float32. `native.int8` and `native.int4` are NNCF's `compress_weights`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgelab import variants
from edgelab.runtimes import EngineMissing, RuntimeRefused
from edgelab.runtimes.onnxruntime import OnnxRuntime

try:
    import openvino
except ImportError:
    openvino = None

GRAPH = "scoring.onnx"
NATIVE = {"int8": "INT8_ASYM", "int4": "INT4_ASYM"}  # of NNCF


class OpenVino:
    """A stateful graph on the CPU plugin."""

    badge = "runtime"
    model = None
    gives_logits = True
    version = 1
    cache_bits = 32

    @staticmethod
    def refusal(about: dict) -> str | None:
        """What the ONNX graph can hold."""
        reason = OnnxRuntime.refusal(about)
        return reason and reason.replace("ONNX Runtime", "OpenVINO").replace("MatMulNBits", "OpenVINO")

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Convert the ONNX graph with our integers. Raises RuntimeRefused for a layout that has no such graph."""
        if openvino is None:
            raise EngineMissing("OpenVINO", "runtimes")
        from edgelab.runtimes import onnx_export

        onnx_export.check_layout(variant)
        weights = onnx_export.export(variant, folder, shared=False)
        native = variants.read_about(variant)["native"]
        return weights if native is None else compress(folder, NATIVE[native])

    def __init__(self, folder: Path, threads: int) -> None:
        if openvino is None:
            raise EngineMissing("OpenVINO", "runtimes")
        self.file, self.threads = folder / GRAPH, threads
        model = self._read()
        self.kernel = describe(model)
        last_logits(model)
        self._request = self._compiled(model).create_infer_request()
        self._scoring = None

    def _read(self):
        try:
            model = openvino.Core().read_model(self.file)
        except RuntimeError:
            raise RuntimeRefused(
                f"{self.file} is no graph that OpenVINO can read; `edgelab cache clear` removes it."
            ) from None
        make_stateful(model)
        return model

    def _compiled(self, model):
        options = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": "f32"}
        return openvino.Core().compile_model(model, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; returns the most likely next token."""
        self._request.reset_state()
        self._length = 0
        return self._step(ids)

    def decode(self, token: int) -> int:
        """Go on by one token; returns the most likely next one."""
        return self._step([token])

    def _step(self, ids: list[int]) -> int:
        self._length += len(ids)
        return int(_run(self._request, ids, self._length)[-1].argmax())

    def logits(self, ids: list[int]) -> Tensor:
        """Logits at every position of a new sequence, (time, vocabulary) float32."""
        if self._scoring is None:
            self._scoring = self._compiled(self._read()).create_infer_request()
        self._scoring.reset_state()
        return torch.from_numpy(_run(self._scoring, ids, len(ids)).copy())

    def top(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The most likely next tokens of a new sequence with their log-probabilities, best first."""
        found = torch.log_softmax(self.logits(ids)[-1], -1).topk(count)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def close(self) -> None:
        """Forget both graphs."""
        self._request = self._scoring = None


def _run(request, ids: list[int], length: int) -> np.ndarray:
    """Logits (time, vocabulary) of the next tokens of a sequence that is then `length` tokens long; a view."""
    request.infer({"input_ids": np.array([ids]), "attention_mask": np.ones((1, length), np.int64)})
    return request.get_tensor("logits").data[0]


def make_stateful(model) -> None:
    """Keep keys and values in the engine from call to call, in place, for one sequence at a time."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    shapes, pairs = {"input_ids": [1, -1], "attention_mask": [1, -1]}, {}
    attention = next(op for op in model.get_ops() if op.get_type_name() == "GroupQueryAttention")
    for one in model.inputs:
        name = one.get_any_name()
        if name.startswith("past_key_values."):
            heads = one.partial_shape[1].get_length()
            shapes[name] = [1, heads, -1, _width(attention.input_value(1))]
            pairs[name] = name.replace("past_key_values", "present")
    model.reshape(shapes)
    apply_make_stateful_transformation(model, pairs)


def _width(output) -> int:
    """The last dimension of a tensor in the graph."""
    return output.get_partial_shape()[-1].get_length()


def compress(folder: Path, mode: str) -> int:
    """Round the weights of an exported float graph with NNCF, in place; returns their bytes.

    At 4 bits in groups of 64, head and embedding keep 8, which is NNCF's default for the last layer.
    """
    import nncf
    import onnx

    from edgelab.runtimes import onnx_export

    settings = {"group_size": 64} if mode.startswith("INT4") else {}
    graph = nncf.compress_weights(
        onnx.load(folder / GRAPH),
        mode=nncf.CompressWeightsMode[mode],
        ignored_scope=nncf.IgnoredScope(
            types=["Gather"]
        ),  # a tied embedding is read through the head's integers
        **settings,
    )
    for old in (onnx_export.GRAPH, onnx_export.DATA):
        (folder / old).unlink()
    onnx_export.save(graph, folder / GRAPH)
    return onnx_export.weights_bytes(graph)


def last_logits(model) -> None:
    """Make the logits of the last token alone, in place: the head is a fifth of the work of a prompt."""
    from openvino import opset13

    head = model.output("logits").get_node().input_value(0).get_node()
    last, end, one, axis = (np.array([value]) for value in (-1, np.iinfo(np.int64).max, 1, 1))
    head.input(0).replace_source_output(opset13.slice(head.input_value(0), last, end, one, axis).output(0))
    model.validate_nodes_and_infer_types()


def describe(model) -> str:
    """How the matrices are stored, read from the graph."""
    types = {
        op.get_element_type().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and len(op.shape) >= 2 and op.get_element_type().size <= 1
    }
    stored = sorted(types & {"u4", "i4", "u8", "i8"})
    return f"{' + '.join(stored)} weights, int8 activations" if stored else "float32"
