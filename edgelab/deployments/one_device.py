"""One engine on this device: the simplest deployments. Each names the class that runs it, which is imported on use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgelab.recipes import deployment


@dataclass(frozen=True)
class OneDevice:
    """An engine that runs the whole model here.

    engine: "module:Class" in edgelab.runtimes. packages: beside PyTorch, whose versions decide what it does. extra:
    what installs them.
    """

    engine: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    in_torch: ClassVar[bool] = False  # runs the stored variant itself, without an export
    timed: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ()


@deployment("torch")
class Torch(OneDevice):
    """PyTorch as it is, with a packed kernel where there is one for how the weights are stored."""

    engine = "edgelab.runtimes.eager:Eager"
    in_torch = True


@deployment("simulated")
class Simulated(OneDevice):
    """PyTorch over dense float weights with the rounded values: quality only."""

    engine = "edgelab.runtimes.eager:Simulated"
    in_torch = True
    timed = False


@deployment("compiled")
class Compiled(OneDevice):
    """PyTorch through torch.compile."""

    engine = "edgelab.runtimes.compiled:Compiled"
    in_torch = True


@deployment("onnxruntime", version=2)  # 2: query, key and value in one product
class OnnxRuntime(OneDevice):
    """ONNX Runtime, generating with onnxruntime-genai."""

    engine = "edgelab.runtimes.onnxruntime:OnnxRuntime"
    packages = ("onnxruntime", "onnxruntime-genai")
    extra = "runtimes"


@deployment("openvino")
class OpenVino(OneDevice):
    """OpenVINO, generating with openvino-genai."""

    engine = "edgelab.runtimes.openvino:OpenVino"
    packages = ("openvino", "openvino-genai", "nncf")
    extra = "runtimes"


@deployment("llamacpp")
class LlamaCpp(OneDevice):
    """llama.cpp over a GGUF file."""

    engine = "edgelab.runtimes.llamacpp:LlamaCpp"
    packages = ("xllamacpp",)
    extra = "runtimes"


@deployment("executorch", version=2)
class ExecuTorch(OneDevice):
    """ExecuTorch with XNNPACK, as on a phone."""

    engine = "edgelab.runtimes.executorch:ExecuTorch"
    packages = ("executorch", "torchao")
    extra = "executorch"


@deployment("litert", version=2)
class LiteRt(OneDevice):
    """LiteRT, formerly TensorFlow Lite, as on a phone."""

    engine = "edgelab.runtimes.litert:LiteRt"
    packages = ("ai-edge-litert", "litert-torch")
    extra = "litert"
