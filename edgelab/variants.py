"""Variants: what a recipe makes of a reference, saved once, packed, in a content-addressed cache.

A variant is a folder: `model.safetensors` with plain tensors and, for each quantized matrix, packed integers, scales
and packed zero-points; `config.json` and tokenizer of the model; `variant.json`, which says what is quantized how and
from what; and below `exports`, what engines made of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.recipes import Context, Recipe, Record
from edgelab.reference import Source, load_model, load_tokenizer
from edgelab.techniques.quantization.kv import CacheGrid
from edgelab.techniques.quantization.packed import (
    GRIDS,
    ActivationGrid,
    CodebookTensor,
    PackedEmbedding,
    PackedLinear,
    QuantizedTensor,
)

FORMAT = 3
DEFAULT_LIMIT_GB = 20.0


class VariantError(EdgeLabError):
    """A variant that cannot be saved or read."""


@dataclass(frozen=True)
class Size:
    """Bytes of the stored tensors, by part, and the parameters they stand for."""

    parameters: int
    linear_bytes: int
    embedding_bytes: int
    scales_bytes: int  # scales and zero-points, wherever they belong
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.linear_bytes + self.embedding_bytes + self.scales_bytes + self.other_bytes


def cache_dir() -> Path:
    """The folder of cached variants."""
    return assets.home() / "variants"


def states_dir() -> Path:
    """The folder of the references' final hidden states."""
    return assets.home() / "states"


def address(recipe: Recipe, source: Source, seed: int) -> Path:
    """The folder of a variant: a hash of recipe, model fingerprint, versions and, where it matters, seed and FAST."""
    versions = [technique.version for technique in recipe.techniques]
    applied = [seed, assets.fast()] if recipe.techniques else []  # FAST calibrates on less and trains shorter
    text = json.dumps([FORMAT, recipe.weights, source.sha, versions, applied])
    return cache_dir() / hashlib.sha256(text.encode()).hexdigest()[:20]


def build(recipe: Recipe, source: Source, seed: int, progress: Callable[[int, int], None]) -> Path:
    """Apply a recipe to a reference and save the variant, unless it is there already; returns its folder."""
    folder = address(recipe, source, seed)
    if (folder / "variant.json").is_file():
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            os.utime(folder)  # the cache forgets what was used longest ago
        return folder
    model = load_model(source)
    torch.manual_seed(seed)
    record = Record()
    context = Context(seed, progress, load_tokenizer(source), record, reference=model)
    started = time.perf_counter()
    for technique in recipe.techniques:
        model = technique.apply(model, context)
    save(
        model,
        folder,
        {
            "recipe": recipe.weights,
            "model": source.name,
            "model_sha": source.sha,
            "apply_s": time.perf_counter() - started if recipe.techniques else None,
            "record": asdict(record),
        },
        context.tokenizer,
    )
    trim(keep=folder)
    return folder


