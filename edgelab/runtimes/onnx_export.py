"""ONNX with our integers: the builder of ONNX Runtime GenAI makes the graph, and we put our matrices into it.

The builder writes the model in float32. Each product with a quantized matrix then becomes a `MatMulNBits`, whose
weights, scales and zero-points are ours to the bit; a quantized embedding is read by `GatherBlockQuantized`. Query, key
and value stand under one another in one product where their grids are of one kind: a fifth fewer kernels to start.

| ours                         | in the graph                                                         |
| ---------------------------- | -------------------------------------------------------------------- |
| 1 to 4 bits; 5 to 8 bits     | 4 bits; 8 bits, each integer as it is                                |
| groups, whole rows           | blocks of the largest power of two that divides the group, 16 to 256 |
| scale float16                | float32, the same number                                             |
| zero-point, whole or between | 4 or 8 bits, or float32                                              |

The builder guesses some numbers, or leaves them out, so that these are put in afterwards, too: the tables of the rotary
embedding, from the frequencies of transformers, and what Gemma multiplies its embedding by. Of a model with longrope
the graph has the frequencies for short texts, and reads no longer ones.

Two graphs share the weights: `model.onnx` makes the logits of the last token alone, which is all that generating
needs, `scoring.onnx` those of every position.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from edgelab.runtimes.onnxruntime import SCORING, WINDOWED
from edgelab.runtimes.refusals import forgets
from edgelab.storage import variants
from edgelab.storage.bits import pack
from edgelab.storage.layers import PackedEmbedding, PackedLinear, packed_layers, unpacked
from edgelab.storage.uniform import QuantizedTensor

GRAPH, DATA = "model.onnx", "model.onnx.data"
ROTARY_TABLES = ("cos_cache", "sin_cache")
SMALL = 1024  # bytes; smaller tensors stay in the graph's own file


def export(variant: Path, folder: Path, precision: str = "fp32") -> int:
    """Write both graphs and the configuration of ONNX Runtime GenAI into a folder; returns the bytes of weights.

    precision: that of the builder, "fp32", or "int4" and "int8" for its own rounding.
    """
    import onnx

    model = variants.load(variant)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        dense, built = Path(place) / "dense", Path(place) / "built"
        _save_dense(model, variant, dense)
        _build(dense, built, precision, fuse_qkv=_grids_agree(model))
        graph = onnx.load(built / GRAPH)
        for name in ("genai_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (built / name).exists():
                shutil.copy(built / name, folder / name)
    put_integers(graph, model)
    put_rotary_tables(graph, model)
    put_multiplier(graph, model)
    onnx.save_model(
        graph,
        folder / GRAPH,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=DATA,
        size_threshold=SMALL,
        convert_attribute=False,
    )
    graph = onnx.load(folder / GRAPH, load_external_data=False)
    _score_all(graph)
    onnx.save_model(graph, folder / SCORING)
    return weights_bytes(graph)


def weights_bytes(graph) -> int:
    """Bytes of all initializers but the tables of the rotary embedding, wherever their data are."""
    from onnx import TensorProto, helper

    halves = (TensorProto.INT4, TensorProto.UINT4)
    return sum(
        int(np.prod(tensor.dims))
        * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        // (2 if tensor.data_type in halves else 1)
        for tensor in graph.graph.initializer
        if not tensor.name.startswith(ROTARY_TABLES)
    )


def _save_dense(model: PreTrainedModel, variant: Path, folder: Path) -> None:
    """The model in float32 as a folder of transformers, with its tokenizer."""
    dense = unpacked(model) if packed_layers(model) else model
    dense.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(own_settings(dense.config)))
    for file in variant.iterdir():
        if file.is_file() and file.name not in ("model.safetensors", "variant.json", "config.json"):
            shutil.copy(file, folder / file.name)


def own_settings(config: PretrainedConfig) -> dict:
    """The settings that a class of transformers has: the builder follows every one that it finds in the file."""
    has = {*type(config)().to_dict(), "head_dim"}
    kept = {name: value for name, value in config.to_dict().items() if name in has}
    if "sliding_window" in kept and not forgets(kept):  # longer than any text
        kept["sliding_window"] = None
    return kept


def in_the_builders_words(config: PretrainedConfig) -> None:
    """Say, in place, what the builder looks for under another name or takes from nowhere.

    That a window is in every layer; the epsilon of Phi's layer norms; one plain rotary embedding instead of any
    scaled one, whose tables `put_rotary_tables` writes; and as many positions as those tables have.
    """
    if config.model_type in WINDOWED and config.sliding_window and not getattr(config, "layer_types", None):
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    if hasattr(config, "layer_norm_eps"):
        config.rms_norm_eps = config.layer_norm_eps
    if config.rope_parameters.get("rope_type") == "longrope":
        config.max_position_embeddings = config.original_max_position_embeddings
    elif hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = config.max_position_embeddings
    config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config.rope_local_base_freq = 10000.0
    if (
        config.model_type == "gemma3_text"
    ):  # whose class has the setting, and whose attention does not follow it
        config.attn_logit_softcapping = None


def _build(dense: Path, folder: Path, precision: str, fuse_qkv: bool) -> None:
    """Run the builder, whose remarks go to the log."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    said = io.StringIO()
    where = (None, str(dense), str(folder), precision, "cpu", str(folder / "cache"))
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), _head_known():
        options = parse_extra_options(
            *where, [f"fuse_qkv={str(fuse_qkv).lower()}", "prune_lm_head=true", "windowed_kv_cache=false"]
        )
        in_the_builders_words(options["hf_details"]["hf_config"])
        create_model(*where, **options)
    logging.getLogger(__name__).debug(said.getvalue())


