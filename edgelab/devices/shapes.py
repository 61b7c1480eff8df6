"""The sizes of a decoder-only transformer, and the catalogue of them in `data/models.csv`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edgelab.devices.tables import table
from edgelab.errors import EdgeLabError, listed

COUNTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "stablelm",
)


class ShapeError(EdgeLabError):
    """A model layout or a memory setting that cannot be computed."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that determine how many parameters and bytes it has.

    attention_bias is "none", "qkv" or "all" (with the output projection); head_norms says whether queries and
    keys are normalised per head, as in Qwen3 and Gemma 3. windowed_layers: how many look back `window` tokens and keep
    no more, as in Gemma 2 and 3; 0 where every layer has a window (Mistral 7B, Phi-3-mini), since engines such as
    llama.cpp keep all tokens of these. The rotary position encoding of all these models has no parameters.
    """

    name: str
    model_type: str  # as transformers calls it
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False
    gated_mlp: bool = True
    attention_bias: str = "none"
    mlp_bias: bool = False
    head_bias: bool = False
    norm: str = "rmsnorm"
    norms_per_layer: int = 2
    head_norms: bool = False
    window: int = 0
    windowed_layers: int = 0
    context_length: int = 0
    source: str = ""

    @classmethod
    def from_config(cls, config: Any, name: str = "") -> ModelShape:
        """The shape of a transformers configuration of one of the layouts that are COUNTED.

        Raises ShapeError, naming the supported layouts, for any other model_type and for query-key norms that
        are not Qwen3's.
        """
        layout = config.model_type
        if layout not in COUNTED:
            raise ShapeError(
                f"The parameters of a {layout!r} model cannot be counted from its configuration; "
                f"supported are {listed(COUNTED)}."
            )
        if getattr(config, "qk_layernorm", False):
            raise ShapeError(
                f"A {layout} model with qk_layernorm cannot be counted; only norms of Qwen3 and Gemma 3 can."
            )
        bias = "all" if layout == "phi" or getattr(config, "attention_bias", False) else "none"
        if layout == "qwen2" or getattr(config, "use_qkv_bias", False):
            bias = "qkv"
        one_norm = layout == "phi" or getattr(config, "use_parallel_residual", False)
        kinds = getattr(config, "layer_types", None) or []
        windowed = kinds.count("sliding_attention") if "full_attention" in kinds else 0
        return cls(
            name=name or layout,
            model_type=layout,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            gated_mlp=layout != "phi",
            attention_bias=bias,
            mlp_bias=layout == "phi" or bool(getattr(config, "mlp_bias", False)),
            head_bias=layout == "phi",
            norm="layernorm" if layout in ("phi", "stablelm") else "rmsnorm",
            norms_per_layer=4 if layout in ("gemma2", "gemma3_text") else 1 if one_norm else 2,
            head_norms=layout in ("qwen3", "gemma3_text"),
            window=config.sliding_window if windowed else 0,
            windowed_layers=windowed,
            context_length=config.max_position_embeddings,
        )

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every linear layer in one transformer layer; the head is apart."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = [(self.intermediate_size, self.hidden_size)] * (2 if self.gated_mlp else 1)
        attention = [
            (query, self.hidden_size),
            (key, self.hidden_size),
            (key, self.hidden_size),
            (self.hidden_size, query),
        ]
        return [*attention, *up, (self.hidden_size, self.intermediate_size)]

    @property
    def fused(self) -> int:
        """How many linear layers of a block stand in others: Phi-3 has one for three, and one for two."""
        return 3 if self.model_type == "phi3" else 0

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the head."""
        return self.layers * sum(rows * columns for rows, columns in self.linear_shapes)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the token embedding and, where it is not the same matrix, of the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def other_parameters(self) -> int:
        """Norms and biases."""
        rows = [rows for rows, _ in self.linear_shapes]
        biased = {"none": [], "qkv": rows[:3], "all": rows[:4]}[self.attention_bias] + rows[
            4:
        ] * self.mlp_bias
        norm = self.hidden_size * (
            2 if self.norm == "layernorm" else 1
        )  # a LayerNorm has a bias, an RMSNorm has none
        layer = sum(biased) + self.norms_per_layer * norm + 2 * self.head_dim * self.head_norms
        return self.layers * layer + norm + self.vocab_size * self.head_bias

    @property
    def parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        return self.linear_parameters + self.embedding_parameters + self.other_parameters


def models() -> dict[str, ModelShape]:
    """The models of `data/models.csv` by name. Raises ShapeError, with line and column, for a line that is none."""
    kinds = {one.name: one.type for one in fields(ModelShape)}
    needed = list(kinds)[: list(kinds).index("tied_embeddings")]
    return {
        cells["name"]: ModelShape(
            **{name: _value(text, kinds[name], f"{where}, column {name}") for name, text in cells.items()}
        )
        for where, cells in table("models.csv", ShapeError, list(kinds), needed, unique="name")
    }


def _value(text: str, kind: str, where: str) -> int | bool | str:
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind == "int" and text.isdecimal():
        return int(text)
    if kind == "str":
        return text
    raise ShapeError(
        f"{where}: {text!r} should be {'true or false' if kind == 'bool' else 'a whole number'}."
    )
