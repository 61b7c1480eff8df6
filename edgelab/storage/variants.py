"""Variants: what a recipe makes of a reference, saved once, packed, in a content-addressed cache.

A variant is a folder: `model.safetensors` with plain tensors and, for each packed layer, the parts of its matrix;
`config.json` and tokenizer of the model; `variant.json`, which says how layers are stored, which shapes the
configuration does not give, and what the variant was made from; and below `exports`, what engines made of it. An
adapter is stored alone, in PEFT's files, and `variant.json` names the variant that it stands on.
"""

from __future__ import annotations

import json
import shutil
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgelab import assets
from edgelab.model.finite import check_tensors
from edgelab.model.logits import PROBE, TOLERANCE, check_logits
from edgelab.model.marks import ATTRIBUTE, marks_of
from edgelab.model.shapes import give_shapes, odd_shapes, skeleton
from edgelab.model.vocabulary import numbers_in, rows_of, with_rows
from edgelab.recipes import Context, Recipe, Record, refuse_adapter
from edgelab.reference import Source, load_model, load_tokenizer, resolve
from edgelab.storage import adapters, cache, matrix
from edgelab.storage.description import Description, from_json
from edgelab.storage.layers import ActivationGrid, PackedEmbedding, PackedLinear, packed_layers
from edgelab.storage.matrix import Matrix
from edgelab.storage.outputs import kept_outputs
from edgelab.storage.sizes import INPUT_PARTS, measure_size
from edgelab.storage.stages import (
    ABOUT,
    FORMAT,
    VariantError,
    address,
    is_whole,
    kept_stages,
    parent_of,
    read_about,
    stage_keys,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def build(recipe: Recipe, source: Source, seed: int, progress: Callable[[int, int], None]) -> Path:
    """Make a recipe's variant from its longest kept stage, unless it is there already; returns its folder.

    A second process that wants the same variant waits for the first one to finish it.
    """
    folder = address(recipe, source, seed)
    if not is_whole(folder):
        with cache.locked(folder):
            if not is_whole(folder):
                _make(recipe, source, seed, progress, folder)
        cache.trim(*filter(None, (folder, parent_of(folder))))
    cache.touch(folder)
    return folder


def _make(
    recipe: Recipe, source: Source, seed: int, progress: Callable[[int, int], None], folder: Path
) -> None:
    keys, tokenizer = stage_keys(recipe, source, seed), load_tokenizer(source)
    record = Record()
    reference = load_model(source, notes=record.notes)
    before = max((done for done in kept_stages(recipe)[:-1]), default=0)
    model, spent, aside = (
        reference,
        0.0,
        0.0,
    )  # aside: seconds of making other variants, which have costs of their own

    def variant(wanted: Recipe, name: str) -> PreTrainedModel:
        nonlocal aside
        started = time.perf_counter()
        try:
            return load(build(wanted, resolve(name) if name else source, seed, progress))
        finally:
            aside += time.perf_counter() - started

    outputs = partial(kept_outputs, progress=progress)
    context = Context(seed, progress, tokenizer, record, reference, variant=variant, outputs=outputs)
    if before:
        parent = build(recipe.prefix(before), source, seed, progress)
        about = read_about(parent)
        model, record, spent = load(parent), Record(**about["record"]), about["apply_s"]
        context.record = record
        if own := load_own_tokenizer(parent):
            numbers = numbers_in(own, tokenizer, rows_of(reference))
            context.tokenizer, context.reference = own, with_rows(reference, numbers)
    else:
        check_logits(reference)
    for place, technique in enumerate(recipe.techniques[before:], before):
        context.stage = keys[place]
        record.numbers.clear()  # they are of the model that this technique is given
        torch.manual_seed(seed)
        started, trained, spared, aside = time.perf_counter(), len(record.curve), record.spared_s, 0.0
        refuse_adapter(technique, model)
        model = technique.apply(model, context)
        # A run that went on from a checkpoint has cost what it took before, too.
        took = time.perf_counter() - started - aside
        spent += (
            max([took, *(point["seconds"] for point in record.curve[trained:])]) + record.spared_s - spared
        )
    origin = {
        "recipe": recipe.weights,
        "model": source.name,
        "model_sha": source.sha,
        "parent": keys[before] if before else None,
        "apply_s": spent if recipe.techniques else None,
        "record": asdict(record),
        "own_tokenizer": context.tokenizer is not tokenizer,
    }
    if adapters.has_adapter(model):
        parent = build(recipe.prefix(len(recipe.techniques) - 1), source, seed, progress)
        save_adapter(model, folder, origin, parent)
    else:
        save(model, folder, origin, context.tokenizer, model.config.to_dict() != reference.config.to_dict())


# Saving


def save(
    model: PreTrainedModel,
    folder: Path,
    origin: dict[str, object],
    tokenizer: PreTrainedTokenizerBase | None = None,
    compare: bool = False,
) -> None:
    """Write a model, packed, into a folder that appears whole or not at all; with its tokenizer, which engines want.

    compare: read it back and compare logits, as a model needs whose configuration a technique has changed.
    Raises an EdgeLabError with one sentence where the place is read-only, the disk is full, a weight is not finite, or
    the model that is read back is another one.
    """
    tensors, matrices = stored_tensors(model)
    buffers = {name for name, _ in model.named_buffers()}  # a mask among them may hold minus infinity
    weights = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    check_tensors(weights, f"after {origin.get('recipe')}")
    about = {
        "format": FORMAT,
        **origin,
        **describe(model, matrices).as_json(),
        "size": asdict(measure_size(model, tensors, matrices)),
    }
    with assets.staged(folder) as draft:
        draft.mkdir()
        try:
            save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # its message holds the reason of the system, such as a full disk
            raise assets.unwritable(folder.parent, error) from None
        model.config.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        (draft / ABOUT).write_text(json.dumps(about, indent=1))
        if compare:
            _check_read_back(model, draft, str(origin.get("recipe")))


def save_adapter(model: PreTrainedModel, folder: Path, origin: dict[str, object], parent: Path) -> None:
    """Write the adapter of a model alone, into a folder that appears whole; what it stands on is the variant `parent`.

    Raises an EdgeLabError with one sentence where the place cannot be written or a weight is not finite.
    """
    tensors = adapters.adapter_tensors(model)
    check_tensors(tensors, f"after {origin.get('recipe')}")
    below = read_about(parent)
    size = below["size"] | {"adapter_bytes": sum(tensor.nbytes for tensor in tensors.values())}
    size["parameters"] += sum(tensor.numel() for tensor in tensors.values())
    described = {name: below[name] for name in ("dtype", "matrices", "marks", "shapes")}
    about = {"format": FORMAT, **origin, **described, "size": size}
    about |= {"adapter": adapters.kind(model), "adapter_of": parent.name}
    with assets.staged(folder) as draft:
        draft.mkdir()
        try:
            adapters.write(model, draft)
        except SafetensorError as error:
            raise assets.unwritable(folder.parent, error) from None
        for file in parent.iterdir():
            if (
                file.is_file() and file.suffix != ".safetensors" and file.name != ABOUT
            ):  # configuration and tokenizer
                shutil.copy2(file, draft)
        (draft / ABOUT).write_text(json.dumps(about, indent=1))


@torch.inference_mode()
def _check_read_back(model: PreTrainedModel, folder: Path, recipe: str) -> None:
    """Compare the logits of a few tokens: a layout may compute from its configuration what a technique left alone."""
    ids = torch.arange(2, 2 + PROBE)[None] % model.config.get_text_config().vocab_size
    try:
        expected, found = (
            one(input_ids=ids, use_cache=False).logits.float() for one in (model, load(folder))
        )
        how = "its logits are others"
        same = (found - expected).norm() <= TOLERANCE * expected.norm()
    except (RuntimeError, ValueError, IndexError) as error:
        how, same = textwrap.shorten(str(error).split("\n")[0], 100, placeholder=" …"), False
    if not same:
        raise VariantError(
            f"What {recipe} makes of a {type(model).__name__} is another model when it is read back ({how}); use a "
            "technique that leaves heads and layers as many as they are."
        )


def describe(model: PreTrainedModel, matrices: dict[str, dict] | None = None) -> Description:
    """What a runtime has to know of a model; `matrices` as `stored_tensors` gives them, found here where left out."""
    if matrices is None:
        _, matrices = stored_tensors(model)
    dtype = str(model.dtype).removeprefix("torch.")
    adapter = adapters.kind(model) if adapters.has_adapter(model) else None
    return Description(dtype, matrices, marks_of(model), odd_shapes(model), model.config.to_dict(), adapter)


def stored_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Tensors as they are stored, each once, and for every packed layer how to read it back."""
    tensors: dict[str, Tensor] = {}
    matrices: dict[str, dict] = {}
    first_name: dict[int, str] = {}
    for name, layer in packed_layers(model).items():
        stored = layer.tensor
        if id(stored) in first_name:
            parts, how = {}, {"same_as": first_name[id(stored)]}
        else:
            parts, how = stored.stored()
            how = {"format": stored.format, **how}
        first_name.setdefault(id(stored), name)
        if isinstance(layer, PackedEmbedding):
            how |= {"kind": "embedding", "multiplier": layer.multiplier}
        else:
            how["kind"] = "linear"
            if layer.activation is not None:
                how["activation"] = "token" if layer.activation.scale is None else "tensor"
                if layer.activation.scale is not None:
                    grid = (layer.activation.scale, layer.activation.zero_point)
                    parts |= dict(zip(INPUT_PARTS, grid, strict=True))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        matrices[name] = how
    seen: set[int] = set()
    # Tied weights are one object here; buffers hold rotary frequencies, which no state dict has.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    return tensors, matrices


# Loading


def load(folder: Path) -> PreTrainedModel:
    """Read a variant back: a model with PackedLinear and PackedEmbedding layers where it is packed."""
    if (parent := parent_of(folder)) is not None:
        return _load_adapter(folder, parent)
    return load_part(folder, lambda name: True)


def load_part(folder: Path, wanted: Callable[[str], bool]) -> PreTrainedModel:
    """As `load`, and only the tensors of the modules that are wanted by name; the others stay on the meta device.

    A tied matrix is read where either of its modules is wanted. Raises VariantError for an adapter.
    """
    if parent_of(folder) is not None:
        raise VariantError(
            f"{folder.name} is an adapter, which is read with all of its model; put merge behind it."
        )
    about = read_description(folder)
    dtype = getattr(torch, about.dtype)
    try:
        config = load_config(folder)
        model = skeleton(config, dtype)
        wanted = _with_tied(wanted, model, about)
        tensors = _read_tensors(folder / "model.safetensors", wanted)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error).split("\n")[0]) from None
    give_shapes(model, about.shapes)
    matrices: dict[str, Matrix] = {}
    for name, how in about.matrices.items():
        if not wanted(name):
            continue
        parts = {
            place.rpartition(".")[2]: tensors[place] for place in tensors if place.rpartition(".")[0] == name
        }
        try:
            if "same_as" not in how:
                matrices[name] = matrix.restored(parts, how)
            if getattr(model.get_submodule(name), "bias", None) is not None and "bias" not in parts:
                raise KeyError("bias")
            layer = _read_layer(matrices[how.get("same_as", name)], parts, how, dtype)
        except KeyError as lost:
            raise _lacking(folder, f"{name}.{lost.args[0]}") from None
        model.set_submodule(name, layer)
        for part in parts.keys() - {"bias"}:
            del tensors[f"{name}.{part}"]
    try:
        model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError:
        raise _damaged(folder, "its tensors have other shapes than its config.json says") from None
    for name, buffer in list(model.named_buffers()):  # rotary frequencies and the like
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner).register_buffer(last, tensors.get(name, buffer), persistent=False)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(end, PackedLinear | PackedEmbedding) for end in ends):
        model.tie_weights()
    left = [
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.is_meta and wanted(name.rpartition(".")[0])
    ]
    if left:
        raise _lacking(folder, left[0])
    setattr(model, ATTRIBUTE, about.marks)
    return model.eval()


def _load_adapter(folder: Path, parent: Path) -> PreTrainedModel:
    if not is_whole(parent):
        raise VariantError(
            f"What the adapter in {folder} stands on is gone; measure its recipe to make it again."
        )
    cache.touch(parent)
    model = load(parent)
    try:
        adapters.read(model, folder)
    except adapters.OtherWeights as error:
        raise VariantError(
            f"{str(error).rstrip('.')}, which were made again since; remove that folder, and measuring makes it anew."
        ) from None
    except (OSError, SafetensorError, adapters.AdapterError) as error:
        raise _damaged(folder, str(error).split("\n")[0]) from None
    return model.eval()


def _damaged(folder: Path, reason: str) -> VariantError:
    return VariantError(f"The variant in {folder} is damaged ({reason}); `edgelab cache clear` removes it.")


def _lacking(folder: Path, name: str) -> VariantError:
    return VariantError(f"The variant in {folder} lacks {name}; `edgelab cache clear` removes it.")


def _with_tied(
    wanted: Callable[[str], bool], model: PreTrainedModel, about: Description
) -> Callable[[str], bool]:
    """The same, and the module that holds a matrix of two, where the other one is wanted."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = (next((name for name, one in model.named_modules() if one is end), "") for end in ends)
    also = {how["same_as"] for name, how in about.matrices.items() if "same_as" in how and wanted(name)}
    if model.config.get_text_config().tie_word_embeddings and wanted(head):
        also.add(embedding)
    return lambda name: wanted(name) or name in also


def _read_tensors(file: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Copies of the tensors of a file whose module is wanted.

    A tensor that stays mapped is read from disk in the middle of a measurement; and the mapping is opened anew for
    each, since the pages of one mapping count as memory of the process beside the copies, until it is closed.
    """
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if wanted(name.rpartition(".")[0])]  # noqa: SIM118
    tensors = {}
    for name in names:
        with safe_open(file, "pt") as opened:
            tensors[name] = opened.get_tensor(name).clone()
    return tensors


def _read_layer(
    stored: Matrix, parts: dict[str, Tensor], how: dict, dtype: torch.dtype
) -> PackedLinear | PackedEmbedding:
    if how["kind"] == "embedding":
        return PackedEmbedding(stored, dtype, how["multiplier"])
    bias = nn.Parameter(parts["bias"], requires_grad=False) if "bias" in parts else None
    activation = {"token": ActivationGrid(), None: None}.get(how.get("activation"))
    if how.get("activation") == "tensor":
        activation = ActivationGrid(*(parts[name] for name in INPUT_PARTS))
    return PackedLinear(stored, bias, activation)


def read_description(folder: Path) -> Description:
    """What a runtime has to know of a saved variant. Raises VariantError where it is damaged."""
    about = read_about(folder)
    try:
        return from_json(about, json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise _damaged(folder, str(error).split("\n")[0]) from None


def load_own_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a variant that has other tokens than the reference; None where it has the same."""
    from transformers import PreTrainedTokenizerFast

    if not read_about(folder).get("own_tokenizer"):  # an older variant does not say
        return None
    # AutoTokenizer would go by the layout of the model, and split text as Qwen2's own tokenizer does for every Qwen2.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load_config(folder: Path) -> PretrainedConfig:
    """The model configuration of a variant."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)
