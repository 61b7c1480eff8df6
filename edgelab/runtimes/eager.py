"""PyTorch eager, with torch's packed CPU kernels for int8 and int4.

| stored                                              | runs as                                                    |
| --------------------------------------------------- | ---------------------------------------------------------- |
| 2 to 4 bits, groups that 32 divides, or whole rows  | `_weight_int4pack_mm_for_cpu`, bfloat16                    |
| 5 to 8 bits, one scale per row                      | `_weight_int8pack_mm`, bfloat16                            |
| one scale per row, symmetric, int8 activations      | `_int_mm`, int8 x int8 -> int32                            |
| floats, compressed sparse rows                      | torch's sparse product, in their own dtype                 |
| without its zeros, any other                        | as the same matrix with them: filled in at loading         |
| any other                                           | unpacked to one byte, dequantized whenever it is used      |

Fewer bits are unpacked at loading to the next width that has a kernel; bits per weight on disk stay as they are.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel

from edgelab.model.logits import CHUNK, head_logits, hidden_states, short_text
from edgelab.model.marks import marks_of
from edgelab.runtimes.session import Can, Session, SessionError, taken
from edgelab.storage import variants
from edgelab.storage.csr import CompressedRows
from edgelab.storage.description import Description
from edgelab.storage.kv_cache import PackedGroups, QuantizedCacheError
from edgelab.storage.layers import ActivationGrid, PackedLinear, dense_linear, packed_layers
from edgelab.storage.matrix import Matrix
from edgelab.storage.sparse import SparseMatrix
from edgelab.storage.uniform import QuantizedTensor

LONG = 16  # tokens from which int8 goes through a dense bfloat16 product


class Int4Linear(nn.Module):
    """A linear layer on torch's int4 kernel: bfloat16 activations, weights (q - 8) * scale + offset per group.

    Narrower integers sit in the middle of the kernel's, so that offsets stay small. Scales and offsets are rounded to
    bfloat16, by at most 2**-8 of a value: see `tests/test_kernels.py` for the precision that follows.
    """

    kernel = "int4pack_mm bf16"

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.group_size = int4_group_size(tensor)
        self.bias = bias
        repeats = tensor.group_size // self.group_size
        scale = tensor.scale.float().expand(len(tensor.integers), -1)  # (out, groups)
        middle = 2 ** (tensor.bits - 1)
        offset = (middle - tensor.centre()) * scale  # (q - z) s = (q - middle) s + (middle - z) s
        grid = torch.stack([scale, offset], -1).repeat_interleave(repeats, 1)  # (out, groups, 2)
        self.register_buffer("grid", grid.transpose(0, 1).contiguous().bfloat16(), persistent=False)
        packed = torch._convert_weight_to_int4pack_for_cpu(tensor.integers.int() + 8 - middle, 1)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1]).bfloat16()  # (tokens, in_features)
        outputs = torch._weight_int4pack_mm_for_cpu(flat, self.packed, self.group_size, self.grid)
        outputs = outputs.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


class Int8Linear(nn.Module):
    """A linear layer on torch's int8 kernel: bfloat16 activations, one scale per row.

    The kernel is symmetric; an integer zero-point adds one number per row times the sum of the inputs, exactly:
    (q - z) s = (q - 128) s + (128 - z) s.
    """

    kernel = "int8pack_mm bf16"

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        middle = 2 ** (tensor.bits - 1)
        integers = (tensor.integers.short() - middle).to(torch.int8)
        self.register_buffer("integers", integers, persistent=False)
        scale = tensor.scale.bfloat16().expand(len(integers), -1)[:, 0].contiguous()
        self.register_buffer("scale", scale, persistent=False)
        # With the kernel's own bfloat16 scale, so that integers and zero-point stay on one grid.
        offset = None if tensor.zero_point is None else (middle - tensor.centre()[:, 0]) * self.scale.float()
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1]).bfloat16()  # (tokens, in_features)
        if len(flat) < LONG:
            outputs = torch._weight_int8pack_mm(flat, self.integers, self.scale)
        else:  # the kernel is made for few tokens; bfloat16 holds every int8 exactly
            outputs = functional.linear(flat, self.integers.bfloat16()) * self.scale
        if self.offset is not None:
            outputs = outputs.float() + flat.float().sum(-1, keepdim=True) * self.offset
        outputs = outputs.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


class Int8ActivationLinear(nn.Module):
    """A linear layer on torch's integer product: uint8 activations, int8 weights with one symmetric scale per row.

    The product takes activations less 128, and what that and the zero-point add to a row is the sum of its weights
    times a whole number: (q - z) = (q - 128) - (z - 128). Sums are exact, in int32.
    """

    kernel = "int8 x int8 int_mm"

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, activation: ActivationGrid) -> None:
        super().__init__()
        self.bias = bias
        self.activation = activation
        integers = (tensor.integers.short() - 2 ** (tensor.bits - 1)).to(torch.int8)
        self.register_buffer("integers", integers, persistent=False)
        self.register_buffer("sums", integers.sum(1, dtype=torch.int32), persistent=False)
        scale = tensor.scale.float().expand(len(integers), -1)[:, 0].contiguous()
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1]).float()  # (tokens, in_features)
        grid = self.activation.found(flat)
        rounded = grid.integers(flat).sub_(128).to(torch.int8)
        # (out,), or (tokens, out) where each token has a zero-point
        offset = self.sums * (grid.zero_point.int() - 128)
        outputs = torch._int_mm(rounded, self.integers.t()).sub_(offset) * (grid.scale * self.scale)
        if self.bias is not None:
            outputs += self.bias
        return outputs.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)


class SparseRowsLinear(nn.Module):
    """A linear layer on torch's product of compressed sparse rows with a dense matrix."""

    kernel = "sparse csr mm"

    def __init__(self, rows: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.register_buffer("rows", rows.to_sparse_csr(), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])  # (tokens, in_features)
        outputs = torch.sparse.mm(self.rows, flat.T.to(self.rows.dtype)).T
        outputs = outputs.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)
        return outputs if self.bias is None else outputs + self.bias


