"""What ExecuTorch runs: a model with attention and cache as its own operators, lowered to XNNPACK.

One method, `forward(ids, start, kept)`: the next tokens of a sequence (1, time), their first position (1,) and the
places among them whose logits are wanted (places,); time and places may be anything up to CHUNK. It returns
(1, places, vocabulary). Keys and values are buffers of the program.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CHUNK = 512  # tokens at once; memory for their logits is planned, not touched
ROOM = 2048  # tokens of the cache
ATTENTION = "edgelab_executorch"  # a name that transformers has no mask for: the operator masks by itself


class StateCache:
    """Keys and values in buffers (1, ROOM, heads, head_dim), as transformers' models use a cache."""

    def __init__(self, owner: nn.Module, config: PretrainedConfig, room: int) -> None:
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.owner = owner
        for layer in range(config.num_hidden_layers):
            for name in ("keys", "values"):
                empty = torch.zeros(1, room, heads, head_dim)
                owner.register_buffer(f"{name}_{layer}", empty, persistent=False)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write (1, heads, time, head_dim) from `start` on; returns the buffers."""
        kept = []
        for name, new in (("keys", keys), ("values", values)):
            buffer = getattr(self.owner, f"{name}_{layer}")
            torch.ops.llama.update_cache(new.transpose(1, 2).contiguous(), buffer, self.owner.start)
            kept.append(buffer)
        return kept[0], kept[1]

    def get_seq_length(self, *_: object) -> int:
        """Positions are given."""
        return 0


def attend(
    layer: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: None, **kwargs: object
) -> tuple[Tensor, None]:
    """Causal attention of (1, heads, time, head_dim) to all that the buffers hold; (1, time, heads, head_dim)."""
    start = layer.step.start
    found = torch.ops.llama.custom_sdpa(
        query.transpose(1, 2).contiguous(), keys, values, start, None, 0.0, True, kwargs.get("scaling")
    )
    return found, None


class Step(nn.Module):
    """A model with its cache as a function of the next tokens; see the head of this file. Changes the model."""

    def __init__(self, model: PreTrainedModel, room: int) -> None:
        super().__init__()
        self.model, self.start, self.room = model, 0, room
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        self.cache = StateCache(self, model.config, room)
        for layer in model.modules():
            if hasattr(layer, "layer_idx") and hasattr(layer, "head_dim"):
                object.__setattr__(layer, "step", self)  # no submodule: it would be its own child

    def forward(self, ids: Tensor, start: Tensor, kept: Tensor) -> Tensor:
        self.start = start[0].item()
        torch._check(self.start >= 0)
        torch._check(self.start < self.room - ids.shape[1])
        places = (torch.arange(ids.shape[1]) + self.start)[None]
        hidden = self.model.base_model(
            input_ids=ids, position_ids=places, past_key_values=self.cache, use_cache=True
        )[0]
        return self.model.lm_head(hidden[:, kept])
