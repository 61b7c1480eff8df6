"""GGUF files as models of transformers, in float32.

A model that loads computes what the file says: every setting and every tensor of it has been understood, or the file
is refused with the name of what has not. Settings are the keys under the name of the architecture, as in llama.cpp;
others describe the file, its tokenizer, or how it was made.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab.errors import EdgeLabError, few, listed

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from transformers import PretrainedConfig, PreTrainedModel

    from edgelab.gguf_files.layouts import Layout, Places

TOKENS = {  # what the file says of tokens, and of where it comes from -> what the configuration calls it
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
    "tokenizer.ggml.unknown_token_id": "unk_token_id",
    "general.name": "_model_name_or_path",
}
FUSED = ".attn_qkv."  # queries, keys and values in one tensor
VERSIONS = (2, 3)  # of the format, that the gguf package reads
OTHER = {  # what a file holds besides models, by general.type
    "adapter": "a LoRA adapter",
    "mmproj": "what makes images or sounds into embeddings",
    "imatrix": "statistics of activations",
}
UNKNOWN_TYPE = re.compile(r"(\d+)\)? is not a valid GGMLQuantizationType")


class GGUFError(EdgeLabError):
    """A GGUF file that is damaged, or states what transformers cannot compute."""


def read(path: Path) -> PreTrainedModel:
    """Decode a GGUF file to a float32 model. Raises GGUFError for what would compute something else than the file."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from edgelab.gguf_files.layouts import LAYOUTS, Places

    file = opened(path)
    config = _config(file, path.name)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    places = Places(LAYOUTS[config.model_type], config)
    _fill(model, places, {tensor.name: tensor for tensor in file.tensors}, path.name)
    return model.eval()


def read_config(path: Path) -> PretrainedConfig:
    """The configuration of the model in a GGUF file. Raises GGUFError as `read` does, but for what tensors hold."""
    return _config(opened(path), path.name)


def _config(file: GGUFReader, name: str) -> PretrainedConfig:
    from transformers import AutoConfig

    from edgelab.gguf_files.layouts import ACTIVATION, Keys, attention_scalar, configured

    kind, layout = _layout(file, name)
    said = Keys(
        {
            key.removeprefix(f"{layout.name}."): field.contents()
            for key, field in file.fields.items()
            if key.startswith(f"{layout.name}.")
        }
    )
    for key in layout.needed:
        if said(key) is None:
            raise GGUFError(f"{name} lacks {layout.name}.{key}; give the whole file.")
    stored = {tensor.name: tensor for tensor in file.tensors}
    for fused in [tensor for tensor in file.tensors if FUSED in tensor.name]:
        stored |= dict.fromkeys(_parts(fused.name), fused)  # which a layout asks for by name alone
    if "token_embd.weight" not in stored:
        raise GGUFError(f"{name} lacks token_embd.weight; give the whole file.")
    rows, tokens = len(stored["token_embd.weight"].data), file.get_field("tokenizer.ggml.tokens")
    if tokens is not None and len(tokens.data) > rows:
        raise GGUFError(
            f"{name} has {len(tokens.data)} tokens and an embedding of {rows} rows; fetch or convert it again."
        )

    def refuse(what: str) -> GGUFError:
        return GGUFError(f"{name} {what}, which is not read here; give the safetensors folder.")

    settings = configured(layout, said, _Decoded(stored, name), refuse)
    if (activation := stated(file, ACTIVATION)) is not None:
        if activation not in layout.activation:
            raise refuse(f"states {ACTIVATION}={activation}")
        settings["hidden_act"] = activation
    if left := said.left:
        raise refuse(f"states {layout.name}.{left[0]}")
    tokens = {setting: stated(file, key) for key, setting in TOKENS.items() if file.get_field(key)}
    # A token that is not stated is none, and not the one that the layout has by default.
    unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(kind, **settings, **unknown | tokens)
    if scalar := attention_scalar(layout, config):
        config.query_pre_attn_scalar = scalar
    return config


def opened(path: Path) -> GGUFReader:
    """The keys and tensors of a file. Raises GGUFError for one that is damaged, no model, or a part of several."""
    import gguf

    try:
        _check_header(path)
        file = gguf.GGUFReader(path)
    except OSError as error:
        raise GGUFError(f"{path} cannot be read ({error.strerror or error}).") from None
    except GGUFError:
        raise
    except Exception as error:  # what numpy, struct and the reader say of bytes that make no sense
        if unknown := UNKNOWN_TYPE.search(str(error)):
            raise GGUFError(
                f"{path.name} holds tensors of type {unknown[1]}, which gguf {version('gguf')} does not know; give "
                "the file in another quantization, or the safetensors folder."
            ) from None
        raise GGUFError(f"{path} is no whole GGUF file; fetch or convert it again.") from None
    held = stated(file, "general.type", "model")
    if stated(file, "general.architecture") == "clip":  # older files of them have no type
        held = "mmproj"
    if held in OTHER:
        raise GGUFError(f"{path.name} holds {OTHER[held]} and no model; give the file of a model.")
    if (parts := stated(file, "split.count", 1)) > 1:
        raise GGUFError(
            f"{path.name} is one of {parts} parts; join them with `llama-gguf-split --merge` and give the result."
        )
    return file