def int4_group_size(tensor: QuantizedTensor) -> int:
    """The largest group size of the int4 kernel that divides the tensor's groups; 0 where none does."""
    return next((size for size in (256, 128, 64, 32) if tensor.group_size % size == 0), 0)


def kernel_for(tensor: Matrix, activation: ActivationGrid | None = None) -> type[nn.Module] | None:
    """The packed layer that can run a quantized matrix behind that activation grid, or None."""
    if not isinstance(tensor, QuantizedTensor):
        return None
    out_features = tensor.shape[0]
    if activation is not None:
        return Int8ActivationLinear if tensor.scale.shape[1] == 1 and tensor.zero_point is None else None
    if tensor.bits <= 4 and int4_group_size(tensor) and out_features % 16 == 0:
        return Int4Linear
    return Int8Linear if tensor.scale.shape[1] == 1 else None


class TorchCache:
    """Keys and values of one sequence in a PyTorch model, on the grid that the model is marked with, if any."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.grid = marks_of(model).cache
        self._config = model.config
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.values: Cache = (
            self.grid.new_cache(self._config) if self.grid else DynamicCache(config=self._config)
        )

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a state in place of keys and values, which is neither cut nor copied."""
        return any(not hasattr(layer, "batch_repeat_interleave") for layer in self.values.layers)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are kept; 0 for a model without any."""
        try:
            return self.values.get_seq_length()
        except ValueError:  # no layer has keys and values
            return 0

    def cut(self, length: int) -> bool:
        """Keep the first tokens; False where they are packed, or where a window has forgotten what comes back."""
        if self.recurrent:
            return False
        surplus = self.values.get_seq_length() - length
        try:
            self.values.crop(-surplus)
        except (QuantizedCacheError, RuntimeError):
            return False
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layers keep."""
        kept = (one for layer in self.values.layers for one in vars(layer).values())
        return sum(one.nbytes for one in kept if isinstance(one, Tensor | PackedGroups))

    def fork(self) -> TorchCache | None:
        """The same keys and values for another sequence; None for a state. Steps replace tensors, and change none."""
        if self.recurrent:
            return None
        other = copy.copy(self)
        other.values = self._shared()
        return other

    def twin(self, batch: int) -> Cache:
        """The same keys and values for each of `batch` sequences, so that nothing is shared."""
        twin = self._shared()
        twin.batch_repeat_interleave(batch)
        return twin

    def _shared(self) -> Cache:
        """A cache over the same tensors, which steps replace and do not change."""
        other = copy.copy(self.values)
        other.layers = [copy.copy(layer) for layer in self.values.layers]
        return other


