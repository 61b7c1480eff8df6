"""GGUF files of variants: the integers that our techniques chose, as llama.cpp stores them.

A block is 32 weights of one row with a float16 scale d, and in the types that end in _1 a float16 minimum m:

| type | a weight is      | takes                                                                        |
| ---- | ---------------- | ---------------------------------------------------------------------------- |
| Q4_0 | (q - 8) d        | 2 to 4 bits, symmetric                                                       |
| Q4_1 | q d + m          | up to 4 bits with a zero-point, and 1 bit                                    |
| Q5_0 | (q - 16) d       | 5 bits, symmetric                                                            |
| Q5_1 | q d + m          | 5 bits with a zero-point                                                     |
| Q8_0 | q d, q signed    | 6 to 8 bits, symmetric; 6 and 7 bits with an integer zero-point              |

Our groups are whole numbers of blocks, whose scale is repeated. Integers and scales are kept bit for bit. The minimum
is -zero_point * scale rounded to float16, which moves the weights of a block together by at most 2**-11 of it. Fewer
than 4 bits cost 4.5 (Q4_0) or 5 (Q4_1) bits per weight in the file: the narrower types of llama.cpp have blocks of 256,
which small models are not made of, and grids of their own.

What the settings and tensors of each layout are called, and in which order rows stand, is in `gguf_files.layouts`.
Rows move whole, with their scales.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel

from edgelab.gguf_files import tokenizer_writer
from edgelab.gguf_files.layouts import (
    ACTIVATION,
    CAPS,
    ERF,
    LAYOUTS,
    Places,
    attention_scalar,
    full_attention,
    head_size,
    rotary_tensors,
    stated,
)
from edgelab.runtimes import RuntimeRefused, refusals
from edgelab.storage import adapters, variants
from edgelab.storage.description import Description
from edgelab.storage.layers import packed_layers
from edgelab.storage.uniform import QuantizedTensor

BLOCK = 32
TYPES_KEY = "edgelab.types"  # of the matrices, so that the engine can say what runs
OF_A_BLOCK = re.compile(r"\.(mlp|self_attn)\.")  # what may differ between the layers of a Deci
CHANNELS = "feed_forward_length"
SIZED = {  # a linear layer -> what its size says
    ".q_proj": "attention.head_count",
    ".k_proj": "attention.head_count_kv",
    ".mlp.up_proj": CHANNELS,
    ".mlp.fc1": CHANNELS,
    ".mlp.dense_h_to_4h": CHANNELS,
}
ROOM = 256  # llama.cpp rounds the length of a context up to whole ones
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # llama.cpp goes by these, whatever a file says
NEEDED = (*CAPS.values(), "sliding_window")  # llama.cpp puts a number of its own in place of these
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def stored_as(bits: int, zero_point: str | None) -> Type | None:
    """The type that holds a uniform grid, None where there is none. zero_point: None, "integer" or "float"."""
    if bits == 1 or (zero_point and bits <= 4):
        return Type.Q4_1
    if zero_point is None:
        return Type.Q4_0 if bits <= 4 else Type.Q5_0 if bits == 5 else Type.Q8_0
    if bits == 5:
        return Type.Q5_1
    return Type.Q8_0 if bits < 8 and zero_point == "integer" else None


def refusal(about: Description) -> str | None:
    """Why a variant cannot be written as GGUF or llama.cpp would compute it otherwise, in one sentence; else None."""
    return refusals.factored(about, "llama.cpp") or _foreign_matrix(about) or _foreign_model(about)


def _foreign_matrix(about: Description) -> str | None:
    for name in about.matrices:
        how = about.how(name)
        if how["format"] != "uniform":
            return f"GGUF has no type for the {how['format']} of {name}; use a uniform grid, such as quantize.rtn."
        bits = how["bits"]
        if stored_as(bits, how["zero_point"]) is None:
            return (
                f"GGUF keeps {bits} bits around zero only, and {name} has zero-points; use symmetric=true, or "
                "5 bits or fewer."
            )
        if how["group_size"] % BLOCK:
            return (
                f"GGUF gives each {BLOCK} weights a scale, and {name} has groups of {how['group_size']}; use a "
                f"group_size that {BLOCK} divides."
            )
        if "scale_exponent" in how:
            return (
                f"GGUF keeps scales in float16, whose range does not hold those of {name}; run it on torch or "
                "onnxruntime."
            )
    return None


def _foreign_model(about: Description) -> str | None:
    """What llama.cpp has no architecture for, or would compute otherwise."""
    config, kind = about.config, about.layout
    if (layout := LAYOUTS.get(kind)) is None:
        return f"The export to GGUF knows {', '.join(LAYOUTS)}, not {kind}; use 'torch'."
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in layout.activation:
        return (
            f"llama.cpp computes {kind} models with {layout.activation[0]}, and this one has {activation}; run it on "
            "torch."
        )
    for setting, values in layout.only.items():
        if config.get(setting, values[0]) not in values:
            return (
                f"llama.cpp computes {kind} models with {setting}={values[0]}, and this one has {config[setting]}; "
                "run it on torch."
            )
    for setting in layout.settings.values():
        if setting in NEEDED and config.get(setting) is None:
            return f"llama.cpp computes no {kind} model without {setting}; run it on torch."
    sizes = SimpleNamespace(**config)
    heads, head = sizes.num_attention_heads, head_size(sizes)
    if layout.even_heads and head * heads != config["hidden_size"]:
        return (
            f"llama.cpp makes the heads of a {kind} model as wide as its hidden states, and this one has "
            f"{heads} of {head} for {config['hidden_size']}; run it on torch."
        )
    divisor = attention_scalar(layout, sizes)
    if divisor is not None and config["query_pre_attn_scalar"] != divisor:
        return (
            f"llama.cpp divides the scores of this {kind} model by the root of {divisor}, and its configuration by "
            f"that of {config['query_pre_attn_scalar']}; run it on torch."
        )
    uneven = refusals.differing(about)
    if layout is LAYOUTS["llama"]:  # as `deci`, whose layers have widths of their own
        uneven = [name for name in uneven if not OF_A_BLOCK.search(name)]
    if uneven:
        return f"llama.cpp gives {uneven[0]} of a {kind} model the shape of its like in other layers; use 'torch'."
    rope = config.get("rope_parameters") or {}
    if (rope.get("sliding_attention") or {}).get("rope_type", "default") != "default":
        return f"llama.cpp scales no rotary frequencies of a {kind} model's blocks with a window; run it on torch."
    shared = full_attention(rope)
    if shared.get("rope_type") == "yarn" and any(
        shared.get(name) not in (None, usual) for name, usual in YARN.items()
    ):
        usual = ", ".join(f"{name}={value}" for name, value in YARN.items())
        return f"llama.cpp computes YaRN with {usual}, and this {kind} model has others; run it on torch."
    described = replace(about, config=config | {"rope_parameters": shared})
    if unknown := refusals.rotary_scaling(described, layout.scaling, "GGUF"):
        return unknown
    before = shared.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if shared.get("rope_type") == "longrope" and before % ROOM:
        return (
            f"llama.cpp reserves its context in steps of {ROOM} tokens and chooses the factors of LongRoPE by it, and "
            f"those of this {kind} model change at {before}; run it on torch."
        )
    return None


def write(variant: Path, file: Path) -> int:
    """Write a variant with its tokenizer as a GGUF file; returns the bytes of its weights.

    The variant is one that `refusal` has nothing against. Raises RuntimeRefused for numbers beyond float16.
    """
    about = variants.read_about(variant)
    return write_model(
        variants.load(variant), variant, file, str(about.get("model")), str(about.get("recipe"))
    )


def write_model(model: PreTrainedModel, folder: Path, file: Path, name: str, recipe: str) -> int:
    """Write a model, whose layers may be packed, as a GGUF file; returns the bytes of its weights.

    folder: where its tokenizer is, if it has one. name: of the model; the file says it as the tokenizer wants it.
    """
    writer = gguf.GGUFWriter(file, find_architecture(model))
    try:
        writer.add_description(f"edgelab: {recipe}")
        add_shape(writer, model)
        tokenizer_writer.write(writer, folder, model.config.vocab_size, name)
        weights, matrices = 0, Counter[str]()
        for place, values, stored in tensors(model):
            writer.add_tensor(place, values, raw_dtype=stored)
            weights += values.nbytes
            if values.ndim > 1:
                matrices[stored.name] += values.size
        most = matrices.most_common(1)[0][0]
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if most == 'F32' else 'MOSTLY'}_{most}"])
        writer.add_string(TYPES_KEY, " ".join(matrices))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return weights


def write_adapter(variant: Path, file: Path) -> int:
    """Write the adapter of a variant as the GGUF file that llama.cpp puts beside its model; returns its bytes."""
    model = variants.load(variant)
    writer = gguf.GGUFWriter(file, find_architecture(model))
    places, stored = Places(LAYOUTS[model.config.model_type], model.config), 0
    layers = adapters.adapted_layers(model)
    [scale] = {layer.scaling[adapters.NAME] for layer in layers.values()}
    [rank] = {layer.r[adapters.NAME] for layer in layers.values()}
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)  # which llama.cpp divides by the rank
        for name, layer in layers.items():
            theirs, _ = _placed(places, f"{name}.weight")
            a, b = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
            for part, values in (("a", a), ("b", b[places.order(theirs, len(b))])):
                values = values.detach().float().numpy()
                writer.add_tensor(f"{theirs}.lora_{part}", values)
                stored += values.nbytes
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return stored


def layer_sizes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Query heads, key-value heads and MLP channels of every layer, by GGUF's keys, from the layers themselves.

    A configuration may say other numbers of a model whose layers were made smaller.
    """
    head, sizes = head_size(model.config), {}
    for name, layer in model.named_modules():
        if not (key := next((key for end, key in SIZED.items() if name.endswith(end)), None)):
            continue
        size = layer.out_features if key == CHANNELS else layer.out_features // head
        sizes.setdefault(key, []).append(size)
    return sizes


