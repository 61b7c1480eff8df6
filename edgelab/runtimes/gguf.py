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

Llama's queries and keys are stored with the two halves of each head interleaved, since llama.cpp rotates neighbours
where transformers rotates halves. Rows move whole, with their scales.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from edgelab import assets
from edgelab.runtimes import RuntimeRefused, refusals
from edgelab.storage import adapters, variants
from edgelab.storage.description import Description
from edgelab.storage.layers import packed_layers
from edgelab.storage.uniform import QuantizedTensor

BLOCK = 32
TYPES_KEY = "edgelab.types"  # of the matrices, so that the engine can say what runs
ARCHITECTURES = {  # of transformers -> of GGUF
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
OF_A_BLOCK = re.compile(r"\.(mlp|self_attn)\.")  # what may differ between the layers of a Deci
FLOATS = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
# How llama.cpp calls a pre-tokenizer that splits runs of digits so, in the regular expression of GPT-4.
DIGITS = {r"|\p{N}{1,3}|": "llama-bpe", r"|\p{N}|": "qwen2"}


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
    config, kind = about.config, about.layout
    if reason := refusals.foreign_layout(about, tuple(ARCHITECTURES), "GGUF"):
        return reason
    if config["hidden_act"] not in ("silu", "swish"):
        return f"llama.cpp computes {kind} models with silu, and this one has {config['hidden_act']}; run it on torch."
    if kind == "qwen3" and config.get("attention_bias"):
        return f"llama.cpp has no place for the attention biases of a {kind} model; run it on torch."
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if kind == "qwen2" and head * config["num_attention_heads"] != config["hidden_size"]:
        return (
            f"llama.cpp makes the heads of a qwen2 model as wide as its hidden states, and this one has "
            f"{config['num_attention_heads']} of {head} for {config['hidden_size']}; run it on torch."
        )
    uneven = refusals.differing(about)
    if kind == "llama":  # as `deci`, whose layers have widths of their own
        uneven = [name for name in uneven if not OF_A_BLOCK.search(name)]
    if uneven:
        return f"llama.cpp gives {uneven[0]} of a {kind} model the shape of its like in other layers; use 'torch'."
    return refusals.rotary_scaling(about, ("linear", "llama3") if kind == "llama" else (), "GGUF")


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

    folder: where its tokenizer is, if it has one.
    """
    architecture = find_architecture(model)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        writer.add_name(name)
        writer.add_description(f"edgelab: {recipe}")
        add_shape(writer, model)
        add_tokenizer(writer, folder, model.config.vocab_size, name)
        weights, matrices = 0, Counter[str]()
        for place, values, stored in tensors(model, architecture):
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
    architecture = find_architecture(model)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    place, order, stored = Places(model, architecture), RowOrder(model), 0
    layers = adapters.adapted_layers(model)
    [scale] = {layer.scaling[adapters.NAME] for layer in layers.values()}
    [rank] = {layer.r[adapters.NAME] for layer in layers.values()}
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale * rank)  # which llama.cpp divides by the rank
        for name, layer in layers.items():
            theirs = place(f"{name}.weight")
            a, b = layer.lora_A[adapters.NAME].weight, layer.lora_B[adapters.NAME].weight
            for part, values in (("a", a), ("b", b[order(theirs, len(b))])):
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
    """Query heads, key-value heads and MLP channels of every layer, from the layers themselves."""
    layers = model.model.layers
    return {
        "query heads": [layer.self_attn.q_proj.out_features // layer.self_attn.head_dim for layer in layers],
        "key-value heads": [
            layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in layers
        ],
        "MLP channels": [layer.mlp.up_proj.out_features for layer in layers],
    }


def find_architecture(model: PreTrainedModel) -> gguf.MODEL_ARCH:
    """What llama.cpp calls the architecture; a Llama whose layers differ in size is a Deci to it."""
    uneven = any(len(set(counts)) > 1 for counts in layer_sizes(model).values())
    return gguf.MODEL_ARCH.DECI if uneven else ARCHITECTURES[model.config.model_type]


def add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """The sizes that llama.cpp builds its graph from; those that differ between layers as lists."""
    config, head = model.config, model.model.layers[0].self_attn.head_dim
    queries, keys, channels = (
        counts if len(set(counts)) > 1 else counts[0] for counts in layer_sizes(model).values()
    )
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(model.model.layers))
    writer.add_feed_forward_length(channels)
    writer.add_head_count(queries)
    writer.add_head_count_kv(keys)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def tensors(model: PreTrainedModel, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, np.ndarray, Type]]:
    """Names, contents and types of all tensors of the file. Vectors are float32, as llama.cpp wants them."""
    place, order = Places(model, architecture), RowOrder(model)
    if (factors := rotary_factors(model)) is not None:
        yield "rope_freqs.weight", factors, Type.F32
    written: set[int] = set()  # a head tied to the embedding is stored once
    for name, layer in packed_layers(model).items():
        if id(layer.tensor) not in written:
            written.add(id(layer.tensor))
            theirs = place(f"{name}.weight")
            yield theirs, *encode(layer.tensor, order(theirs, len(layer.tensor.integers)))
    for name, parameter in model.named_parameters():
        theirs = place(name)
        values = parameter.detach()[order(theirs, len(parameter))]
        yield theirs, *encode_float(values if values.dim() > 1 else values.float())


class Places:
    """What llama.cpp calls each tensor of a model. Raises RuntimeRefused for one that it has no place for."""

    def __init__(self, model: PreTrainedModel, architecture: gguf.MODEL_ARCH) -> None:
        self.kind = model.config.model_type
        self.named = gguf.get_tensor_name_map(architecture, len(model.model.layers))

    def __call__(self, name: str) -> str:
        found = self.named.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RuntimeRefused(f"llama.cpp has no place for {name} in a {self.kind} model.")
        return found


class RowOrder:
    """The order of a tensor's rows, by its name in llama.cpp, where queries and keys of a Llama are interleaved."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.interleaved = model.config.model_type == "llama"
        self.head = model.model.layers[0].self_attn.head_dim

    def __call__(self, place: str, rows: int) -> Tensor | slice:
        if self.interleaved and place.split(".")[-2] in ("attn_q", "attn_k"):
            return interleaved_rows(rows, self.head)
        return slice(None)


def interleaved_rows(rows: int, head: int) -> Tensor:
    """Which row of transformers stands where: in each head of `head` rows, first and second half in turns."""
    return torch.arange(rows).reshape(-1, 2, head // 2).transpose(1, 2).flatten()


def rotary_factors(model: PreTrainedModel) -> np.ndarray | None:
    """What llama.cpp divides rotary frequencies by, (head size / 2,) float32; None where they are plain.

    Taken from the frequencies of the model, so that any scaling that does not change with length is covered.
    """
    config, rotary = model.config, model.model.rotary_emb
    head = 2 * len(rotary.inv_freq)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors = plain / rotary.inv_freq.double()
    if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5):
        return None
    return factors.float().numpy()


def encode(tensor: QuantizedTensor, order: Tensor | slice = slice(None)) -> tuple[np.ndarray, Type]:
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


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, model: str) -> None:
    """Tokens, merges, special tokens and chat template.

    Only byte-level BPE is written. Beside any other tokenizer the file has none: it runs on token ids, as here.
    """
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    bpe = described.get("model", {})
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or not bpe["merges"]:
        writer.add_tokenizer_model("none")
        return
    # The package's own list of tokens, BpeVocab, calls special ones normal and knows no vocabulary with gaps.
    texts = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    # A tokenizer may know some that the model has no row for.
    for text, index in bpe["vocab"].items():
        if index < vocabulary:
            texts[index], types[index] = text, gguf.TokenType.NORMAL
    for token in (token for token in described["added_tokens"] if token["id"] < vocabulary):
        texts[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(described["pre_tokenizer"], model))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary)
    # Asked of the tokenizer: the package guesses it from a template, and knows none without one.
    special.add_special_token = {"bos": tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]}
    template, special.chat_template = special.chat_template, None  # comes last, as in files of this version
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_space_prefix(False)
    if template is not None:
        writer.add_chat_template(template)


def pre_tokenizer(described: dict | None, model: str) -> str:
    """What llama.cpp calls the way a tokenizer splits text before it merges; "default" where it is none we know."""
    if model == assets.EMBEDDED_NAME:  # digits stand alone, which its decoded form has forgotten
        return "smollm"
    steps = described.get("pretokenizers", [described]) if described else []
    for step in steps:
        if step["type"] == "Digits" and step["individual_digits"]:
            return "smollm"
        for digits, name in DIGITS.items():
            if step["type"] == "Split" and digits in step["pattern"].get("Regex", ""):
                return name
    return "gpt-2" if [step["type"] for step in steps] == ["ByteLevel"] else "default"
