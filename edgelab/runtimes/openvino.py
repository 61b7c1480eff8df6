"""OpenVINO: a GGUF file with our integers, turned into OpenVINO's own graph once, and compiled for this CPU.

OpenVINO GenAI reads GGUF and keeps its integers: 4 and 8 bits with a scale and a zero-point for each block of 32. The
CPU plugin multiplies them with activations that it rounds to int8 in blocks of 32; keys and values are kept in int8,
in blocks, too; both are its defaults, and all else is float32 here. `native.int8` and `native.int4` start from
float16 weights, which NNCF rounds. What this reader does not take as it is, for its layout or a setting, is traced from
PyTorch instead, in float32: see `openvino_export`. Where scores go through a cap, as in Gemma 2, keys and values stay
in float32.
"""

from __future__ import annotations

import contextlib
import math
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
SHORT = "edgelab_short"  # note in a graph: tokens of the longest text that has LongRoPE's short factors
READ = ("llama", "qwen2", "qwen3")  # that OpenVINO GenAI reads from GGUF
LAYOUTS = (*READ, "mistral", "phi", "phi3", "gemma", "gemma2", "gemma3_text")  # that `openvino_export` traces
WINDOWED = ("mistral", "phi3", "gemma2", "gemma3_text")  # whose layers may see a window of the text only
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
        """Uniform grids with whole zero-points, and floats; OpenVINO rounds activations and the cache by itself."""
        if reason := refusals.foreign_layout(about, LAYOUTS, "OpenVINO", WINDOWED):
            return reason
        if about.marks.cache is not None:
            return "OpenVINO keeps keys and values in its own way; a quantized cache runs on 'torch'."
        if any(how.get("activation") for how in about.matrices.values()):
            return (
                "OpenVINO rounds activations in a way of its own; calibrated or row-wise ones run on 'torch'."
            )
        return None if is_read(about) else _untraceable(about)

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
        if not is_read(about):
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
        self.short = int(model.get_rt_info(SHORT).value) if model.has_rt_info(SHORT) else math.inf
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


def is_read(about: Description) -> bool:
    """Whether OpenVINO's reader takes a variant from GGUF as it is. It leaves some settings out without a word."""
    from edgelab.runtimes import gguf

    biases = about.layout == "llama" and (about.config.get("attention_bias") or about.config.get("mlp_bias"))
    halves = about.dtype == "float16" or about.marks.native  # the only floats that it takes by themselves
    return bool(
        about.layout in READ
        and (about.matrices or halves)
        and not biases
        and not about.shapes
        and not any(_between(how) or how.get("bits") == 5 for how in about.matrices.values())
        and refusals.rotary_scaling(about, (), "OpenVINO's reader") is None
        and gguf.refusal(about) is None
    )


def _between(how: dict) -> bool:
    """Whether a matrix has zero-points between integers; OpenVINO's are integers."""
    return how.get("zero_point") == "float" or how.get("bits") == 1


def _untraceable(about: Description) -> str | None:
    """What a traced graph does not hold: some grids and floats, layers of other shapes, unusual attention."""
    engine = "The export to OpenVINO"
    for name in about.matrices:
        how = about.how(name)
        if how["format"] != "uniform":
            return f"OpenVINO multiplies uniform grids here; a {how['format']} runs on 'torch'."
        if _between(how):
            return "OpenVINO multiplies grids with whole zero-points here; other grids run on 'torch'."
    if about.dtype not in ("float32", "float16"):
        return f"{engine} knows float32 and float16, not {about.dtype}; use 'torch'."
    return (
        refusals.own_shape(about, engine)
        or refusals.rotary_scaling(about, refusals.known_scaling(about), engine)
        or refusals.unusual_attention(about, engine)
    )


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