def find_architecture(model: PreTrainedModel) -> str:
    """What llama.cpp calls the architecture; a Llama whose layers differ in size is a Deci to it."""
    if any(len(set(sizes)) > 1 for sizes in layer_sizes(model).values()):
        return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI]
    return LAYOUTS[model.config.model_type].name


def add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """The sizes and settings that llama.cpp builds its graph from; those that differ between layers as lists."""
    layout = LAYOUTS[model.config.model_type]
    settings = stated(layout, model.config)
    sizes = layer_sizes(model)
    settings |= {key: each if len(set(each)) > 1 else each[0] for key, each in sizes.items()}
    for key, value in settings.items():
        add_value(writer, f"{writer.arch}.{key}", value)
    if layout.activation[0] in ERF and (activation := model.config.hidden_act) not in ERF:
        writer.add_string(ACTIVATION, activation)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_value(writer: gguf.GGUFWriter, key: str, value: bool | int | float | str | list) -> None:
    """A key with a value of the type that llama.cpp reads it as."""
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray, Type]]:
    """Names, contents and types of all tensors of the file. Vectors are float32, as llama.cpp wants them."""
    layout = LAYOUTS[model.config.model_type]
    places = Places(layout, model.config)
    frequencies = next((one for name, one in model.named_buffers() if name.endswith(".inv_freq")), None)
    factors = rotary_tensors(model.config, None if frequencies is None else frequencies.numpy())
    for name, values in factors.items():
        yield name, values, Type.F32
    # A head tied to the embedding is stored once, but where llama.cpp wants its own.
    written: set[int] = set()
    for name, layer in packed_layers(model).items():
        if layout.own_head or id(layer.tensor) not in written:
            written.add(id(layer.tensor))
            theirs, _ = _placed(places, f"{name}.weight")
            yield theirs, *encode(layer.tensor, places.order(theirs, len(layer.tensor.integers)))
    stacked: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=not layout.own_head):
        theirs, part = _placed(places, name)
        values = parameter.detach()[places.order(theirs, len(parameter))]
        values = (values.float() if values.dim() == 1 else values) + places.offset(theirs)
        if part is None:
            yield theirs, *encode_float(values)
        else:
            stacked.setdefault(theirs, []).append(values)
    for theirs, parts in stacked.items():
        yield theirs, *encode_float(torch.stack(parts))