def _check_header(path: Path) -> None:
    """Refuse another version of the format, and numbers whose first byte is the highest."""
    with path.open("rb") as file:
        magic, number = struct.unpack("<4sI", file.read(8))
    if magic != b"GGUF":
        return
    if number and not number % 2**16:
        raise GGUFError(f"{path.name} is for big-endian machines; convert it for little-endian ones.")
    if number < 2**16 and number not in VERSIONS:
        raise GGUFError(
            f"{path.name} is GGUF of version {number}, and {listed(VERSIONS)} are read here; fetch or "
            "convert it again."
        )


def stated(file: GGUFReader, name: str, default: Any = None) -> Any:
    """The value of a key."""
    field = file.get_field(name)
    return default if field is None else field.contents()


def _layout(file: GGUFReader, name: str) -> tuple[str, Layout]:
    from edgelab.gguf_files.layouts import LAYOUTS

    architecture = stated(file, "general.architecture", "an unnamed architecture")
    for layout, one in LAYOUTS.items():
        if one.name == architecture:
            return layout, one
    known = dict.fromkeys(one.name for one in LAYOUTS.values())
    raise GGUFError(
        f"{name} holds a model of {architecture}, and {', '.join(known)} are read here; give the safetensors folder."
    )


class _Decoded(Mapping):
    """The tensors of a file by name, decoded to float32 when they are asked for."""

    def __init__(self, stored: dict[str, ReaderTensor], file: str) -> None:
        self._stored, self._file = stored, file

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __getitem__(self, name: str) -> np.ndarray:
        return decode(self._stored[name], self._file)

    def __iter__(self):
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def decode(tensor: ReaderTensor, file: str) -> np.ndarray:
    """A tensor as float32. Raises GGUFError for a type that the gguf package cannot decode."""
    from gguf.quants import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise GGUFError(
            f"{file} keeps {tensor.name} as {tensor.tensor_type.name}, which the gguf package cannot decode; give the "
            "file in another quantization, or the safetensors folder."
        ) from None


def _fill(model: PreTrainedModel, places: Places, stored: dict[str, ReaderTensor], file: str) -> None:
    """Put the tensors of a file into a model, in place; each has one place, and every place one tensor."""
    import numpy as np
    import torch

    rows = {(places(name) or (name,))[0]: len(parameter) for name, parameter in model.named_parameters()}
    stored = _apart(stored, rows)
    missing, used = [], {name for name in stored if name.startswith("rope_")}
    if model.config.tie_word_embeddings:
        used.add("output.weight")
    for name, parameter in model.named_parameters():
        place, part = places(name) or (name, None)
        if place not in stored:
            missing.append(name)
            continue
        used.add(place)
        values = decode(stored[place], file)
        values = (values if part is None else values[part]) - np.float32(places.offset(place))
        if values.shape != tuple(parameter.shape):
            raise GGUFError(
                f"{place} of {file} is {_by(values.shape)}, and {name} of a {model.config.model_type} model "
                f"{_by(parameter.shape)}; give the safetensors folder."
            )
        put = np.empty_like(values)
        put[places.order(place, len(values))] = values
        parameter.data = torch.from_numpy(put)
    left = sorted(stored.keys() - used)
    if missing and not left:
        raise GGUFError(f"{file} lacks {few(sorted(missing))}; give the whole file.")
    if left:
        raise GGUFError(
            f"{file} holds tensors for which a {model.config.model_type} model has no place here ({few(left)}); give "
            "the safetensors folder."
        )
    model.requires_grad_(True)


def _parts(fused: str) -> list[str]:
    """What queries, keys and values of a block are called by themselves."""
    return [fused.replace(FUSED, f".attn_{one}.") for one in "qkv"]


def _apart(stored: dict[str, ReaderTensor], rows: dict[str, int]) -> dict[str, ReaderTensor]:
    """The tensors of a file, where queries, keys and values stand in one and the model has three: three of them.

    rows: of each tensor that the model has a place for. Older files of Phi-2 are such.
    """
    found = {}
    for name, tensor in stored.items():
        parts = _parts(name) if FUSED in name and name not in rows else []
        sizes = [rows.get(part, 0) for part in parts]
        if 0 in sizes or sum(sizes) != len(tensor.data):
            parts, sizes = [name], [len(tensor.data)]
        end = 0
        for part, size in zip(parts, sizes, strict=True):
            start, end = end, end + size
            found[part] = tensor._replace(name=part, data=tensor.data[start:end])
    return found


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