@contextlib.contextmanager
def _head_known() -> Iterator[None]:
    """Let the builder know the head, for which it takes any layer with as many outputs as there are tokens."""
    from onnxruntime_genai.models.builder import Model

    guess = Model.has_lm_head
    Model.has_lm_head = lambda builder, module: module is builder.weights.get_output_embeddings()
    try:
        yield
    finally:
        Model.has_lm_head = guess


def put_integers(graph, model: PreTrainedModel) -> None:
    """Replace, in place, the products with quantized matrices of a float graph of the builder by ours."""
    from onnx import helper, numpy_helper

    packed = _matrices(model)
    left = set(packed)
    nodes, added = [], []
    made: dict[int, list[str]] = {}  # a tied matrix is stored once

    def place(name: str, *tensors: QuantizedTensor) -> list[str]:
        if id(tensors[0]) not in made:
            each = [blocks(tensor) for tensor in tensors]
            made[id(tensors[0])] = [f"{name}.{part}" for part in each[0]]
            for part in each[0]:
                array = np.concatenate([arrays[part] for arrays in each])
                added.append(numpy_helper.from_array(array, f"{name}.{part}"))
        return made[id(tensors[0])]

    for node in graph.graph.node:
        name = node.input[1].removesuffix(".MatMul.weight") if node.op_type == "MatMul" else ""
        names = [name]
        if name.endswith("qkv_proj") and name not in packed:
            names = [name.replace("qkv", one) for one in "qkv"]
        if not packed.keys() & names:
            nodes.append(node)
            continue
        left -= set(names)
        tensors = [packed[name] for name in names]
        tensor, columns = tensors[0], tensors[0].integers.shape[1]
        rows = sum(len(one.integers) for one in tensors)
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], *place(name, *tensors)],
                node.output,
                node.name.replace("MatMul", "MatMulNBits"),
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=width(tensor),
                block_size=block_size(tensor),
                accuracy_level=4 if whole_zero_points(tensor) else 0,
            )
        )
    if left:
        raise ValueError(f"the graph lacks {', '.join(sorted(left))}")
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        tensor = embedding.tensor
        names = place("model.embed_tokens", tensor)
        flat = [f"{name}.flat" for name in names]
        nodes = [*_flatten(names, len(tensor.integers)), *_look_up(nodes, tensor, flat)]
    used = {name for node in nodes for name in node.input}
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    # Those that stay are not copied: protobuf copies no more than 2 GiB, and a large float embedding has more.
    initializers = graph.graph.initializer
    for index in reversed(range(len(initializers))):
        if initializers[index].name not in used:
            del initializers[index]
    initializers.extend(added)


