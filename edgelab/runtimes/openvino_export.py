"""OpenVINO's graph of a model that its reader of GGUF does not take: traced from PyTorch, with our integers put in.

The keys and values of a layer go in and come out of the traced step, and OpenVINO makes them its state. A mask is
computed from positions, so that windows are in the graph. Each matrix of ours is a constant of 4 or 8 bits with scales
and zero-points, in the pattern that the CPU plugin multiplies as it is.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import openvino
import torch
from openvino import opset13
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgelab.model.logits import final_cap, short_text
from edgelab.runtimes.openvino import SHORT
from edgelab.storage import variants
from edgelab.storage.bits import pack
from edgelab.storage.kv_cache import head_shape
from edgelab.storage.layers import packed_layers, unpacked
from edgelab.storage.uniform import QuantizedTensor

ATTENTION = "edgelab_openvino"  # a name that transformers has no mask for
INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


class Grown:
    """Keys and values of before with those of a step behind them, as transformers' models use a cache."""

    def __init__(self, past: tuple[Tensor, ...], order: Tensor) -> None:
        self.past, self.order, self.present = past, order, {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Append (1, heads, time, head_dim); returns all that there is."""
        before = (one.index_select(0, self.order) for one in self.past[2 * layer : 2 * layer + 2])
        self.present[layer] = tuple(
            torch.cat([old, new], 2) for old, new in zip(before, (keys, values), strict=True)
        )
        return self.present[layer]

    def get_seq_length(self, *_: object) -> int:
        """Positions are given."""
        return 0


def attend(
    layer: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: None, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention of (1, heads, time, head_dim) to the last tokens, as many as the window has; (1, time, heads, ...)."""
    places, last = torch.arange(keys.shape[2])[None], layer.step.places[0][:, None]
    seen = places <= last
    if (window := kwargs.get("sliding_window")) is not None:
        seen = seen & (places > last - window)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    shape = (1, query.shape[1], keys.shape[2], keys.shape[3])
    groups = query.shape[1] // keys.shape[1]
    keys, values = (
        one[:, :, None].expand(1, one.shape[1], groups, *shape[2:]).reshape(shape) for one in (keys, values)
    )
    scaling = kwargs.get("scaling")
    if (cap := kwargs.get("softcap")) is None:
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=added, scale=scaling)
    else:
        scores = torch.tanh(query @ keys.transpose(2, 3) * (scaling / cap)) * cap + added
        found = scores.softmax(-1) @ values
    return found.transpose(1, 2).contiguous(), None


class Step(nn.Module):
    """A model as a function of INPUTS and the keys and values of each layer. Changes the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.places = model, None
        self.cap = final_cap(model.config)
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        for layer in model.modules():
            if hasattr(layer, "layer_idx") and hasattr(layer, "head_dim"):
                object.__setattr__(layer, "step", self)  # no submodule: it would be its own child

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor, order: Tensor, *past: Tensor) -> tuple:
        self.places, cache = places, Grown(past, order)
        hidden = self.model.base_model(
            input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True
        )[0]
        logits = self.model.lm_head(hidden)
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return (logits, *(one for layer in sorted(cache.present) for one in cache.present[layer]))


def write(variant: Path, file: Path) -> None:
    """Trace a variant, put its integers in and save the stateful graph."""
    model = variants.load(variant)
    packed = {name: layer.tensor for name, layer in packed_layers(model).items()}
    half = model.dtype == torch.float16
    dense = unpacked(model) if packed else model
    graph = trace(dense.float().eval())
    put_matrices(graph, packed, half)
    if (short := short_text(model.config)) < math.inf:
        graph.set_rt_info(short, SHORT)
    openvino.save_model(graph, file, compress_to_fp16=False)


def trace(model: PreTrainedModel) -> openvino.Model:
    """The graph of a float32 model, with INPUTS, logits of every position, and keys and values as its state."""
    config = model.config
    (heads, head_dim), depth = head_shape(config), config.num_hidden_layers
    past = [torch.randn(1, heads, 2, head_dim) for _ in range(2 * depth)]
    ids, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    example = (ids, mask, torch.tensor([[2, 3, 4]]), torch.zeros(1, dtype=torch.int32), *past)
    step = Step(model)
    with (
        torch.no_grad(),
        warnings.catch_warnings(action="ignore"),
    ):  # of a way of tracing that torch wants to leave
        step(*example)  # makes LongRoPE's second frequencies, which a later step finds
        graph = openvino.convert_model(step, example_input=example)
    names = [f"{layer}.{one}" for layer in range(depth) for one in ("key", "value")]
    shapes = [[1, -1]] * 3 + [[1]] + [[1, heads, -1, head_dim]] * len(names)
    for port, name, shape in zip(
        graph.inputs, [*INPUTS, *(f"past.{one}" for one in names)], shapes, strict=True
    ):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(openvino.PartialShape(shape))
    for port, name in zip(graph.outputs, ["logits", *(f"present.{one}" for one in names)], strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, {f"past.{one}": f"present.{one}" for one in names})
    empty = np.zeros((1, heads, 0, head_dim), np.float32)
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([opset13.constant(empty).output(0)])
    graph.validate_nodes_and_infer_types()
    return graph


def put_matrices(graph: openvino.Model, packed: dict[str, QuantizedTensor], half: bool) -> None:
    """Replace the weights of a traced graph by our integers, in place, and other matrices by float16 where wanted."""
    left = {id(tensor): name for name, tensor in packed.items()}
    made: dict[int, openvino.Output] = {}  # a tied matrix is stored once
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant" or len(node.shape) != 2:
            continue
        name = node.get_friendly_name().removeprefix("self.model.").removesuffix(".weight")
        if name in packed:
            tensor = packed[name]
            left.pop(id(tensor), None)
            found = made.setdefault(id(tensor), integers(tensor))
        elif half and node.get_element_type() == openvino.Type.f32:
            found = opset13.convert(opset13.constant(node.data.astype(np.float16)), "f32").output(0)
        else:
            continue
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(found)
    if left:
        raise ValueError(f"the graph lacks {', '.join(sorted(left.values()))}")
    graph.validate_nodes_and_infer_types()


def integers(tensor: QuantizedTensor) -> openvino.Output:
    """(out_features, in_features) as (integers - zero-points) x scales, by groups: 4 bits where they hold it, or 8."""
    rows, columns = tensor.integers.shape
    groups = tensor.scale.shape[1]
    width = 4 if tensor.bits <= 4 else 8
    kind = openvino.Type.u4 if width == 4 else openvino.Type.u8
    centre = tensor.centre().to(torch.uint8).expand(rows, groups)

    def stored(values: Tensor, shape: list[int]) -> openvino.Node:
        data = pack(values.contiguous(), width).numpy()
        whole = openvino.Tensor(kind, openvino.Shape(shape))  # its own memory: `data` goes when this returns
        whole.data.view(np.uint8).reshape(-1)[:] = data.reshape(-1)
        return opset13.convert(opset13.constant(whole), "f32")

    weight = stored(tensor.integers, [rows, groups, columns // groups])
    scale = tensor.scale.float().expand(rows, groups)[..., None].contiguous()
    moved = opset13.subtract(weight, stored(centre, [rows, groups, 1]))
    scaled = opset13.multiply(moved, opset13.constant(scale.numpy()))
    return opset13.reshape(scaled, opset13.constant(np.array([rows, columns])), False).output(0)
