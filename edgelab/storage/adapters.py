"""Adapters: low-rank matrices beside a model's own, which stay as they are; peft's layers and PEFT's files.

y = W x + scale B A x        A (rank, in_features), B (out_features, rank), scale = alpha / rank or alpha / sqrt(rank)

Hu et al. 2021, arXiv:2106.09685. peft is imported where it is used: it takes half a second, and most models have none.
"""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgelab.errors import EdgeLabError
from edgelab.model.marks import tensors_hash
from edgelab.storage.layers import PackedLinear, dense_linear

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import Linear as LoraLinear
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
NAME = "default"
PREFIX = "base_model.model."  # of every name in a file of PEFT's
BASE = (
    "edgelab_base"  # of a model with adapters: the hash of what they stand beside; and a file next to PEFT's
)
PLACE = re.compile(r"(?P<layer>.+)\.lora_(?:(?P<which>[AB])\.weight|magnitude_vector(?:\.weight)?)")


class AdapterError(EdgeLabError):
    """An adapter that does not belong to the model."""


class OtherWeights(AdapterError):
    """An adapter that was trained beside other weights of the same shapes."""


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether layers carry an adapter."""
    return bool(getattr(model, "peft_config", None))


def attach(model: PreTrainedModel, config: LoraConfig, name: str = NAME) -> None:
    """Put an adapter on the layers of a model that `config` names, packed ones too, in place; only it is trained."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import cast_adapter_dtype

    if not hasattr(model, BASE):
        setattr(model, BASE, _hash_of(model))
    config._register_custom_module({PackedLinear: Linear})
    model.requires_grad_(False)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    for layer in packed:
        layer.qweight = torch.empty(0)  # where peft looks for the device of a layer without parameters
    try:
        with warnings.catch_warnings():  # of layers not its own, and of a second adapter: both are meant
            warnings.filterwarnings(
                "ignore", "Unsupported layer type|Already found a `peft_config`", UserWarning
            )
            inject_adapter_in_model(config, model, name)
        cast_adapter_dtype(model, name)  # 16 bits are too coarse to train in
    finally:
        for layer in packed:
            del layer.qweight


def adapted_layers(model: PreTrainedModel) -> dict[str, LoraLinear]:
    """The layers that carry adapters, by name."""
    if not has_adapter(model):
        return {}
    from peft.tuners.lora import Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def kind(model: PreTrainedModel, name: str = NAME) -> str:
    """lora, or dora where the lengths of the columns are trained apart."""
    return "dora" if model.peft_config[name].use_dora else "lora"


def adapter_tensors(model: PreTrainedModel, name: str = NAME) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that PEFT's files have."""
    from peft.utils import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=name)
    return {PREFIX + one: tensor.detach().contiguous() for one, tensor in found.items()}


def write(model: PreTrainedModel, folder: Path, name: str = NAME) -> None:
    """Write an adapter into a folder as PEFT does, and the hash of what it stands beside."""
    save_file(adapter_tensors(model, name), folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(folder)
    (folder / BASE).write_text(getattr(model, BASE))


def read(model: PreTrainedModel, folder: Path, name: str = NAME) -> None:
    """Put an adapter that PEFT or `write` wrote on a model, in place, beside those that are there.

    Raises AdapterError, with the model as it was, for a folder without one, and for one of another model: of other
    weights where `write` noted which, of other layers or shapes always.
    """
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict

    try:
        config = LoraConfig.from_pretrained(folder)
        tensors = {one.removeprefix(PREFIX): tensor for one, tensor in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise AdapterError(f"{folder} holds no adapter of PEFT's ({str(error).splitlines()[0]}).") from None
    _check_fits(model, tensors, config, folder)
    noted, base = folder / BASE, getattr(model, BASE, None) or _hash_of(model)
    if noted.is_file() and noted.read_text() != base:
        raise OtherWeights(f"The adapter in {folder} was trained beside other weights than this model has.")
    config.init_lora_weights = True  # whatever they began from, they are known now
    setattr(model, BASE, base)
    try:
        attach(model, config, name)
    except ValueError as error:  # peft finds nothing to put it on
        raise AdapterError(
            f"The adapter in {folder} is of another model: {str(error).splitlines()[0]}"
        ) from None
    set_peft_model_state_dict(model, tensors, name)
    for layer in adapted_layers(model).values():
        layer.requires_grad_(False)


def _hash_of(model: PreTrainedModel) -> str:
    """Of the tensors; shapes alone have nothing to tell them apart."""
    return "" if next(model.parameters()).is_meta else tensors_hash(model)


def _check_fits(model: PreTrainedModel, tensors: dict[str, Tensor], config: LoraConfig, folder: Path) -> None:
    """Raise AdapterError where the model has no layer of the name or the width that a tensor is for.

    And where a tensor has another rank than the settings say.
    """
    modules = dict(model.named_modules())
    for place, tensor in tensors.items():
        found = PLACE.fullmatch(place)
        layer = modules.get(found["layer"]) if found else None
        layer = getattr(layer, "base_layer", layer)
        if found is None or not isinstance(layer, nn.Linear | PackedLinear):
            raise AdapterError(f"The adapter in {folder} is of another model: it has {place}.")
        inputs, outputs = layer.in_features, layer.out_features
        side, wanted = {"A": (1, inputs), "B": (0, outputs)}.get(found["which"], (0, outputs))
        if tensor.shape[side] != wanted:
            raise AdapterError(
                f"The adapter in {folder} is of another model: {place} is {tuple(tensor.shape)}, and the layer has "
                f"{inputs} inputs and {outputs} outputs."
            )
        if found["which"] and not config.rank_pattern and tensor.shape[1 - side] != config.r:
            raise AdapterError(
                f"The adapter in {folder} does not agree with itself: its settings say rank {config.r}, and {place} is "
                f"{tuple(tensor.shape)}."
            )


def use(model: PreTrainedModel, name: str | None) -> None:
    """Let one of several adapters speak, or none of them, at once and in place."""
    for layer in adapted_layers(model).values():
        layer.enable_adapters(name is not None)
        if name is not None:
            layer.set_adapter(name)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with one dense matrix W + scale B A for each adapted layer, and no adapters."""
    model = copy.deepcopy(model)
    for name, layer in adapted_layers(model).items():
        base = layer.get_base_layer()
        if isinstance(base, PackedLinear):
            weight = nn.Parameter(base.tensor.dequantize(model.dtype), requires_grad=False)
            layer.base_layer = dense_linear(weight, base.bias)
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    delattr(model, BASE)
    return model
