"""What several engines refuse, one sentence each, from the description of a variant alone."""

from __future__ import annotations

import re

from edgelab.storage.description import Description

TRACEABLE = ("linear", "llama3", "yarn")  # scaling of rotary frequencies that does not change with the length


def foreign_layout(about: Description, layouts: tuple[str, ...], engine: str) -> str | None:
    """Another layout than these, or attention that forgets what is far back."""
    if about.layout not in layouts:
        return f"The export to {engine} knows {', '.join(layouts)}, not {about.layout}; use 'torch'."
    if forgets(about.config):
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


def rotary_scaling(about: Description, known: tuple[str, ...], engine: str) -> str | None:
    """Rotary frequencies that are scaled in a way the engine does not know."""
    kind = (about.config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind in ("default", *known):
        return None
    words = f"only {' and '.join(known)}" if known else "no"
    return f"{engine} knows {words} rotary scaling of a {about.layout} model, and this one has '{kind}'; use 'torch'."
