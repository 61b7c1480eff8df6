"""The files of a checkpoint folder: whether all are there, what tensors lie in them, and their fingerprint.

Weights are safetensors, or torch's own files, of which only tensors are unpickled; in one file, or in shards that an
index names.
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError

from edgelab import assets
from edgelab.errors import EdgeLabError, few, first_sentence
from edgelab.keys import key

PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # what a model is read from
PICKLED = "pytorch_model*.bin"  # weights as older checkpoints have them, read where there are no safetensors
LEFT_OUT = ("consolidated*", "*/*.safetensors")  # the weights once more, as Mistral's repositories have them
WHOLE = "model.safetensors"  # a checkpoint in one file
PICKLED_WHOLE = "pytorch_model.bin"
INDEX = ".index.json"  # behind the name of the whole: which file holds which tensor
ADAPTER = "adapter_config.json"  # PEFT's; transformers would apply the adapter without a word


class ReferenceError(EdgeLabError):
    """The named model cannot be loaded."""


def check(folder: Path, shown: str, weights: bool) -> None:
    """Whether all files of a model are there, and nothing that changes it. shown: what a sentence calls it."""
    _check_adapter(folder, shown)
    there = (folder / "config.json").is_file()
    if not there or (weights and is_pickled(folder) and not any(folder.glob(PICKLED))):
        raise ReferenceError(
            f"{shown} holds no model: a folder needs config.json, tokenizer files and *.safetensors or {PICKLED}."
        )
    whole = PICKLED_WHOLE if is_pickled(folder) else WHOLE
    if weights and not (folder / whole).is_file():
        _check_parts(folder, shown, whole)


def _check_adapter(folder: Path, shown: str) -> None:
    if not (folder / ADAPTER).is_file():
        return
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    of = f" of {assets.shown(str(base))}" if base else ""
    raise ReferenceError(
        f"{shown} holds a LoRA adapter{of}; merge it into its model and give the folder of that, without {ADAPTER}."
    )


def is_pickled(folder: Path) -> bool:
    """Whether a folder has no weights but in torch's own files, of which only tensors are ever read."""
    return not any(folder.glob("*.safetensors"))


def _check_parts(folder: Path, shown: str, whole: str) -> None:
    """Whether every tensor that the index of a checkpoint names lies in the shard that it names.

    whole: the file that a checkpoint in one has.
    """
    index = f"{whole}{INDEX}"
    if not (folder / index).is_file():
        raise ReferenceError(
            f"{shown} has neither {whole} nor {index}, which says in which of its files each tensor lies; give the "
            "whole checkpoint."
        )
    shards = _shards(folder / index, shown)
    if lost := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ReferenceError(f"{shown} lacks {few(lost)}, which {index} names; give the whole checkpoint.")
    for shard, names in shards.items():
        if lost := sorted(set(names) - _number_formats(folder / shard, shown).keys()):
            raise ReferenceError(
                f"{shard} of {shown} lacks {few(lost)}, for which {index} names it; give the whole checkpoint."
            )


def _shards(index: Path, shown: str) -> dict[str, list[str]]:
    """The names of the tensors in each shard that the index of a checkpoint names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {shard: [] for shard in sorted(places.values())}
        for name, shard in places.items():
            shards[shard].append(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ReferenceError(
            f"{index.name} of {shown} does not say in which file each tensor lies; fetch it again."
        ) from None
    return shards


def _number_formats(file: Path, shown: str) -> dict[str, str]:
    """The tensors in a file of weights by name, each with what the file calls its dtype; no value is read."""
    from safetensors import safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as opened:
                return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
        import torch

        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {name: str(tensor.dtype) for name, tensor in tensors.items()}
    except OSError:
        raise
    except UnpicklingError:
        raise ReferenceError(
            f"{file.name} of {shown} is damaged or holds more than tensors, and nothing else is unpickled here; give "
            "the weights as safetensors."
        ) from None
    except Exception as error:  # of safetensors, of torch
        raise ReferenceError(
            f"{file.name} of {shown} is damaged ({first_sentence(error)}); fetch it again."
        ) from None


def stored(folder: Path, shown: str) -> dict[str, tuple[Path, str]]:
    """File and dtype of each tensor that transformers reads of a folder; of none where weights are not fetched yet."""
    whole = PICKLED_WHOLE if is_pickled(folder) else WHOLE
    files = [folder / whole]  # of a GGUF file there is none, either
    if not files[0].is_file() and (folder / f"{whole}{INDEX}").is_file():
        files = [folder / shard for shard in _shards(folder / f"{whole}{INDEX}", shown)]
    return {
        name: (file, dtype)
        for file in files
        if file.is_file()
        for name, dtype in _number_formats(file, shown).items()
    }


def fingerprint(folder: Path) -> str:
    """What a model is made of: weights with their names and shapes, configurations and tokenizer, by content.

    Every file that transformers may read counts, so that a changed rope_theta or merge is another model.
    """
    patterns = (*PATTERNS, PICKLED) if is_pickled(folder) else PATTERNS
    found = [file for pattern in patterns for file in folder.glob(pattern)]
    files = sorted(file for file in found if not file.match(LEFT_OUT[0]))
    return key([(file.name, assets.fingerprint(file)) for file in files])[:16]


def same(one: tuple[Path, str], other: tuple[Path, str], rows: int = 4096) -> bool:
    """Whether two matrices of safetensors files have the same values; read some rows at a time, up to a difference."""
    from safetensors import safe_open

    (file, name), (other_file, other_name) = one, other
    with safe_open(file, "pt") as opened, safe_open(other_file, "pt") as other_opened:
        first, second = opened.get_slice(name), other_opened.get_slice(other_name)
        return first.get_shape() == second.get_shape() and all(
            bool((first[start : start + rows] == second[start : start + rows]).all())
            for start in range(0, first.get_shape()[0], rows)
        )
