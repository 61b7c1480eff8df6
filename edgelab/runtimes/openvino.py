"""OpenVINO: a GGUF file with our integers, turned into OpenVINO's own graph once, and compiled for this CPU.

OpenVINO GenAI reads GGUF and keeps its integers: 4 and 8 bits with a scale and a zero-point for each block of 32. The
CPU plugin multiplies them with activations that it rounds to int8 in blocks of 32; keys and values are kept in int8,
in blocks, too; both are its defaults, and all else is float32 here. `native.int8` and `native.int4` start from
float16 weights, which NNCF rounds. Layouts that this reader does not know are traced from PyTorch instead, in float32:
see `openvino_export`. Where scores go through a cap, as in Gemma 2, keys and values stay in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgelab.runtimes import EngineMissing, RuntimeRefused, cannot_load, refusals
from edgelab.runtimes.session import Graph, TwoGraphs
from edgelab.storage import variants
from edgelab.storage.description import Description

try:
    import openvino
except ImportError:
    openvino = None

GRAPH = "openvino_model.xml"
READ = ("llama", "qwen2", "qwen3")  # that OpenVINO GenAI reads from GGUF
TRACED = ("mistral", "phi", "phi3", "gemma", "gemma2", "gemma3_text")  # from PyTorch, by `openvino_export`
WINDOWED = ("mistral", "phi3", "gemma2", "gemma3_text")  # whose layers may see a window of the text only
LAYOUTS = (*READ, *TRACED)
SMALL_TYPES = ("u4", "i4", "u8", "i8")


@cache
def core() -> openvino.Core:
    """The one Core of this process.

    Every Core with a CPU plugin brings a stack for signal handlers, and puts the one before it back when it goes. Where
    the first of two goes first, the second puts back one that is no more, and the next Ctrl-C ends the process with a
    segmentation fault.
    """
    return openvino.Core()


class OpenVino(TwoGraphs):
    """A stateful graph on the CPU plugin, compiled twice: for the last position, and for every one when asked."""

    tolerance = 0.1  # taking tokens back rounds int8 keys and values anew: as far off as before
    cache_bits = 8  # KV_CACHE_PRECISION of the CPU plugin

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """What GGUF holds, on grids whose zero-points are whole: OpenVINO makes integers of a block's minimum."""
        from edgelab.runtimes import gguf

        if reason := _foreign_model(about):
            return reason
        if about.marks.cache is not None:
            return "OpenVINO keeps keys and values in its own way; a quantized cache runs on 'torch'."
        if any(how.get("activation") for how in about.matrices.values()):
            return (
                "OpenVINO rounds activations in a way of its own; calibrated or row-wise ones run on 'torch'."
            )
        if any(
            how.get("zero_point") == "float" or how.get("bits") in (1, 5) for how in about.matrices.values()
        ):
            return "OpenVINO's reader knows 4 and 8 bits with whole zero-points; other grids run on 'torch'."
        if about.layout in TRACED:
            return _foreign_matrix(about)
        if about.marks.native is None and about.dtype != "float16" and not about.matrices:
            return (
                f"OpenVINO's reader knows no {about.dtype} in GGUF; quantize.fp16 is the float that it takes."
            )
        reason = gguf.refusal(about)
        return reason and f"OpenVINO reads GGUF here. {reason}"

    @staticmethod
    def export(variant: Path, folder: Path) -> int:
        """Write a GGUF file, have it read and converted; returns the bytes of all constants of the graph."""
        if openvino is None:
            raise EngineMissing("OpenVINO", "runtimes")
        import openvino_genai

        from edgelab.runtimes import gguf

        file = folder / "model.gguf"
        about = variants.read_description(variant)
        native = about.marks.native
        if about.layout in TRACED:
            from edgelab.runtimes import openvino_export

            openvino_export.write(variant, folder / GRAPH)
            if native is not None:
                compress(folder / GRAPH, native)
            return (folder / GRAPH).with_suffix(".bin").stat().st_size
        if native is None:
            gguf.write(variant, file)
        else:  # float16 is the only float that the reader takes
            model = halved(variants.load(variant))
            gguf.write_model(model, variant, file, model.config.model_type, f"native.{native}")
        try:
            openvino_genai.LLMPipeline(str(file), "CPU", enable_save_ov_model=True)
        except (RuntimeError, IndexError):
            # For its tokenizer, or for the pipeline as a whole; the graph, all that runs here, is written before.
            if not (folder / GRAPH).with_suffix(".bin").is_file():
                raise
        file.unlink()
        if native is not None:
            compress(folder / GRAPH, native)
        return (folder / GRAPH).with_suffix(".bin").stat().st_size

    def __init__(self, folder: Path, threads: int) -> None:
        if openvino is None:
            raise EngineMissing("OpenVINO", "runtimes")
        super().__init__()
        self.file, self.threads = folder / GRAPH, threads
        model = self._read_file()
        stored = matrices(model)
        self.vocabulary = model.output("logits").get_partial_shape()[2].get_length()
        last_logits(model)
        compiled = self._compiled(model)
        rounds = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) > 0
        self.kernel = f"{stored} weights{', int8 activations' * rounds}" if stored else "float32"
        self._graphs[False] = Stateful(compiled.create_infer_request())

    def _open(self, every: bool) -> Graph:
        return Stateful(self._compiled(self._read_file()).create_infer_request())

    def _read_file(self):
        with self._refusing():
            return core().read_model(self.file)

    def _compiled(self, model):
        options = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": "f32"}
        with self._refusing():
            return core().compile_model(model, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise cannot_load("OpenVINO", self.file.parent, error) from None


def _foreign_model(about: Description) -> str | None:
    """What the reader leaves out without a word is refused."""
    if about.layout == "llama" and (about.config.get("attention_bias") or about.config.get("mlp_bias")):
        return f"OpenVINO's reader leaves the biases of a {about.layout} model out; use 'torch'."
    return (
        refusals.foreign_layout(about, LAYOUTS, "OpenVINO", WINDOWED)
        or refusals.own_shape(
            about, "The export to OpenVINO" if about.layout in TRACED else "OpenVINO's reader"
        )
        or (about.layout in TRACED and _untraceable(about))
        or (about.layout in READ and refusals.rotary_scaling(about, (), "OpenVINO's reader"))
        or None
    )


def _untraceable(about: Description) -> str | None:
    """What a traced graph cannot follow: rotary frequencies that change with the length, unusual attention."""
    return refusals.rotary_scaling(
        about, refusals.TRACEABLE, "The export to OpenVINO"
    ) or refusals.unusual_attention(about, "The export to OpenVINO")


def _foreign_matrix(about: Description) -> str | None:
    """Matrices on other than uniform grids, or floats that are neither 32 nor 16 bits wide."""
    if about.dtype not in ("float32", "float16"):
        return f"The export to OpenVINO knows float32 and float16, not {about.dtype}; use 'torch'."
    for name in about.matrices:
        if (how := about.how(name))["format"] != "uniform":
            return f"OpenVINO multiplies uniform grids here; a {how['format']} runs on 'torch'."
    return None


class Stateful:
    """A request of a graph that keeps keys and values as its state."""

    def __init__(self, request: openvino.InferRequest) -> None:
        self._request, self.length = request, 0

    def read(self, ids: list[int]) -> Tensor:
        after = self.length + len(ids)
        self._request.infer(
            {
                "input_ids": np.array([ids]),
                "attention_mask": np.ones((1, after), np.int64),
                "position_ids": np.arange(self.length, after)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self.length = after
        return torch.from_numpy(self._request.get_tensor("logits").data[0].copy())

    def cut(self, length: int) -> None:
        if length == 0:
            self._request.reset_state()
        else:
            for kept in self._request.query_state():  # (1, heads, tokens, head_dim) each
                kept.state = openvino.Tensor(np.ascontiguousarray(kept.state.data[:, :, :length]))
        self.length = length


def halved(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float16, in place. Raises RuntimeRefused where that moves a tensor by more than its precision."""
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        largest = values.abs().amax()
        if not (values.half().float() - values).abs().amax() <= 2**-10 * largest:
            raise RuntimeRefused(
                f"OpenVINO's quantizer starts from float16 here, whose range does not hold {name}, with values up to "
                f"{float(largest):.3g}; use 'torch' or 'onnxruntime'."
            )
    return model.half()


def compress(file: Path, width: str) -> None:
    """Round the weights of a float graph with NNCF, in place: int8 per row; int4 in groups of 64, the head in int8."""
    try:
        import nncf
    except ImportError:
        raise EngineMissing("NNCF", "runtimes") from None

    int4 = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 64}
    settings = int4 if width == "int4" else {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    model = nncf.compress_weights(core().read_model(file), **settings)
    draft = file.with_name(f"rounded_{file.name}")
    openvino.save_model(model, draft, compress_to_fp16=False)
    del model  # it has the old file open
    for suffix in (".xml", ".bin"):
        draft.with_suffix(suffix).replace(file.with_suffix(suffix))


def last_logits(model) -> None:
    """Make the logits of the last token alone, in place: the head is a fifth of the work of a prompt."""
    from openvino import opset13

    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    last, end, one, axis = (np.array([value]) for value in (-1, np.iinfo(np.int64).max, 1, 1))
    head.input(0).replace_source_output(opset13.slice(head.input_value(0), last, end, one, axis).output(0))
    model.validate_nodes_and_infer_types()


def matrices(model) -> str:
    """How the matrices are stored, read from the graph; empty where none is smaller than a float."""
    stored = {
        op.get_element_type().get_type_name()
        for op in model.get_ops()
        if op.get_type_name() == "Constant" and len(op.shape) > 1 and op.shape[-1] > 1
    }
    return " + ".join(sorted(stored & set(SMALL_TYPES)))