def save(
    model: PreTrainedModel,
    folder: Path,
    origin: dict[str, object],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a model, packed, into a folder that appears whole or not at all; with its tokenizer, which engines want.

    Raises an EdgeLabError with one sentence where the place is read-only or the disk is full.
    """
    tensors, quantized = stored_tensors(model)
    about = {
        "format": FORMAT,
        **origin,
        **describe(model, quantized),
        "size": asdict(measure_size(model, tensors, quantized)),
    }
    with assets.staged(folder) as draft:
        try:
            save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # its message holds the reason of the system, such as a full disk
            raise assets.unwritable(folder.parent, error) from None
        model.config.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        (draft / "variant.json").write_text(json.dumps(about, indent=1))


def describe(model: PreTrainedModel, quantized: dict[str, dict]) -> dict[str, object]:
    """What a runtime has to know before it loads a model: `quantized` of `stored_tensors`, and what no tensor shows."""
    return {
        "quantized": quantized,
        "cache": asdict(model.cache_grid) if hasattr(model, "cache_grid") else None,
        "native": getattr(model, "native", None),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def load(folder: Path) -> PreTrainedModel:
    """Read a variant back: a model with PackedLinear and PackedEmbedding layers where it is quantized."""
    about = read_about(folder)
    try:
        config = load_config(folder)
        tensors = _read_tensors(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise VariantError(
            f"The variant in {folder} is damaged ({reason}); `edgelab cache clear` removes it."
        ) from None
    model = skeleton(config, getattr(torch, about["dtype"]))
    matrices = {}
    for name, how in about["quantized"].items():
        parts = {key.rpartition(".")[2]: tensors[key] for key in tensors if key.rpartition(".")[0] == name}
        try:
            if "same_as" not in how:
                matrices[name] = GRIDS[how["grid"]].restored(parts, how)
            layer = _read_layer(
                matrices[how.get("same_as", name)], parts, how, getattr(torch, about["dtype"])
            )
        except KeyError as lost:
            raise VariantError(
                f"The variant in {folder} lacks {name}.{lost.args[0]}; `edgelab cache clear` removes it."
            ) from None
        model.set_submodule(name, layer)
        for part in parts.keys() - {"bias"}:
            del tensors[f"{name}.{part}"]
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, buffer in list(model.named_buffers()):  # rotary frequencies and the like
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner).register_buffer(last, tensors.get(name, buffer), persistent=False)
    if not about["quantized"] or not isinstance(model.get_output_embeddings(), PackedLinear):
        model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise VariantError(f"The variant in {folder} lacks {left[0]}; `edgelab cache clear` removes it.")
    if grid := read_cache_grid(about):
        model.cache_grid = grid
    return model.eval()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Copies of all tensors of a file.

    A tensor that stays mapped is read from disk in the middle of a measurement; and the mapping is opened anew for
    each, since the pages of one mapping count as memory of the process beside the copies, until it is closed.
    """
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    tensors = {}
    for name in names:
        with safe_open(file, "pt") as opened:
            tensors[name] = opened.get_tensor(name).clone()
    return tensors


def read_about(folder: Path) -> dict:
    """What `variant.json` says. Raises VariantError for a folder that is no variant of this format."""
    try:
        about = json.loads((folder / "variant.json").read_text())
    except (OSError, ValueError):
        raise VariantError(f"{folder} holds no variant; measure its recipe to make it.") from None
    if about.get("format") != FORMAT:
        raise VariantError(
            f"{folder} is of format {about.get('format')}, not {FORMAT}; `edgelab cache clear` removes it."
        )
    return about


def read_cache_grid(about: dict) -> CacheGrid | None:
    """How the variant keeps its keys and values; None where they stay as they are."""
    return CacheGrid(**about["cache"]) if about.get("cache") else None


def stored_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors as they are stored, each once, and for every quantized layer how to read it back."""
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, dict] = {}
    first_name: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear | PackedEmbedding):
            continue
        matrix = module.tensor
        parts, how = (
            matrix.stored() if id(matrix) not in first_name else ({}, {"same_as": first_name[id(matrix)]})
        )
        first_name.setdefault(id(matrix), name)
        how["kind"] = "embedding" if isinstance(module, PackedEmbedding) else "linear"
        if isinstance(module, PackedEmbedding):
            how["multiplier"] = module.multiplier
        elif module.activation is not None:
            how["activation"] = "token" if module.activation.scale is None else "tensor"
            if module.activation.scale is not None:
                parts["input_scale"] = module.activation.scale
                parts["input_zero_point"] = module.activation.zero_point
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        quantized[name] = how
    seen: set[int] = set()
    # Tied weights are one object here; buffers hold rotary frequencies, which no state dict has.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors, quantized


def measure_size(model: PreTrainedModel, tensors: dict[str, Tensor], quantized: dict[str, dict]) -> Size:
    """Count the bytes of stored weights by part. The embedding part holds the embedding and an untied head.

    Buffers (rotary frequencies, a few hundred bytes) are stored, but they are no weights.
    """
    buffers = {name for name, _ in model.named_buffers()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {name for name, module in model.named_modules() if module in ends}
    parts = dict.fromkeys(("linear", "embedding", "scales", "other"), 0)
    parameters = 0
    for name in tensors.keys() - buffers:
        tensor = tensors[name]
        layer, _, kind = name.rpartition(".")
        if layer in quantized and kind in (
            "scale",
            "zero_point",
            "codebook",
            "input_scale",
            "input_zero_point",
        ):
            part = "scales"
        elif layer in embeddings:
            part = "embedding"
        else:
            part = "linear" if tensor.dim() == 2 or kind == "packed" else "other"
        parts[part] += tensor.nbytes
        if kind == "packed":
            parameters += quantized[layer]["shape"][0] * quantized[layer]["shape"][1]
        elif part != "scales":
            parameters += tensor.numel()
    return Size(parameters, *(parts[part] for part in ("linear", "embedding", "scales", "other")))


def _read_layer(
    matrix: QuantizedTensor | CodebookTensor, parts: dict[str, Tensor], how: dict, dtype: torch.dtype
) -> PackedLinear | PackedEmbedding:
    if how["kind"] == "embedding":
        return PackedEmbedding(matrix, dtype, how["multiplier"])
    bias = nn.Parameter(parts["bias"], requires_grad=False) if "bias" in parts else None
    activation = {"token": ActivationGrid(), None: None}.get(how.get("activation"))
    if how.get("activation") == "tensor":
        activation = ActivationGrid(parts["input_scale"], parts["input_zero_point"])
    return PackedLinear(matrix, bias, activation)


def load_config(folder: Path) -> PretrainedConfig:
    """The model configuration of a variant."""
    return AutoConfig.from_pretrained(folder)


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model without memory: shapes only."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def cached() -> Iterator[tuple[Path, str, int]]:
    """Every cached variant: folder, "recipe of model", bytes on disk; longest unused first."""
    folders = [path for path in cache_dir().glob("*") if (path / "variant.json").is_file()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime):
        about = json.loads((folder / "variant.json").read_text())
        yield folder, f"{about['recipe']} of {about['model']}", folder_bytes(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clear() -> int:
    """Empty the cache of variants and reference states; returns the bytes it freed."""
    freed = folder_bytes(cache_dir()) + folder_bytes(states_dir())
    for folder in (cache_dir(), states_dir()):
        shutil.rmtree(folder, ignore_errors=True)
    return freed


def trim(keep: Path) -> None:
    """Remove the variants unused for longest until the cache is within $EDGELAB_CACHE_GB (default 20)."""
    limit = float(os.environ.get("EDGELAB_CACHE_GB", DEFAULT_LIMIT_GB)) * 1e9
    entries = [(folder, size) for folder, _, size in cached()]
    total = sum(size for _, size in entries)
    for folder, size in entries:
        if total <= limit:
            break
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= size
