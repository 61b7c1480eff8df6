"""What several engines refuse, one sentence each, from the description of a variant alone."""

from __future__ import annotations

import re

from edgelab.storage.description import Description

TRACEABLE = ("linear", "llama3", "yarn")  # scaling of rotary frequencies that does not change with the length


def foreign_layout(about: Description, layouts: tuple[str, ...], engine: str) -> str | None:
    """Another layout than these, or one whose attention forgets what is far back."""
    if about.layout not in layouts:
        return f"The export to {engine} knows {', '.join(layouts)}, not {about.layout}; use 'torch'."
    if about.config.get("use_sliding_window"):
        return f"The export to {engine} knows no sliding window here; use 'torch'."
    return None


def own_shape(about: Description, engine: str) -> str | None:
    """A layer of another shape than the configuration gives."""
    if not about.shapes:
        return None
    name, shape = next(iter(about.shapes.items()))
    return (
        f"{engine} gives every layer the shape that the configuration says, and {name} is "
        f"{' x '.join(map(str, shape))}; use 'torch'."
    )


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
