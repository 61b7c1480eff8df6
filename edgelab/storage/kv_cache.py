"""Quantized key-value cache: keys per channel, values per token, the most recent tokens as they are.

low = min(x)      scale = (max(x) - low) / (2**bits - 1)      q = round((x - low) / scale)      x ~ q * scale + low

over groups of `group_size` numbers: for keys those of one channel in consecutive tokens, since a few channels of the
keys are large in every token; for values those of one token in consecutive channels. Scales and minima are float16;
where its range does not hold them, all that a layer has packed is times a power of two.
Liu et al. 2024, KIVI, arXiv:2402.02750.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from edgelab.devices import head_cache_bytes
from edgelab.errors import EdgeLabError
from edgelab.storage.bits import pack_last, unpack_last
from edgelab.storage.scales import LARGEST, SMALLEST, shifted, top_exponent

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class QuantizedCacheError(EdgeLabError):
    """Something asked of a quantized cache that it can no longer do."""


@dataclass
class PackedGroups:
    """Groups of numbers on a uniform grid each, packed: x ~ (integer * scale + low) * 2**exponent.

    packed: (..., group_size * bits / 8) uint8. scale, low: (...) float16. exponent: 0 where float16 holds scales and
    minima as they are.
    """

    packed: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    exponent: int = 0

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scale.nbytes + self.low.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, (..., group_size)."""
        integers = unpack_last(self.packed, self.bits).float()
        low, scale = (shifted(part, self.exponent)[..., None] for part in (self.low, self.scale))
        return torch.addcmul(low, integers, scale).to(dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedGroups:
        """The same change made to each of the three tensors."""
        parts = change(self.packed), change(self.scale), change(self.low)
        return PackedGroups(*parts, self.bits, self.exponent)

    def append(self, more: PackedGroups) -> PackedGroups:
        """Both, one after the other along axis 2: of keys the groups of tokens, of values the tokens."""
        both = self, more
        if self.exponent != more.exponent:  # the larger numbers of both decide
            exponent = max(
                one.exponent + top_exponent(torch.maximum(one.scale, one.low.abs())) for one in both
            )
            both = [one.times(exponent) for one in both]
        pairs = zip(*((one.packed, one.scale, one.low) for one in both), strict=True)
        return PackedGroups(*(torch.cat(pair, 2) for pair in pairs), self.bits, both[0].exponent)

    def times(self, exponent: int) -> PackedGroups:
        """The same numbers with another exponent."""
        scale, low = (shifted(part, self.exponent - exponent).half() for part in (self.scale, self.low))
        return PackedGroups(self.packed, scale, low, self.bits, exponent)


def quantize_groups(groups: Tensor, bits: int) -> PackedGroups:
    """Round every group onto the uniform grid from its minimum to its maximum. groups: (..., group_size), float.

    The float16 of minimum and scale are rounded outwards, so that nothing is clipped and every number is off by at
    most half a scale, also where the numbers of a group lie close together and far from zero.
    """
    values, exponent = groups.float(), 0
    low, step = _ends(values, bits)
    if ((step > 0) & (step < SMALLEST) | ~(step <= LARGEST)).any():
        exponent = top_exponent(values) + 1  # room for rounding outwards
        values = shifted(values, -exponent)
        low, step = _ends(values, bits)
    scale = _float16_beyond(step.clamp(min=SMALLEST), math.inf)
    integers = torch.round((values - low.float()[..., None]) / scale.float()[..., None])
    packed = pack_last(integers.clamp_(0, 2**bits - 1).to(torch.uint8), bits)
    return PackedGroups(packed, scale, low, bits, exponent)


def _ends(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The minimum of each group in float16, rounded down, and its step from there to the maximum, float32."""
    low = _float16_beyond(values.amin(-1), -math.inf)
    return low, (values.amax(-1) - low.float()) / (2**bits - 1)


def quantize_keys(keys: Tensor, bits: int, group_size: int) -> PackedGroups:
    """Per channel: (batch, heads, tokens, channels) in groups (batch, heads, tokens / group_size, channels)."""
    return quantize_groups(keys.unflatten(2, (-1, group_size)).transpose(-1, -2), bits)


def dequantize_keys(groups: PackedGroups, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_keys`, (batch, heads, tokens, channels)."""
    return groups.dequantize(dtype).transpose(-1, -2).flatten(2, 3)


def quantize_values(values: Tensor, bits: int, group_size: int) -> PackedGroups:
    """Per token: (batch, heads, tokens, channels) in groups (batch, heads, tokens, channels / group_size)."""
    return quantize_groups(values.unflatten(-1, (-1, group_size)), bits)


def dequantize_values(groups: PackedGroups, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_values`, (batch, heads, tokens, channels)."""
    return groups.dequantize(dtype).flatten(-2)


def _float16_beyond(values: Tensor, end: float) -> Tensor:
    """The nearest float16 that is not short of `values` on the way to `end`, plus or minus infinity."""
    near = values.half()
    short = near.float() > values if end < 0 else near.float() < values
    return torch.where(short, torch.nextafter(near, torch.full_like(near, end)), near)


@dataclass(frozen=True)
class CacheGrid:
    """How a model keeps its keys and values. A model marked with one carries it as the attribute `cache_grid`."""

    bits: int
    group_size: int
    residual: int

    def new_cache(self, config: PretrainedConfig) -> QuantizedCache:
        """An empty cache for a model of this configuration."""
        return QuantizedCache(config, self)

    def nbytes(self, config: PretrainedConfig, tokens: int, bytes_per_value: float = 4) -> float:
        """Bytes of one sequence in the cache: packed integers, scales and minima, recent tokens as they are."""
        heads, head_dim = head_shape(config)
        settings = self.bits, self.group_size, self.residual, 8 * bytes_per_value
        return config.num_hidden_layers * heads * head_cache_bytes(head_dim, tokens, *settings)


def head_shape(config: PretrainedConfig) -> tuple[int, int]:
    """Key-value heads of each layer and channels of each head."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class QuantizedCache(Cache):
    """A cache of transformers that holds packed integers; it grows as a DynamicCache does."""

    def __init__(self, config: PretrainedConfig, grid: CacheGrid) -> None:
        super().__init__(layers=[QuantizedLayer(grid) for _ in range(config.num_hidden_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds."""
        return sum(layer.nbytes for layer in self.layers)


class QuantizedLayer(DynamicLayer):
    """Keys and values of one layer: `keys` and `values` are the recent tokens, packed is what came before them.

    Between `residual` and `residual + group_size - 1` tokens are recent; the oldest are packed, `group_size` at a
    time, after the step that brought the newest. What is packed is never rounded again.
    """

    is_croppable = False

    def __init__(self, grid: CacheGrid) -> None:
        super().__init__()
        self.grid = grid
        self.packed_keys: PackedGroups | None = None
        self.packed_values: PackedGroups | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens, (batch, heads, tokens, channels), and return all, those that are packed dequantized."""
        keys, values = super().update(key_states, value_states)
        if self.packed_keys is not None:
            keys = torch.cat([dequantize_keys(self.packed_keys, self.dtype), keys], -2)
            values = torch.cat([dequantize_values(self.packed_values, self.dtype), values], -2)
        self._pack_oldest()
        return keys, values

    def _pack_oldest(self) -> None:
        leaving = self.keys.shape[-2] - self.grid.residual
        leaving -= leaving % self.grid.group_size
        if leaving <= 0:
            return
        bits, group_size = self.grid.bits, self.grid.group_size
        keys = quantize_keys(self.keys[..., :leaving, :], bits, group_size)
        values = quantize_values(self.values[..., :leaving, :], bits, min(group_size, self.values.shape[-1]))
        self.packed_keys = self.packed_keys.append(keys) if self.packed_keys else keys
        self.packed_values = self.packed_values.append(values) if self.packed_values else values
        self.keys = self.keys[..., leaving:, :].clone()  # a slice would keep the bytes of the whole
        self.values = self.values[..., leaving:, :].clone()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed and of the recent tokens, scales and minima included."""
        parts = (self.keys, self.values, self.packed_keys, self.packed_values)
        return sum(part.nbytes for part in parts if part is not None)

    def get_seq_length(self) -> int:
        packed = 0 if self.packed_values is None else self.packed_values.packed.shape[2]
        return packed + super().get_seq_length()

    def reset(self) -> None:
        super().reset()
        self.packed_keys = self.packed_values = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number. Raises QuantizedCacheError for packed ones."""
        recent = super().get_seq_length()
        if -tokens_to_remove > recent:
            raise QuantizedCacheError(
                f"{-tokens_to_remove} tokens cannot be taken out of the cache: only the last {recent} are not packed; "
                f"a residual above {self.grid.residual} keeps more."
            )
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._over_batch(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._over_batch(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._over_batch(lambda tensor: tensor[indices])

    def _over_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = change(self.keys), change(self.values)
        if self.packed_keys is not None:
            self.packed_keys, self.packed_values = (
                self.packed_keys.map(change),
                self.packed_values.map(change),
            )