def put_rotary_tables(graph, model: PreTrainedModel) -> None:
    """Write the cosines and sines that transformers computes over those of the builder, in place.

    Each table is (positions, rotated dimensions / 2) float32; Gemma 3 has two of them, for its two kinds of layers.
    """
    from onnx import numpy_helper

    rotary = model.base_model.rotary_emb
    kinds = {"_global": "full_attention_", "_local": "sliding_attention_"}
    for tensor in graph.graph.initializer:
        if not tensor.name.startswith(ROTARY_TABLES):
            continue
        kind = next((words for part, words in kinds.items() if tensor.name.endswith(part)), "")
        frequencies, scaling = (getattr(rotary, f"{kind}{one}") for one in ("inv_freq", "attention_scaling"))
        angles = torch.outer(torch.arange(tensor.dims[0]).float(), frequencies.float())
        table = (angles.cos() if tensor.name.startswith("cos") else angles.sin()) * scaling
        tensor.CopyFrom(numpy_helper.from_array(table.numpy(), tensor.name))


def put_multiplier(graph, model: PreTrainedModel) -> None:
    """Multiply the rows of an embedding by the number that the model has, in place; the builder rounds it."""
    from onnx import numpy_helper

    embedding, name = model.get_input_embeddings(), "model.embed_tokens.multiplier"
    multiplier = getattr(embedding, "multiplier", None) or getattr(embedding, "scalar_embed_scale", 1.0)
    for node in graph.graph.node:
        if node.name == "/model/embed_tokens/Mul":
            node.input[1] = name
            graph.graph.initializer.append(numpy_helper.from_array(np.float32(multiplier), name))


def _matrices(model: PreTrainedModel) -> dict[str, QuantizedTensor]:
    """Our matrices, by the names of the builder, which takes the gate and the up projection of one matrix apart."""
    found = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        if name.endswith(".gate_up_proj"):
            half = layer.out_features // 2
            found[name.replace("gate_up", "gate")] = _rows(layer.tensor, slice(None, half))
            found[name.replace("gate_up", "up")] = _rows(layer.tensor, slice(half, None))
        else:
            found[_in_graph(name)] = layer.tensor
    return found


def _rows(tensor: QuantizedTensor, which: slice) -> QuantizedTensor:
    """Some rows of a matrix, with their scales and zero-points; one scale for all of it stays."""
    scale, zero_point = (
        one if one is None or len(one) == 1 else one[which] for one in (tensor.scale, tensor.zero_point)
    )
    return QuantizedTensor(tensor.integers[which], scale, zero_point, tensor.bits)


def _grids_agree(model: PreTrainedModel) -> bool:
    """Whether query, key and value of every layer can be one product: all float, or on grids of one kind."""
    layers = dict(model.named_modules())
    parents = [name.removesuffix("q_proj") for name in layers if name.endswith(".q_proj")]
    return all(len({_grid(layers[f"{parent}{one}_proj"]) for one in "qkv"}) == 1 for parent in parents)


def _grid(layer: nn.Module) -> tuple | None:
    """Bits, block size and kind of zero-points in the graph; None for a float layer."""
    if not isinstance(layer, PackedLinear):
        return None
    tensor = layer.tensor
    return width(tensor), block_size(tensor), whole_zero_points(tensor), _symmetric(tensor)


def _symmetric(tensor: QuantizedTensor) -> bool:
    """Whether every zero-point is the one that MatMulNBits takes where none is given."""
    return bool((tensor.centre() == 2 ** (width(tensor) - 1)).all())