class Eager(Session):
    """A variant in PyTorch eager, on packed kernels where there are any. Greedy decoding with a growing cache.

    Layers that round their inputs without an integer kernel for it make the whole a simulation: the badge says so.
    variant: its folder, or a model in memory, whose packed layers are changed in place.
    """

    badge = "packed"
    adapters = True
    can = Can(layers=True, sequences=True)
    tolerance = 1e-4  # float32 sums in another order

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        """PyTorch runs all but what is left to an engine's own quantizer."""
        if (width := about.marks.native) is None:
            return None
        return (
            f"native.{width} is rounded by an engine itself; name one, as in 'native.{width} @ onnxruntime'."
        )

    def __init__(self, variant: Path | PreTrainedModel) -> None:
        super().__init__()
        self.model: PreTrainedModel = variants.load(variant) if isinstance(variant, Path) else variant
        self.vocabulary = self.model.config.get_text_config().vocab_size
        self.short = short_text(self.model.config)
        self.kernel = self._prepare()
        if "bf" in self.kernel:  # what is summed in another order is rounded to 8 significant bits
            self.tolerance = 0.05
        self._cache = TorchCache(self.model)
        if self._cache.grid is not None:
            self.kernel += f" + int{self._cache.grid.bits} cache"

    def _prepare(self) -> str:
        """Put kernels in place; returns their names."""
        kernel, rounds = use_kernels(self.model)
        self.badge = "simulated" if rounds else self.badge
        return kernel

    def _feed(self, ids: list[int], every: bool) -> Tensor:
        if self.ids and self._cache.length != self.length:
            raise SessionError(
                f"A {self.model.config.model_type} model does not go on from keys and values, so that nothing can be "
                "written or timed with it here; use only=quality."
            )
        size = CHUNK if every and self._cache.grid else len(ids)
        if (
            self.ids and self._cache.recurrent
        ):  # many of these models take several tokens at the beginning only
            size = 1
        pieces = torch.tensor([ids]).split(size, 1)
        with torch.inference_mode():
            hidden = [hidden_states(self.model, piece, self._cache.values) for piece in pieces]
            return head_logits(self.model, torch.cat(hidden, 1)[0] if every else hidden[-1][0, -1:])

    def _cut(self, length: int) -> bool:
        if length == 0:
            self._cache.reset()
            return True
        return self._cache.cut(length)

    def _swap(self, kept: TorchCache | None) -> TorchCache:
        mine, self._cache = self._cache, TorchCache(self.model) if kept is None else kept
        return mine

    def continuations(self, candidates: list[list[int]]) -> list[Tensor]:
        """As `Session.continuations`, all candidates in one batch: what fills up the shorter ones lies behind them."""
        first, longest = self._next(), max(map(len, candidates))
        if self._cache.recurrent or self._turns(self.length + longest - 1):
            return super().continuations(candidates)
        if longest == 1:
            return [taken(first, candidate) for candidate in candidates]
        filled = torch.tensor([(ids + [0] * longest)[: longest - 1] for ids in candidates])
        with torch.inference_mode():
            hidden = hidden_states(self.model, filled, self._cache.twin(len(candidates)))
            return [
                taken(torch.cat([first, head_logits(self.model, row)]), candidate)
                for row, candidate in zip(hidden, candidates, strict=True)
            ]

    def close(self) -> None:
        """Forget model and cache."""
        super().close()
        del self.model, self._cache


def use_kernels(model: PreTrainedModel) -> tuple[str, bool]:
    """Put kernels in place of packed layers; returns their names, and whether inputs are rounded without one."""
    names: dict[str, None] = {}
    dtype, simulates = str(model.dtype).removeprefix("torch."), False
    made: dict[int, nn.Module] = {}
    for name, layer in packed_layers(model).items():
        if not isinstance(layer, PackedLinear):
            continue
        filled = ""
        if isinstance(layer.tensor, SparseMatrix):
            layer, filled = _filled_in(layer), ", zeros filled in"
            model.set_submodule(name, layer)
            if not isinstance(layer, PackedLinear):
                names[getattr(layer, "kernel", f"{dtype} linear{filled}")] = None
                continue
        fast = kernel_for(layer.tensor, layer.activation)
        if fast is None:
            rounds = layer.activation is not None
            names[f"unpacked when used, {dtype}{' after rounding the inputs' * rounds}{filled}"] = None
            simulates = simulates or rounds
            continue
        if id(layer.tensor) not in made:
            grids = [] if layer.activation is None else [layer.activation]
            made[id(layer.tensor)] = fast(layer.tensor, layer.bias, *grids)
        stored = layer.tensor.bits
        width = 4 if fast is Int4Linear else 8
        names[fast.kernel + (f" ({stored} bits unpacked to {width})" if stored < width else "") + filled] = (
            None
        )
        model.set_submodule(name, made[id(layer.tensor)])
    return " + ".join(names) or f"{dtype} linear", simulates


def _filled_in(layer: PackedLinear) -> nn.Module:
    """What runs a layer that is stored without its zeros: sparse rows as they are, all else with the zeros back."""
    dense = layer.tensor.dense
    if isinstance(dense, QuantizedTensor):
        return PackedLinear(dense, layer.bias, layer.activation)
    if isinstance(layer.tensor, CompressedRows):
        return SparseRowsLinear(dense, layer.bias)
    return dense_linear(nn.Parameter(dense, requires_grad=False), layer.bias)


def _round_inputs(grid: ActivationGrid, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return grid.round(inputs[0])


class Simulated(Eager):
    """The same numbers in dense float weights: for quality only, neither its bytes nor its speed mean anything."""

    badge = "simulated"

    def _prepare(self) -> str:
        for name, layer in packed_layers(self.model).items():
            if isinstance(layer, PackedLinear):
                weight = nn.Parameter(layer.tensor.dequantize(self.model.dtype), requires_grad=False)
                dense = dense_linear(weight, layer.bias)
                if layer.activation is not None:
                    dense.register_forward_pre_hook(partial(_round_inputs, layer.activation))
            else:
                dense = nn.Embedding.from_pretrained(layer.scaled(layer.tensor.dequantize()))
            self.model.set_submodule(name, dense)
        return f"dense {str(self.model.dtype).removeprefix('torch.')}"
