"""What llama.cpp calls the settings and tensors of each layout of transformers, both ways: for files written and read.

Names of tensors come from the maps of the gguf package, and keys of settings from llama.cpp's own converter. What is
said here besides is how numbers stand in the file: in which order the rows of a matrix, with which offset a norm, and
what llama.cpp takes for granted in a layout, so that another value has to be refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np
from gguf import MODEL_ARCH

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Settings = dict[str, Any]

SHAPE = {  # key of the file, behind the name of its architecture -> setting of the configuration
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
HEADS = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
PARALLEL = {"use_parallel_residual": "use_parallel_residual"}
SILU = ("silu", "swish")
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three names of one formula
ERF = ("gelu",)  # which llama.cpp computes by tanh as well, up to 5e-4 off
STATED = ("linear", "yarn")  # scaling of rotary frequencies that keys describe, for every layout
NO_BIAS = {"attention_bias": (False,)}
BOTH_WAYS = {"use_bidirectional_attention": (None, False)}
ACTIVATION = "edgelab.activation"  # noted for our own reader, where llama.cpp computes two of them alike
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
# Keys of settings that follow from others, or that llama.cpp has a number for where a file has none.
FOLLOWS = ("attention.head_count_kv", "vocab_size", *HEADS, *CAPS, WINDOW)
FACTORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
LOW, HIGH, CONTEXT = 1.0, 4.0, 8192  # of the scaling of Llama 3, in every model that has been published
BY_HEAD = re.compile(r"(.*[qk]_layernorm)\.norms\.(\d+)(\.weight)")  # of a StableLM: one norm for each head


@dataclass(frozen=True)
class Layout:
    """How the models of one layout stand in a file.

    settings: keys besides SHAPE. flags: which setting a tensor of block 0 shows, by its being there; or, behind "not",
    by its being absent. only: values that llama.cpp takes for granted. scaling: kinds of rotary scaling that it knows.
    partial: a part of each head is rotated, as the configuration says.
    own_head: the head is a tensor of its own even where it is tied to the embedding. offset: what is added to norms.
    rows: how the rows of queries and keys stand. windows: every how many blocks one sees all of the text, unless
    the file says otherwise; 0 where llama.cpp knows no windows. even_heads: heads are as wide as hidden states allow.
    """

    architecture: MODEL_ARCH
    settings: Mapping[str, str]
    activation: tuple[str, ...] = SILU
    flags: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    scaling: tuple[str, ...] = STATED
    partial: bool = False
    own_head: bool = False
    offset: float = 0.0
    rows: Literal["plain", "interleaved", "mixed by head"] = "plain"
    windows: int = 0
    even_heads: bool = False

    @property
    def name(self) -> str:
        """Its name in the file, which begins the keys of its settings."""
        return gguf.MODEL_ARCH_NAMES[self.architecture]

    @property
    def needed(self) -> list[str]:
        """The keys of settings without which no model of it can be computed."""
        shown = {one.removeprefix("not ") for one in self.flags.values()}  # by tensors
        return [
            key
            for key, setting in {**SHAPE, **self.settings}.items()
            if key not in FOLLOWS and setting not in shown
        ]


LLAMA = Layout(
    MODEL_ARCH.LLAMA,
    RMS | HEADS,
    flags={"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"},
    scaling=(*STATED, "llama3"),
    rows="interleaved",
)
LAYOUTS = {  # of transformers; of several with one architecture, the first is what its files are read as
    "llama": LLAMA,
    "mistral": Layout(LLAMA.architecture, LLAMA.settings, scaling=LLAMA.scaling, rows=LLAMA.rows),
    "qwen2": Layout(MODEL_ARCH.QWEN2, RMS | HEADS, even_heads=True),
    "qwen3": Layout(MODEL_ARCH.QWEN3, RMS | HEADS, only=NO_BIAS),
    "gemma": Layout(
        MODEL_ARCH.GEMMA,
        RMS | HEADS,
        TANH,
        only=NO_BIAS | BOTH_WAYS | {"tie_word_embeddings": (True,)},
        offset=1,
    ),
    "gemma2": Layout(
        MODEL_ARCH.GEMMA2,
        RMS | HEADS | CAPS | {WINDOW: "sliding_window"},
        TANH,
        only=NO_BIAS | BOTH_WAYS | {"tie_word_embeddings": (True,)},
        scaling=("linear",),
        offset=1,
        windows=2,
    ),
    "gemma3_text": Layout(
        MODEL_ARCH.GEMMA3,
        RMS | HEADS | {WINDOW: "sliding_window"},
        TANH,
        only=NO_BIAS | BOTH_WAYS | dict.fromkeys(CAPS, (None,)),
        scaling=("linear",),
        offset=1,
        windows=6,
    ),
    "phi": Layout(
        MODEL_ARCH.PHI2,
        NORM,
        TANH,
        only={"qk_layernorm": (False,)},
        partial=True,
        own_head=True,
        even_heads=True,
    ),
    "phi3": Layout(MODEL_ARCH.PHI3, RMS, scaling=("longrope",), partial=True, even_heads=True),
    "stablelm": Layout(
        MODEL_ARCH.STABLELM,
        NORM | PARALLEL,
        flags={
            "attn_q.bias": "use_qkv_bias",
            "attn_q_norm.weight": "qk_layernorm",
            "ffn_norm.weight": "not use_parallel_residual",
        },
        partial=True,
        own_head=True,
        even_heads=True,
    ),
    "olmo2": Layout(MODEL_ARCH.OLMO2, RMS, only=NO_BIAS, own_head=True, even_heads=True),
    "gpt_neox": Layout(
        MODEL_ARCH.GPTNEOX,
        NORM | PARALLEL,
        ERF + TANH,
        only={"attention_bias": (True,)},
        partial=True,
        own_head=True,
        rows="mixed by head",
        even_heads=True,
    ),
}


class Places:
    """Where the tensors of a model stand in its file."""

    def __init__(self, layout: Layout, config: PretrainedConfig) -> None:
        self.layout, self._heads, self._size = layout, config.num_attention_heads, head_size(config)
        self._named = gguf.get_tensor_name_map(layout.architecture, config.num_hidden_layers)

    def __call__(self, name: str) -> tuple[str, int | None] | None:
        """The tensor of the file, and where several are stacked in one, which of them; None where there is no place."""
        part = BY_HEAD.fullmatch(name)
        found = self._named.get_name(part[1] + part[3] if part else name, try_suffixes=(".weight", ".bias"))
        return None if found is None else (found, int(part[2]) if part else None)

    def order(self, place: str, rows: int) -> np.ndarray | slice:
        """Which row of transformers stands where in a matrix or bias of the file."""
        kind = place.split(".")[-2]
        if self.layout.rows == "interleaved" and kind in ("attn_q", "attn_k"):
            return interleaved(rows, self._size)
        if self.layout.rows == "mixed by head" and kind == "attn_qkv":
            return np.arange(rows).reshape(self._heads, 3, -1).swapaxes(0, 1).flatten()
        return slice(None)

    def offset(self, place: str) -> float:
        """What a number of the file has more than that of transformers."""
        return self.layout.offset if place.endswith("_norm.weight") else 0.0


def interleaved(rows: int, head: int) -> np.ndarray:
    """The order of rows with first and second half of each head of `head` rows in turns.

    llama.cpp rotates neighbours in some layouts, where transformers rotates halves.
    """
    return np.arange(rows).reshape(-1, 2, head // 2).swapaxes(1, 2).flatten()


def head_size(config: PretrainedConfig) -> int:
    """Numbers of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_scalar(layout: Layout, config: PretrainedConfig) -> int | None:
    """What llama.cpp divides scores by the root of in a Gemma 2 or 3, whose configuration can say another number.

    It is the size of heads, but for the models of 27 billion parameters, which it knows by their number of blocks.
    """
    large = {MODEL_ARCH.GEMMA2: 46, MODEL_ARCH.GEMMA3: 62}.get(layout.architecture)
    if large is None:
        return None
    if config.num_hidden_layers == large:
        return config.hidden_size // config.num_attention_heads
    return head_size(config)


