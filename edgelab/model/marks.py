"""What belongs to a model and is no tensor, and what tells one model from another."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgelab.recipes import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelab.storage.kv_cache import CacheGrid

ATTRIBUTE = "edgelab_marks"


@dataclass(frozen=True)
class Marks:
    """cache: the grid on which keys and values are kept. native: the width asked of an engine's own quantizer. pruned:
    single weights are zero because a technique removed them, and have to stay so.
    """

    cache: CacheGrid | None = None
    native: str | None = None
    pruned: bool = False


def marks_of(model: PreTrainedModel) -> Marks:
    """The marks of a model; a plain one has none set."""
    return getattr(model, ATTRIBUTE, Marks())


def marked(model: PreTrainedModel, **marks: object) -> PreTrainedModel:
    """The same model with further marks, in a copy that shares its parameters: nothing changes them."""
    twin = copy.copy(model)
    setattr(twin, ATTRIBUTE, replace(marks_of(model), **marks))
    return twin


def refuse_zeros(model: PreTrainedModel, method: str) -> None:
    """Raise RecipeError for a technique that would fill in the zeros of a pruned model."""
    if marks_of(model).pruned:
        raise RecipeError(
            f"{method} would fill in the zeros that pruning has left; quantize.rtn, awq and mixed keep them."
        )


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of configuration, marks, names, shapes and values of all tensors, for a model without an address."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    return tensors_hash(model, repr((sorted(config.items(), key=str), marks_of(model))))


def tensors_hash(model: PreTrainedModel, besides: str = "") -> str:
    """A hash of names, shapes and values of all tensors, and of a text."""
    import torch

    digest = hashlib.sha256(besides.encode())
    tensors = model.state_dict()
    for name, layer in model.named_modules():  # packed layers keep matrices and grids outside the state dict
        if hasattr(layer, "tensor"):
            parts, how = layer.tensor.stored()
            grid = getattr(layer, "activation", None)
            digest.update(f"{name} {sorted(how.items(), key=str)} {grid is not None}".encode())
            if grid is not None:
                parts |= {part: one for part, one in vars(grid).items() if torch.is_tensor(one)}
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:20]
