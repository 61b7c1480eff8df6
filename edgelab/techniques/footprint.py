"""What training a model takes in memory, counted by running a step of it without memory.

Shapes, types and lifetimes of tensors do not need their values: a step runs on PyTorch's fake tensors, every storage is
counted where it is made and where it is let go, and the most that lived at once is the peak. So nothing is left out
that automatic differentiation keeps, and a model of 70 billion weights is counted on a laptop.

    weights       what the model holds, frozen and trained
    gradients     one value for each trained weight
    optimizer     AdamW's two moments of each trained weight
    activations   what the forward pass keeps for the backward pass
"""

from __future__ import annotations

import dataclasses
import weakref
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from edgelab.devices.memory import MemoryNeed
from edgelab.devices.shapes import ModelShape
from edgelab.model.losses import cross_entropy
from edgelab.model.shapes import skeleton
from edgelab.recipes import Context
from edgelab.storage.layers import PackedLinear
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.lora import LoRA
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.training import recomputing

# With values transformers sees that whole windows need no mask, and attention keeps none; without, it cannot look.
CAUSAL = "causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionMaskInterface.register(CAUSAL, lambda *_, **__: None)


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it lasts, real or fake ones, and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._let_go, storage.nbytes())

    def _let_go(self, n_bytes: int) -> None:
        self.bytes -= n_bytes


@dataclass(frozen=True)
class Footprint:
    """parameters, trained: of the model, numbers. need: each part at its largest. peak_gb: the most at one moment,
    which is less than their sum, since gradients come while activations go.
    """

    parameters: int
    trained: int
    need: MemoryNeed
    peak_gb: float

    @property
    def share(self) -> float:
        """Of all parameters, those that are trained."""
        return self.trained / self.parameters

    @property
    def working_gb(self) -> float:
        """Gradients and activations at the peak."""
        return self.peak_gb - self.need.weights_gb - self.need.optimizer_gb


def footprint(
    model: ModelShape | PretrainedConfig,
    technique: LoRA | None = None,
    *,
    bits: int | None = None,
    group_size: int = 64,
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
    half: bool = False,
    batch: int = 4,
    length: int = 256,
    activation_checkpointing: bool = False,
) -> Footprint:
    """The memory that a step of training takes; *analytic*: from shapes.

    technique: the adapter that is trained; None trains every weight. bits: of the linear layers, in groups of
    `group_size`; None for float. packed: whether they are held at that width, as in a file or in a kernel of 4 bits, or
    a byte each, as edgelab trains beside them. dtype: of float weights. half: matrix products in bfloat16. batch:
    windows of `length` tokens.
    """
    with torch.device("meta"):
        shapes = skeleton(_config(model) if isinstance(model, ModelShape) else model, dtype)
        count = sum(parameter.numel() for parameter in shapes.parameters())
        spared = 0.0 if bits is None else _round(shapes, bits, group_size)
        shapes.requires_grad_(technique is None)
        if technique is not None:
            shapes = technique.started(shapes, Context())
    trained = [parameter for parameter in shapes.parameters() if parameter.requires_grad]
    size, count_trained = (sum(map(of, trained)) for of in (lambda one: one.nbytes, torch.Tensor.numel))
    weights, kept, peak = _step(shapes, half, batch, length, activation_checkpointing)
    spared *= packed
    need = MemoryNeed(
        weights_gb=(weights - spared) / 1e9,
        gradients_gb=size / 1e9,
        optimizer_gb=2 * size / 1e9,
        activations_gb=kept / 1e9,
    )
    return Footprint(count + (count_trained if technique else 0), count_trained, need, (peak - spared) / 1e9)


def _config(shape: ModelShape) -> PretrainedConfig:
    """The configuration of a published model."""
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied_embeddings,
        "max_position_embeddings": shape.context_length,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(shape.model_type, **sizes)


def _round(model: PreTrainedModel, bits: int, group_size: int) -> float:
    """Put packed layers without values in place of the linear ones; returns the bytes that a byte each wastes."""
    spared = 0.0
    for name, layer in linear_layers(model, group_size=group_size).items():
        rows, columns = layer.weight.shape
        groups = columns // (group_size or columns)
        tensor = QuantizedTensor(
            torch.empty(rows, columns, dtype=torch.uint8),
            torch.empty(rows, groups, dtype=torch.float16),
            torch.empty(rows, groups, dtype=torch.uint8),
            bits,
        )
        model.set_submodule(name, PackedLinear(tensor, layer.bias))
        spared += rows * (columns + groups) * (1 - bits / 8)
    return spared


def _step(model: PreTrainedModel, half: bool, batch: int, length: int, again: bool) -> tuple[int, int, int]:
    """Bytes of the weights, of what a forward pass keeps, and of the peak of the second step of training."""
    with FakeTensorMode(), Living() as living, ExitStack() as stack:
        _materialize(model)
        model.set_attn_implementation(CAUSAL)
        weights = living.bytes
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        if again:
            stack.enter_context(recomputing(model))
        ids = torch.zeros(batch, length, dtype=torch.long)
        for _ in range(2):  # the first makes the moments
            before = living.peak = living.bytes
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = cross_entropy(model, ids)
            kept = living.bytes - before
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            del loss
        return weights, kept, living.peak


def _materialize(model: PreTrainedModel) -> None:
    """Give a model of shapes only tensors in place, shared ones shared, as the mode around it makes them."""
    made: dict[int, torch.Tensor] = {}

    def tensor(like: torch.Tensor) -> torch.Tensor:
        if id(like) not in made:
            empty = torch.empty(like.shape, dtype=like.dtype, device="cpu")
            parameter = isinstance(like, nn.Parameter)
            made[id(like)] = nn.Parameter(empty, requires_grad=like.requires_grad) if parameter else empty
        return made[id(like)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: tensor(one) for name, one in held.items() if one is not None})
        if isinstance(module, PackedLinear):
            parts = {name: tensor(one) for name, one in vars(module.tensor).items() if torch.is_tensor(one)}
            module.tensor = dataclasses.replace(module.tensor, **parts)