def full_attention(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings of the blocks that see all of the text, where those with a window have others."""
    return rope.get("full_attention") or rope


# Settings as the file has them


def stated(layout: Layout, config: PretrainedConfig) -> Settings:
    """What a file says of a model besides its tensors, by keys without the name of the architecture."""
    found = {
        key: getattr(config, name)
        for key, name in {**SHAPE, **layout.settings}.items()
        if getattr(config, name, None) is not None
    }
    if layout.rows == "mixed by head":  # as many keys as queries, whatever else the configuration says
        found["attention.head_count_kv"] = found["attention.head_count"]
    found.setdefault("attention.key_length", head_size(config))
    found.setdefault("attention.value_length", head_size(config))
    window = shortest_window(config)
    if window is not None and not layout.windows:  # texts as long as the window are as in transformers
        found["context_length"] = min(found["context_length"], window)
    if layout.windows:
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        if not any(sliding):  # an empty pattern ends llama.cpp
            found.pop(WINDOW, None)
            if layout.architecture == MODEL_ARCH.GEMMA2:  # which has windows, whatever a file says
                found[WINDOW] = found["context_length"]
        elif sliding != default_pattern(layout, config.num_hidden_layers):
            found[PATTERN] = sliding
    return found | _stated_rotary(layout, config)


def shortest_window(config: PretrainedConfig) -> int | None:
    """How many tokens a block sees that does not see all of the text; None where all do.

    A window that the layout does not know counts, too: caches of transformers go by it.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or None


def default_pattern(layout: Layout, depth: int) -> list[bool]:
    """Which blocks have a window where a file does not say."""
    return [bool((block + 1) % layout.windows) for block in range(depth)]


def _stated_rotary(layout: Layout, config: PretrainedConfig) -> Settings:
    rope = full_attention(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    share = rope.get("partial_rotary_factor", 1.0) if layout.partial else 1.0
    found = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_size(config) * share),
    }
    if (other := config.rope_parameters.get("sliding_attention")) is not None:
        found["rope.freq_base_swa"] = float(other["rope_theta"])
    if kind in (*STATED, "longrope"):
        found["rope.scaling.type"] = kind
    if kind in STATED:
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind in ("yarn", "longrope"):
        before = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        found["rope.scaling.original_context_length"] = before
    if kind == "yarn":
        magnitude = _stated_magnitude(rope)
        if magnitude is not None and not math.isclose(magnitude, yarn_magnitude(rope["factor"])):
            found["rope.scaling.attn_factor"] = magnitude / yarn_magnitude(rope["factor"])
        for key, name in YARN_BOUNDS.items():
            if rope.get(name) is not None:
                found[key] = float(rope[name])
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = longrope_magnitude(rope, config.max_position_embeddings, before)
    return found


