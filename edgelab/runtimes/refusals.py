"""What several engines refuse, one sentence each, from the description of a variant alone."""

from __future__ import annotations

import re

from edgelab.errors import listed
from edgelab.storage.description import Description

TRACEABLE = ("linear", "llama3", "yarn")  # scaling of rotary frequencies that does not change with the length


def foreign_layout(
    about: Description, layouts: tuple[str, ...], engine: str, windowed: tuple[str, ...] = ()
) -> str | None:
    """Another layout than these, or attention that forgets what is far back, in a layout that is not windowed here."""
    if about.layout not in layouts:
        return f"The export to {engine} knows {', '.join(layouts)}, not {about.layout}; use 'torch'."
    if about.layout not in windowed and forgets(about.config):
        return f"The export to {engine} knows no sliding window here; use 'torch'."
    return None


def forgets(config: dict) -> bool:
    """Whether any layer sees a window of the text only. A window as long as the longest text is none."""
    if kinds := config.get("layer_types"):
        return any(kind != "full_attention" for kind in kinds)
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    return bool(window) and window < config["max_position_embeddings"]


def own_shape(about: Description, engine: str) -> str | None:
    """A layer of another shape than the configuration gives."""
    if not about.shapes:
        return None
    name, shape = next(iter(about.shapes.items()))
    return (
        f"{engine} gives every layer the shape that the configuration says, and {name} is "
        f"{' x '.join(map(str, shape))}; use 'torch'."
    )


def factored(about: Description, engine: str) -> str | None:
    """A layer that is the product of two."""
    for name in about.shapes:
        layer, _, place = name.rpartition(".")
        if place.isdecimal():
            return f"{engine} multiplies by one matrix, and {layer} is the product of two; use 'torch'."
    return None


def differing(about: Description) -> list[str]:
    """The layers that have another shape than their like in other blocks."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for name, shape in about.shapes.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), {})[name] = shape
    depth = about.config["num_hidden_layers"]
    return [
        name
        for alike in kinds.values()
        if len(alike) < depth or len(set(map(tuple, alike.values()))) > 1
        for name in alike
    ]


def known_scaling(about: Description) -> tuple[str, ...]:
    """Scaling of rotary frequencies that exports know of a layout; transformers' Phi-3 has LongRoPE and no other."""
    return ("longrope",) if about.layout == "phi3" else TRACEABLE


def rotary_scaling(about: Description, known: tuple[str, ...], engine: str) -> str | None:
    """Rotary frequencies that are scaled in a way the engine does not know, in any kind of layers that has its own."""
    settings = about.config.get("rope_parameters") or {}
    for own in [one for one in settings.values() if isinstance(one, dict)] or [settings]:
        kind = own.get("rope_type", "default")
        if kind in ("default", *known):
            continue
        words = f"only {listed(known)}" if known else "no"
        asked = f"rotary scaling of a {about.layout} model, and this one has '{kind}'"
        return f"{engine} knows {words} {asked}; use 'torch'."
    return None


def unusual_attention(about: Description, engine: str) -> str | None:
    """Settings of attention that few models have: norms of queries and keys in Phi, tokens that see what follows."""
    if about.config.get("use_bidirectional_attention"):
        return f"{engine} knows attention to earlier tokens only; use 'torch'."
    if about.layout == "phi" and about.config.get("qk_layernorm"):
        return f"{engine} leaves the norms of queries and keys of a phi model out; use 'torch'."
    return None