def _placed(places: Places, name: str) -> tuple[str, int | None]:
    """Where llama.cpp has a tensor. Raises RuntimeRefused where it has no place for it."""
    found = places(name)
    if found is None:
        raise RuntimeRefused(f"llama.cpp has no place for {name} in a {places.layout.name} model.")
    return found


def encode(tensor: QuantizedTensor, order: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, Type]:
    """A quantized matrix as blocks, (out_features, bytes) uint8, and their type. `order` picks its rows.

    Raises RuntimeRefused where a minimum is beyond float16.
    """
    zero_point = tensor.zero_point
    precision = None if zero_point is None else "integer" if zero_point.dtype == torch.uint8 else "float"
    kind = stored_as(tensor.bits, precision)
    out_features, in_features = tensor.integers.shape
    repeats = tensor.group_size // BLOCK

    def per_block(
        values: Tensor,
    ) -> np.ndarray:  # (out_features, groups) or (1, 1) -> (out_features, blocks, 1)
        return values.expand(out_features, -1)[order].repeat_interleave(repeats, 1).numpy()[..., None]

    integers = tensor.integers[order].numpy().reshape(out_features, in_features // BLOCK, BLOCK)
    parts = [per_block(tensor.scale.half())]
    if kind == Type.Q8_0:
        signed = integers.astype(np.int16) - per_block(tensor.centre().short())
        return _joined([*parts, signed.astype(np.int8)]), kind
    width = 4 if kind in (Type.Q4_0, Type.Q4_1) else 5
    if kind in (Type.Q4_1, Type.Q5_1):
        minimum = (-tensor.centre() * tensor.scale.float()).half()
        if not minimum.isfinite().all():
            raise RuntimeRefused("A zero-point times its scale is beyond float16, which GGUF keeps it in.")
        parts.append(per_block(minimum))
    else:
        integers = integers + np.uint8(2 ** (width - 1) - 2 ** (tensor.bits - 1))
    if width == 5:
        parts.append(np.packbits(integers >> 4, axis=-1, bitorder="little"))
    parts.append((integers[..., :16] & 15) | (integers[..., 16:] & 15) << 4)
    return _joined(parts), kind


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Parts of blocks (out_features, blocks, any) one after the other, as bytes (out_features, bytes)."""
    joined = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], -1)
    return joined.reshape(len(joined), -1)


def encode_float(values: Tensor) -> tuple[np.ndarray, Type]:
    """A float tensor as it is, and its type; bfloat16, which numpy does not have, as bytes."""
    kind = FLOATS[values.dtype]
    values = values.contiguous()
    return (values.view(torch.uint8) if kind == Type.BF16 else values).numpy(), kind