YARN_BOUNDS = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What queries and keys are multiplied by under YaRN (Peng et al. 2023, equation 15), by itself."""
    return 1 + 0.1 * weight * math.log(factor)


def _stated_magnitude(rope: dict[str, Any]) -> float | None:
    """The same as a configuration states it: itself, or by DeepSeek's two weights; None where it does not."""
    weights = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is None and all(weights):
        above, below = (yarn_magnitude(rope["factor"], weight) for weight in weights)
        return above / below
    return rope.get("attention_factor")


def longrope_magnitude(rope: dict[str, Any], context: int, before: int) -> float:
    """The same under LongRoPE: sqrt(1 + ln(context / before) / ln(before)), unless the configuration says it."""
    if (magnitude := rope.get("attention_factor")) is not None:
        return magnitude
    scale = rope.get("factor") or context / before
    return math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0


def rotary_tensors(config: PretrainedConfig, frequencies: np.ndarray | None) -> dict[str, np.ndarray]:
    """What llama.cpp divides rotary frequencies by, (rotated / 2,) float32 each, where keys cannot describe it.

    frequencies: of the model, (rotated / 2,), from which the factors of Llama 3's scaling are taken.
    """
    rope = full_attention(config.rope_parameters)
    kind = rope.get("rope_type", "default")
    if kind == "longrope":
        lists = {SHORT: rope["short_factor"], LONG: rope["long_factor"]}
        return {name: np.array(factors, np.float32) for name, factors in lists.items()}
    if kind != "llama3":
        return {}
    places = np.arange(len(frequencies)) / len(frequencies)
    return {FACTORS: (rope["rope_theta"] ** -places / frequencies.astype(np.float64)).astype(np.float32)}