def _flatten(names: list[str], rows: int) -> list:
    """MatMulNBits keeps blocks apart and a lookup does not: nodes that give `name.flat` of shape (rows, all else)."""
    from onnx import TensorProto, helper

    shape = helper.make_tensor("rows", TensorProto.INT64, [2], [rows, -1])
    flat = [helper.make_node("Reshape", [name, "rows"], [f"{name}.flat"]) for name in names]
    return [helper.make_node("Constant", [], ["rows"], value=shape), *flat]


def _look_up(nodes: list, tensor: QuantizedTensor, names: list[str]) -> list:
    """The nodes with the lookup of the embedding on packed rows."""
    from onnx import helper

    packed, scale, *zero_point = names
    changed = []
    for node in nodes:
        if node.name == "/model/embed_tokens/Transpose":
            continue
        if node.name == "/model/embed_tokens/Gather":
            node = helper.make_node(
                "GatherBlockQuantized",
                [packed, node.input[1], scale, *zero_point],
                node.output,
                node.name,
                domain="com.microsoft",
                bits=width(tensor),
                block_size=block_size(tensor),
                gather_axis=0,
                quantize_axis=1,
            )
        changed.append(node)
    return changed


def blocks(tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    """The inputs of MatMulNBits after the activations: weights, scales and, unless all are the default, zero-points.

    weights: (out_features, blocks, block_size x bits / 8) uint8, the first of two integers in the lower half of a byte.
    scales: (out_features, blocks) float32. zero_points: (out_features, ceil(blocks x bits / 8)) uint8, or
    (out_features, blocks) float32 where they lie between integers.
    """
    bits, size = width(tensor), block_size(tensor)
    rows, columns = tensor.integers.shape
    repeats = tensor.group_size // size
    scale = tensor.scale.float().expand(rows, -1).repeat_interleave(repeats, 1)
    arrays = {
        "qweight": pack(tensor.integers, bits).view(rows, columns // size, size * bits // 8).numpy(),
        "scales": scale.numpy(),
    }
    if _symmetric(tensor):
        return arrays
    centre = tensor.centre().expand(rows, -1).repeat_interleave(repeats, 1)  # (out_features, blocks)
    if not whole_zero_points(tensor):
        return arrays | {"qzeros": centre.contiguous().numpy()}
    return arrays | {"qzeros": _pack_rows(centre.to(torch.uint8), bits).numpy()}


def _pack_rows(integers: Tensor, bits: int) -> Tensor:
    """Pack each row by itself, filled up to whole bytes."""
    odd = bits == 4 and integers.shape[1] % 2
    padded = torch.nn.functional.pad(integers, (0, 1)) if odd else integers
    return pack(padded.contiguous(), bits).view(len(integers), -1)


def width(tensor: QuantizedTensor) -> int:
    """Bits that the graph has for an integer."""
    return 4 if tensor.bits <= 4 else 8


def block_size(tensor: QuantizedTensor) -> int:
    """The largest power of two that divides the group, at most 256; below 16 the operator has none."""
    return min(tensor.group_size & -tensor.group_size, 256)


def whole_zero_points(tensor: QuantizedTensor) -> bool:
    """Whether every zero-point is an integer."""
    return bool((tensor.centre() % 1 == 0).all())


def _in_graph(name: str) -> str:
    """What the builder calls a layer of transformers."""
    return name.replace(".self_attn.", ".attn.").replace(".attn.dense", ".attn.o_proj")


def _score_all(graph) -> None:
    """Give the head every position again, in place."""
    nodes = {node.name: node for node in graph.graph.node}
    gather, unsqueeze = nodes["/lm_head/prune/Gather"], nodes["/lm_head/prune/Unsqueeze"]
    for node in graph.graph.node:
        node.input[:] = [gather.input[0] if name == unsqueeze.output[0] else name for name in node.input]
    for node in (gather, unsqueeze):
        graph.graph.node.remove(node)
    used = {name for node in graph.graph.node for name in node.input}
    for tensor in [one for one in graph.graph.initializer if one.name not in used]:
        graph.graph.initializer.remove(tensor)
    output = next(one for one in graph.graph.output if one.name == "logits")
    output.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
