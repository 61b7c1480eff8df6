"""Bytes of a GGUF file before it is made: which tensor gets which type, its blocks, and the header with the tokenizer.

    file = header, padded to 32 bytes + for each tensor its blocks, padded to 32 bytes

A mixture such as Q4_K_M is a rule of llama.cpp that gives some tensors more bits than its name says. The rules here are
those of `llama_tensor_get_type_impl` in llama.cpp's src/llama-quant.cpp, for models without experts; where a row is not
a multiple of a block, the tensor falls back to a type of 32 weights. `data/file_sizes.csv` holds published files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from edgelab.devices.shapes import ModelShape, ShapeError, models
from edgelab.devices.tables import table

ALIGNMENT = 32
BLOCKS = {  # type: weights of a block, bytes of a block
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
FLOATS = ("F32", "F16", "BF16")
MIXTURES = {  # kind of a file: the type that most of its matrices get
    **{name: name for name in BLOCKS if name not in ("Q3_K", "Q4_K", "Q5_K")},
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
}
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
SENTENCEPIECE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
)  # and the first Llamas; the others have merges, which take more bytes
OWN_HEAD = ("phi", "stablelm")  # llama.cpp wants the head of these apart, also where it is the embedding
# Of a token with its share of all metadata: text, type, and a score or the merges. As in published files.
TOKEN_BYTES = {"sentencepiece": 23.5, "merges": 35.5, "llama 3": 61.1}


@dataclass(frozen=True)
class TensorFile:
    """One tensor of a GGUF file: its name, its rows and columns (one number where it is a vector), and its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def bytes(self) -> int:
        """Bytes of its blocks, without padding."""
        weights, size = BLOCKS[self.kind]
        return math.prod(self.shape) // weights * size


def gguf_tensors(
    shape: ModelShape, kind: str, embedding: str = "", importance: bool = False
) -> list[TensorFile]:
    """The tensors of a GGUF file of a kind, such as F16, Q8_0 or Q4_K_M, with the type that each is stored in.

    embedding: "" applies llama.cpp's rules. A type, such as Q8_0, is for embedding and head, and every linear layer
    then has the type of `kind`, which is how edgelab writes its own recipes. importance: whether llama.cpp quantizes
    with an importance matrix, which changes the first layers of Q4_0, Q5_0 and IQ4.
    Raises ShapeError for a kind that is not known and for rows that no block divides.
    """
    if kind not in MIXTURES:
        raise ShapeError(f"No kind of GGUF file is called {kind!r}; there are {', '.join(MIXTURES)}.")
    if embedding and embedding not in BLOCKS:
        raise ShapeError(f"No type of a tensor is called {embedding!r}; there are {', '.join(BLOCKS)}.")
    found = []
    for name, size, layer in _named(shape):
        if len(size) == 1:
            found.append(TensorFile(name, size, "F32"))
            continue
        most = MIXTURES[kind]
        if embedding:
            wanted = embedding if name in ("token_embd.weight", "output.weight") else most
        else:
            wanted = most if most in FLOATS else _chosen(shape, kind, name, size, layer, importance)
        found.append(TensorFile(name, size, _fitting(wanted, size[-1], name)))
    return found