# Settings as transformers has them


class Keys:
    """What a file says of its model, and which of it has been asked for."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        self._said, self._left = said, set(said)

    def __call__(self, key: str, default: Any = None) -> Any:
        self._left.discard(key)
        return self._said.get(key, default)

    @property
    def left(self) -> list[str]:
        """Those that nobody asked for, and that are no zero: counts of experts, and other parts that are not there."""
        return sorted(key for key in self._left if self._said[key])


def configured(
    layout: Layout, said: Keys, tensors: Mapping[str, np.ndarray], refuse: Callable[[str], Exception]
) -> Settings:
    """The configuration that a file describes, as arguments of its class. tensors: small ones, and shapes of others.

    refuse: makes the error of a sentence about what cannot be read.
    """
    found: Settings = {}
    for key, name in {**SHAPE, **layout.settings}.items():
        if (value := said(key)) is not None:
            found[name] = value
    key_length, value_length = said("attention.key_length"), said("attention.value_length")
    if key_length != value_length:
        raise refuse(f"has keys of {key_length} numbers and values of {value_length}")
    if uneven := [name for name, value in found.items() if isinstance(value, list)]:
        if any(len(set(found[name])) > 1 for name in uneven):
            raise refuse(f"has blocks that differ in {uneven[0]}")
        found |= {name: found[name][0] for name in uneven}
    if not said("attention.causal", True):
        raise refuse("is a model whose tokens see what follows")
    if "vocab_size" not in found:
        found["vocab_size"] = len(tensors["token_embd.weight"])
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    even = found["hidden_size"] // found["num_attention_heads"]
    size = key_length or even
    if "head_dim" not in found and size != even:
        if "head_dim" not in layout.settings.values():
            raise refuse(f"has heads of {size} numbers where {even} fit")
        found["head_dim"] = size
    for tensor, flag in layout.flags.items():
        there = f"blk.0.{tensor}" in tensors
        found[flag.removeprefix("not ")] = there != flag.startswith("not ")
    found["tie_word_embeddings"] = "output.weight" not in tensors or (
        layout.own_head and np.array_equal(tensors["output.weight"], tensors["token_embd.weight"])
    )
    if layout.windows:
        depth = found["num_hidden_layers"]
        sliding = said(PATTERN, layout.windows)
        if isinstance(sliding, int):  # 0 is a window in every block, and 1 in none
            sliding = [not sliding or bool((block + 1) % sliding) for block in range(depth)]
        window = found.get("sliding_window")
        if layout.architecture == MODEL_ARCH.GEMMA3 and not window:
            sliding = [False] * depth
            found.pop("sliding_window", None)
        elif window == 0:
            raise refuse("has blocks that see 0 tokens of the text")
        elif layout.architecture == MODEL_ARCH.GEMMA2 and (window or 0) >= found["max_position_embeddings"]:
            sliding = [False] * depth
        found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in sliding]
    elif window := said(WINDOW):
        if layout.architecture == MODEL_ARCH.OLMO2:  # an OLMo 3, which llama.cpp knows by this name
            raise refuse(f"has blocks that see {window} tokens of the text")
        found["sliding_window"] = None  # llama.cpp leaves it out of the other layouts
    return found | _configured_rotary(layout, said, tensors, found, size, refuse)


def _configured_rotary(
    layout: Layout,
    said: Keys,
    tensors: Mapping[str, np.ndarray],
    found: Settings,
    size: int,
    refuse: Callable[[str], Exception],
) -> Settings:
    context, rotated = found["max_position_embeddings"], said("rope.dimension_count", size)

    def base(key: str) -> float:
        if (stated := said(key, 10_000.0)) <= 0:
            raise refuse(f"states {layout.name}.{key}={stated:g}")
        return stated

    rope: Settings = {"rope_type": "default", "rope_theta": base("rope.freq_base")}
    if layout.partial:
        rope["partial_rotary_factor"] = rotated / size
    elif rotated != size:
        raise refuse(f"rotates {rotated} of the {size} numbers of each head")
    # llama.cpp scales linearly where there is a factor and no type
    kind, factor = said("rope.scaling.type", "linear"), said("rope.scaling.factor", 1.0) or 1.0
    before = said("rope.scaling.original_context_length", context)
    magnitude = said("rope.scaling.attn_factor")
    bounds = {name: said(key) for key, name in YARN_BOUNDS.items()}
    said("rope.scaling.finetuned")
    if kind == "linear" and factor == 1:
        kind = "none"
    if SHORT in tensors and LONG in tensors:
        kind = "longrope"
    if kind not in ("none", *layout.scaling) or (kind == "longrope" and SHORT not in tensors):
        raise refuse(f"scales rotary frequencies by '{kind}'")
    if magnitude not in (None, 1.0) and kind not in ("yarn", "longrope"):
        raise refuse(f"states {layout.name}.rope.scaling.attn_factor without YaRN")
    if kind == "longrope":
        lists = {"short_factor": tensors[SHORT].tolist(), "long_factor": tensors[LONG].tolist()}
        rope |= {"rope_type": kind, **lists, "attention_factor": 1.0 if magnitude is None else magnitude}
        rope["original_max_position_embeddings"] = before
    elif kind == "yarn":
        rope |= {"rope_type": kind, "factor": factor, "original_max_position_embeddings": before}
        if magnitude is not None:
            rope["attention_factor"] = magnitude * yarn_magnitude(factor)
        rope |= {name: bound for name, bound in bounds.items() if bound is not None}
    elif kind == "linear":
        rope |= {"rope_type": kind, "factor": factor}
    if FACTORS in tensors:
        rope |= scaling_by_factors(tensors[FACTORS], rope["rope_theta"], context)
    if layout.architecture != MODEL_ARCH.GEMMA3:
        more = {"original_max_position_embeddings": before} if layout.architecture == MODEL_ARCH.PHI3 else {}
        return {"rope_parameters": rope, **more}
    local = {"rope_type": "default", "rope_theta": base("rope.freq_base_swa")}
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def scaling_by_factors(factors: np.ndarray, theta: float, context: int) -> Settings:
    """Which scaling divides the rotary frequencies by these factors, (rotated / 2,).

    Of Llama 3's scaling a file holds the result alone. Where its rule gives these factors the settings are found
    again, so that engines know it; else the factors are kept as they are, as one of longrope's two lists.
    """
    factors = np.asarray(factors, np.float64)
    factor = float(f"{factors.max():.6g}")
    if np.allclose(factors, factor, rtol=1e-5):
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    length = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))  # wavelengths, in tokens
    # Between two wavelengths a frequency is (1 - s) / factor + s of itself; s = (context / length - LOW) / (HIGH - LOW)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    original = CONTEXT
    if between.any():
        original = round(float(np.median((smooth * (HIGH - LOW) + LOW)[between] * length[between])))
    smooth = np.clip((original / length - LOW) / (HIGH - LOW), 0, 1)
    if np.allclose(1 / factors, (1 - smooth) / factor + smooth, rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }
