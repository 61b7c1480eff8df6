"""Where NaN and infinity begin: in which stored tensor, or in the output of which module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

from edgelab.errors import EdgeLabError


class NotFiniteError(EdgeLabError):
    """NaN or infinity in weights, activations or logits: nothing that is computed with them means anything."""


def check_tensors(tensors: Mapping[str, Tensor], whose: str) -> None:
    """Raises NotFiniteError naming the first float tensor that holds NaN or infinity. whose: as in "of this model"."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            found = "NaN" if tensor.isnan().any() else "infinity"
            raise NotFiniteError(
                f"{name} {whose} holds {found}; give finite weights, and a number format that reaches as far as "
                "they do (quantize.fp16 ends at 65,504, quantize.bf16 does not)."
            )


def first_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Name of the first module whose output is not finite while `run` runs the model; None where there is none.

    A module comes after those inside it.
    """
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if not found and isinstance(tensor, Tensor) and not tensor.isfinite().all():
            found.append(name)

    hooks = [part.register_forward_hook(partial(look, name)) for name, part in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
