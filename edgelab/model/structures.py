"""What can be removed whole: heads and channels, with the layers that write them and the one that reads them.

a channel of the MLP   a row of gate_proj and up_proj (fc1), a column of down_proj (fc2)
a head                 head_dim rows of q_proj, k_proj, v_proj, as many columns of o_proj (dense); several query heads
                       share the keys and values of one group
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edgelab.model.blocks import block_list
from edgelab.recipes import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPPORTED = "Llama, Qwen2, Qwen3, Gemma, Phi and StableLM"
_MLP = (("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")), ("mlp.fc2", ("mlp.fc1",)))
_ATTENTION = (
    ("self_attn.o_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.dense", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
)


class UnsupportedLayout(RecipeError):
    """A model whose heads and channels are not where they are looked for."""


@dataclass(frozen=True)
class Part:
    """One MLP or attention by the full names of its layers: `reader` reads what the `writers` made."""

    reader: str
    writers: tuple[str, ...]


def mlps(model: PreTrainedModel) -> list[Part]:
    """The MLP of each block. Raises UnsupportedLayout, naming the layouts that are supported."""
    return _parts(model, _MLP, "channels")


def attentions(model: PreTrainedModel) -> list[Part]:
    """The attention of each block; the writers are those of queries, keys and values. Raises UnsupportedLayout."""
    return _parts(model, _ATTENTION, "heads")


def _parts(model: PreTrainedModel, known: tuple, what: str) -> list[Part]:
    name, blocks = block_list(model)
    found = []
    for place, block in enumerate(blocks):
        modules = dict(block.named_modules())
        for reader, writers in known:
            if all(isinstance(modules.get(one), nn.Linear) for one in (reader, *writers)):
                start = f"{name}.{place}."
                found.append(Part(start + reader, tuple(start + one for one in writers)))
                break
        else:
            raise UnsupportedLayout(
                f"Block {place} of {type(model).__name__} has no {what} in float layers that can be removed; layouts "
                f"like those of {SUPPORTED} are supported, before they are quantized."
            )
    return found


def narrow(layer: nn.Linear, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Keep some outputs and inputs of a layer, by index, in place."""
    weight, bias = layer.weight.detach(), layer.bias
    if outputs is not None:
        weight = weight[outputs]
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach()[outputs], requires_grad=bias.requires_grad)
    if inputs is not None:
        weight = weight[:, inputs]
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=layer.weight.requires_grad)
    layer.out_features, layer.in_features = weight.shape
