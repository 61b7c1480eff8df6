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

from edgelab import variants
from edgelab.runtimes import EngineMissing, RuntimeRefused

PAGE = 1024  # tokens the cache is made for; a longer text doubles them

try:
    import onnxruntime
    import onnxruntime_genai
except ImportError:
    onnxruntime_genai = None


class OnnxRuntime:
    """A graph of `onnx_export` on the CPU."""

    badge = "runtime"
    packages = ("onnxruntime", "onnxruntime-genai")
    model = None
    gives_logits = True
    version = 2  # 2: query, key and value in one product
    cache_bits = 32
    spare = ()
    provider = "CPUExecutionProvider"

    @staticmethod
    def refusal(about: dict) -> str | None:
        """Weights on uniform grids, or float32; activations and cache are the engine's affair."""
        if about["cache"] is not None:
            return "ONNX Runtime keeps keys and values in float32 here; a quantized cache runs on 'torch'."
        if about["native"] is None and about["dtype"] != "float32":
            return "ONNX Runtime computes in float32 on a CPU; give it float32 or integers."
        layers = about["quantized"].values()
        if any(how.get("grid") == "codebook" for how in layers):
            return "MatMulNBits has uniform grids only; a codebook runs on 'torch'."
        if any(how.get("activation") for how in layers):
            return "MatMulNBits rounds activations in a way of its own; calibrated or row-wise ones run on 'torch'."
        odd = next(
            (how["group_size"] for how in layers if "group_size" in how and how["group_size"] % 16), None
        )
        if odd is not None:
            return f"MatMulNBits wants groups that 16 divides, not {odd}; use 32 or 64."
        return None

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write the graphs. Raises RuntimeRefused for a layout that the export does not know."""
        if onnxruntime_genai is None:
            raise EngineMissing("ONNX Runtime GenAI", "runtimes")
        from edgelab.runtimes import onnx_export

        onnx_export.check_layout(variant)
        native = variants.read_about(variant)["native"]
        return onnx_export.export(variant, folder, native or "fp32")

    def __init__(self, folder: Path, threads: int) -> None:
        if onnxruntime_genai is None:
            raise EngineMissing("ONNX Runtime GenAI", "runtimes")
        self.folder, self.threads = folder, threads
        options = {"intra_op_num_threads": threads, "log_severity_level": 3}
        with _refusing(folder):
            config = onnxruntime_genai.Config(str(folder))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
            self.engine = onnxruntime_genai.Model(config)
            self.kernel = describe(folder)
        self._generator, self._room, self._scoring = None, 0, None

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; returns the most likely next token."""
        if self._generator is None or len(ids) >= self._room:
            self._start(max(PAGE, 2 * len(ids)))
        else:
            self._generator.rewind_to(0)
        self._ids = list(ids)
        return self._step(ids)

    def decode(self, token: int) -> int:
        """Go on by one token; returns the most likely next one."""
        self._ids.append(token)
        if len(self._ids) >= self._room:
            return self.prefill(self._ids)
        return self._step([token])

    def _start(self, room: int) -> None:
        parameters = onnxruntime_genai.GeneratorParams(self.engine)
        parameters.set_search_options(max_length=room, do_sample=False, past_present_share_buffer=True)
        self._generator, self._room = onnxruntime_genai.Generator(self.engine, parameters), room

    def _step(self, ids: list[int]) -> int:
        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        return int(self._generator.get_logits()[0, -1].argmax())

    def logits(self, ids: list[int]) -> Tensor:
        """Logits at every position of a new sequence, (time, vocabulary) float32."""
        session = self._session()
        decoder = json.loads((self.folder / "genai_config.json").read_text())["model"]["decoder"]
        past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
        inputs = {
            one.name: past for one in session.get_inputs()
        }  # keys and values of a past that is not there
        inputs |= {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        (found,) = session.run(["logits"], inputs)
        return torch.from_numpy(found[0]).float()

    def _session(self):
        if self._scoring is None:
            from edgelab.runtimes.onnx_export import SCORING

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = self.threads, 3
            with _refusing(self.folder):
                self._scoring = onnxruntime.InferenceSession(
                    self.folder / SCORING, options, providers=[self.provider]
                )
        return self._scoring

    def top(self, ids: list[int], count: int) -> list[tuple[int, float]]:
        """The most likely next tokens of a new sequence with their log-probabilities, best first."""
        found = torch.log_softmax(self.logits(ids)[-1], -1).topk(count)
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def close(self) -> None:
        """Forget graph, cache and sessions."""
        self._generator = self._scoring = self.engine = None


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """One sentence for what the library says of a damaged file; its errors have no common class."""
    try:
        yield
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise RuntimeRefused(
            f"{folder} holds no graph that ONNX Runtime can load ({reason}); remove it, and it is written anew."
        ) from None


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