def gguf_bytes(
    shape: ModelShape,
    kind: str,
    embedding: str = "",
    importance: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Bytes of a GGUF file of a kind: header with tokenizer, and every tensor with its padding.

    metadata: what the header states, by key, for a size to the byte; else the tokenizer is estimated from the size of
    the vocabulary, which is within half a megabyte of the files in
    `data/file_sizes.csv`. The rest is as in `gguf_tensors`.
    """
    tensors = gguf_tensors(shape, kind, embedding, importance)
    header = header_bytes(metadata, tensors) if metadata else _estimated_header(shape, tensors)
    return header + sum(_padded(tensor.bytes) for tensor in tensors)


def gguf_weight_bytes(shape: ModelShape, kind: str, embedding: str = "", importance: bool = False) -> int:
    """Bytes of all tensors without header and padding: what llama.cpp, also llama-bench, calls the size of a model."""
    return sum(tensor.bytes for tensor in gguf_tensors(shape, kind, embedding, importance))


def gguf_token_bytes(shape: ModelShape, kind: str, embedding: str = "", importance: bool = False) -> int:
    """Bytes of weights that a decode step reads: all, but of an input table that is not the head one row."""
    tensors = {tensor.name: tensor for tensor in gguf_tensors(shape, kind, embedding, importance)}
    total = sum(tensor.bytes for tensor in tensors.values())
    if "output.weight" not in tensors:
        return total
    unread = tensors["token_embd.weight"]
    return total - unread.bytes + unread.bytes // unread.shape[0]


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorFile]) -> int:
    """Bytes before the first tensor: 24, every key with its value, and the name, sizes and place of every tensor.

    metadata: texts, bools, numbers of 4 bytes, and lists of them, by key. Source: the GGUF specification, version 3,
    docs/gguf.md of github.com/ggml-org/ggml.
    """
    stated = sum(_text_bytes(key) + 4 + _value_bytes(value) for key, value in metadata.items())
    placed = sum(_text_bytes(one.name) + 4 + 8 * len(one.shape) + 4 + 8 for one in tensors)
    return _padded(24 + stated + placed)


def file_sizes() -> pd.DataFrame:
    """Published GGUF files: model, kind, importance, measured_bytes, predicted_bytes, error and source.

    error is predicted / measured - 1. measured_bytes are those of the whole file, with its header.
    """
    rows = []
    for _, row in table("file_sizes.csv"):
        measured, importance = int(row["bytes"]), row["importance"] == "true"
        predicted = gguf_bytes(models()[row["model"]], row["kind"], importance=importance)
        rows.append(
            {"model": row["model"], "kind": row["kind"], "importance": importance, "measured_bytes": measured}
            | {"predicted_bytes": predicted, "error": predicted / measured - 1, "source": row["source"]}
        )
    return pd.DataFrame(rows)


def _named(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, size and layer of every tensor; layer is -1 outside the layers."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def norm(name: str, size: int = hidden) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (size,)
        if shape.norm == "layernorm":
            yield f"{name}.bias", (size,)

    def linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, columns)
        if bias:
            yield f"{name}.bias", (rows,)

    def block() -> Iterator[tuple[str, tuple[int, ...]]]:
        biased = shape.attention_bias != "none"
        yield from norm("attn_norm")
        if shape.model_type == "phi3":  # three matrices in one, and two
            yield from linear("attn_qkv", query + 2 * key, hidden, biased)
        else:
            yield from linear("attn_q", query, hidden, biased)
            yield from linear("attn_k", key, hidden, biased)
            yield from linear("attn_v", key, hidden, biased)
        yield from linear("attn_output", hidden, query, shape.attention_bias == "all")
        if shape.head_norms:
            yield "attn_q_norm.weight", (shape.head_dim,)
            yield "attn_k_norm.weight", (shape.head_dim,)
        if shape.norms_per_layer == 4:
            yield from norm("post_attention_norm")
            yield from norm("post_ffw_norm")
        if shape.norms_per_layer > 1:
            yield from norm("ffn_norm")
        if shape.model_type == "phi3":
            yield from linear("ffn_up", 2 * inner, hidden, shape.mlp_bias)
        else:
            if shape.gated_mlp:
                yield from linear("ffn_gate", inner, hidden, shape.mlp_bias)
            yield from linear("ffn_up", inner, hidden, shape.mlp_bias)
        yield from linear("ffn_down", hidden, inner, shape.mlp_bias)

    yield "token_embd.weight", (shape.vocab_size, hidden), -1
    for layer in range(shape.layers):
        for name, size in block():
            yield f"blk.{layer}.{name}", size, layer
    for name, size in norm("output_norm"):
        yield name, size, -1
    if _has_head(shape):
        yield "output.weight", (shape.vocab_size, hidden), -1
    if shape.head_bias:
        yield "output.bias", (shape.vocab_size,), -1


def _has_head(shape: ModelShape) -> bool:
    return not shape.tied_embeddings or shape.model_type in OWN_HEAD


def _chosen(
    shape: ModelShape, kind: str, name: str, size: tuple[int, ...], layer: int, importance: bool
) -> str:
    """The type that llama.cpp's rules choose for a matrix, before it is looked at whether its rows fit."""
    most, layers, grouped = MIXTURES[kind], shape.layers, shape.heads // shape.kv_heads >= 4
    if name == "output.weight" or (name == "token_embd.weight" and not _has_head(shape)):
        return "Q8_0" if most == "Q8_0" or size[-1] % BLOCKS[most][0] else "Q6_K"
    part = name.rpartition(".")[0].rpartition(".")[2]
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    first = layer < layers // 8
    if part in ("attn_v", "attn_qkv"):
        chosen = {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if layer < 4 else "Q4_K",
            "Q4_K_M": "Q6_K" if more else "Q4_K",
            "Q5_K_M": "Q6_K" if more else "Q5_K",
            "IQ4_NL": "Q5_K" if grouped else most,
            "IQ4_XS": "Q5_K" if grouped else most,
        }.get(kind, most)
        large = layers == 80 and shape.heads != shape.kv_heads  # llama.cpp's "70B"
        return "Q5_K" if large and chosen in ("Q3_K", "Q4_K") else chosen
    if part == "ffn_down":
        return {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_S": "Q5_K" if first else "Q4_K",
            "Q4_K_M": "Q6_K" if more else "Q4_K",
            "Q5_K_M": "Q6_K" if more else "Q5_K",
            "IQ4_NL": "Q5_K" if first and not importance else most,
            "IQ4_XS": "Q5_K" if first and not importance else most,
            "Q4_0": "Q4_1" if first and importance else most,
            "Q5_0": "Q5_1" if first and importance else most,
        }.get(kind, most)
    if part == "attn_output":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(kind, most)
    return most


def _fitting(kind: str, columns: int, name: str) -> str:
    """The type itself where its blocks divide a row, else the one that llama.cpp falls back to."""
    if columns % BLOCKS[kind][0] and kind in FALLBACKS:
        kind = FALLBACKS[kind]
    if columns % BLOCKS[kind][0]:
        raise ShapeError(
            f"{name} has rows of {columns} weights, which blocks of {BLOCKS[kind][0]} do not divide; F16 fits any row."
        )
    return kind


def _estimated_header(shape: ModelShape, tensors: Sequence[TensorFile]) -> int:
    kind = "merges"
    if shape.model_type in SENTENCEPIECE or shape.vocab_size == 32000:  # Llama, Llama 2 and Mistral
        kind = "sentencepiece"
    elif shape.model_type == "llama" and shape.vocab_size > 100_000:  # more than two merges for each token
        kind = "llama 3"
    tokens = shape.vocab_size * TOKEN_BYTES[kind]
    return _padded(header_bytes({}, tensors) + round(tokens))


def _text_bytes(text: str) -> int:
    return 8 + len(text.encode())


def _value_bytes(value: Any) -> int:
    if isinstance(value, str):
        return _text_bytes(value)
    if isinstance(value, bool):
        return 1
    if isinstance(value, Sequence):
        return 4 + 8 + sum(_value_bytes(one) for one in value)
    return 4


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
