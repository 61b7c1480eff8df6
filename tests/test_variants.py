"""Variants: bit-identical after saving and loading, sizes by hand, and nothing half-written when something fails."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from edgelab import assets, recipes, reference
from edgelab.errors import EdgeLabError
from edgelab.recipes import Context, parse
from edgelab.storage import cache, sizes, stages, variants
from edgelab.storage.variants import VariantError

RECIPES = (
    "none",
    "quantize.bf16",
    "quantize.rtn:bits=4,group_size=64",
    "quantize.rtn:bits=3,group_size=32,symmetric=true",
    "quantize.rtn:bits=4,group_size=64 + quantize.embedding:symmetric=false",
    "quantize.rtn:bits=8,group_size=0,symmetric=true + quantize.embedding:bits=5",
    "quantize.bf16 + quantize.rtn:bits=4,group_size=32 + quantize.embedding:bits=4,symmetric=false",
)
IDS = torch.arange(2, 66)[None]  # (1, time)


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def apply(text: str, model: PreTrainedModel) -> PreTrainedModel:
    for technique in parse(text).techniques:
        model = technique.apply(model, Context())
    return model


@pytest.fixture
def source(tiny):
    return reference.resolve(str(tiny))


@pytest.mark.parametrize("text", RECIPES)
def test_saved_and_loaded_logits_are_identical(text, layout, new_model, tmp_path):
    model = apply(text, new_model(layout))
    variants.save(model, tmp_path / "variant", {})
    again = variants.load(tmp_path / "variant")
    assert again.dtype == model.dtype
    assert not again.training
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("text", RECIPES)
def test_tied_weights_are_stored_once_and_stay_tied(text, tied, new_model, tmp_path):
    model = apply(text, new_model("llama", tie_word_embeddings=tied))
    variants.save(model, tmp_path / "variant", {})
    again = variants.load(tmp_path / "variant")
    ends = [again.get_input_embeddings(), again.get_output_embeddings()]
    one, other = [end.tensor if hasattr(end, "tensor") else end.weight for end in ends]
    assert (one is other) == tied
    assert torch.equal(logits(again), logits(model))
    size = variants.read_about(tmp_path / "variant")["size"]
    layers = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 192)
    assert size["parameters"] == layers + 300 * 64 * (1 if tied else 2) + 5 * 64


def sum_by_hand(rows: dict[str, tuple[int, int]], bits: int, group_size: int) -> tuple[int, int]:
    """Bytes of packed integers and of scales (2 each) with packed zero-points, for matrices of (rows, inputs)."""
    integers = sum(out * inputs * bits // 8 for out, inputs in rows.values())
    groups = sum(out * (inputs // group_size if group_size else 1) for out, inputs in rows.values())
    return integers, groups * 2 + groups * bits // 8


TINY_LAYER = {
    "q": (64, 64),
    "k": (32, 64),
    "v": (32, 64),
    "o": (64, 64),
    "gate": (192, 64),
    "up": (192, 64),
    "down": (64, 192),
}


@pytest.mark.parametrize(
    ("text", "linear", "scales", "embedding"),
    [
        # two layers of 64x64 + 32x64 + 32x64 + 64x64 + 2 x 192x64 + 64x192 = 49,152 weights each; 98,304 in all
        ("none", 98_304 * 4, 0, 300 * 64 * 4),
        ("quantize.bf16", 98_304 * 2, 0, 300 * 64 * 2),
        # 98,304 / 2 bytes; 1,536 groups of 64 with 2 bytes of scale and half a byte of zero-point
        ("quantize.rtn:bits=4,group_size=64", 49_152, 1_536 * 2 + 768, 300 * 64 * 4),
        ("quantize.rtn:bits=4,group_size=64,symmetric=true", 49_152, 1_536 * 2, 300 * 64 * 4),
        # 3/8 of a byte each; 3,072 groups of 32
        ("quantize.rtn:bits=3,group_size=32", 36_864, 3_072 * 2 + 1_152, 300 * 64 * 4),
        # one group for each of the 2 x 640 rows, and for each of the 300 rows of the tied embedding
        (
            "quantize.rtn:bits=8,group_size=0 + quantize.embedding:symmetric=false",
            98_304,
            (1_280 + 300) * 3,
            300 * 64,
        ),
    ],
)
def test_size_of_the_tiny_model_by_hand(text, linear, scales, embedding, tiny_reference, tmp_path):
    variants.save(apply(text, tiny_reference.model), tmp_path / "variant", {})
    size = sizes.Size(**variants.read_about(tmp_path / "variant")["size"])
    width = 2 if text == "quantize.bf16" else 4
    norms = 5 * 64 * width
    assert size == sizes.Size(98_304 + 300 * 64 + 5 * 64, linear, embedding, scales, norms)
    assert size.total_bytes == linear + embedding + scales + norms
    if text.startswith("quantize.rtn:bits=4,group_size=64") and "symmetric" not in text:
        one = sum_by_hand(TINY_LAYER, 4, 64)
        assert (linear, scales) == (2 * one[0], 2 * one[1])


@pytest.mark.parametrize(
    ("text", "dtype"), [("quantize.bf16", torch.bfloat16), ("quantize.fp16", torch.float16)]
)
def test_sixteen_bit_floats_equal_loading_in_that_type(text, dtype, layout, folder_of, tmp_path):
    folder = str(folder_of(layout))
    variants.save(apply(text, reference.load(folder).model), tmp_path / "variant", {})
    theirs = reference.load(folder, dtype).model
    assert torch.equal(logits(variants.load(tmp_path / "variant")), logits(theirs))


def test_bytes_in_the_file_are_the_bytes_counted(layout, new_model, tmp_path):
    """The file also holds the model's buffers, such as rotary frequencies, which are no weights."""
    for text in RECIPES:
        model = apply(text, new_model(layout))
        variants.save(model, tmp_path / "variant", {})
        buffers = sum(buffer.nbytes for buffer in model.buffers())
        raw = (tmp_path / "variant" / "model.safetensors").read_bytes()
        header = int.from_bytes(raw[:8], "little")
        size = sizes.Size(**variants.read_about(tmp_path / "variant")["size"])
        assert len(raw) - 8 - header == size.total_bytes + buffers


def test_address_depends_on_all_that_makes_the_weights(source, monkeypatch):
    recipe = parse("quantize.rtn:bits=4,group_size=64")
    address = variants.address(recipe, source, 0)
    assert address.parent == assets.home() / "variants"
    assert variants.address(parse("quantize.rtn:group_size=64 @ simulated"), source, 0) == address
    assert variants.address(recipe, replace(source, name="other", folder="elsewhere"), 0) == address
    others = [
        variants.address(parse("quantize.rtn:bits=3"), source, 0),
        variants.address(parse("none"), source, 0),
        variants.address(recipe, replace(source, sha="0" * 16), 0),
        variants.address(recipe, source, 1),
    ]
    monkeypatch.setattr(type(recipe.techniques[0]), "version", 99)
    others.append(variants.address(recipe, source, 0))
    monkeypatch.setattr(stages, "FORMAT", stages.FORMAT + 1)
    others.append(variants.address(recipe, source, 0))
    assert len({address, *others}) == 7
    assert variants.address(parse("none"), source, 0) == variants.address(parse("none"), source, 1)


def test_build_saves_once_and_reuses(source, monkeypatch):
    recipe = parse("quantize.rtn:bits=4,group_size=32")
    folder = variants.build(recipe, source, 0, ignore)
    about = variants.read_about(folder)
    assert (about["recipe"], about["model"], about["model_sha"]) == (str(recipe), source.name, source.sha)
    assert about["apply_s"] > 0
    monkeypatch.setattr(variants, "load_model", lambda source: pytest.fail("the variant was there already"))
    assert variants.build(recipe, source, 0, ignore) == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_layers_of_other_widths_are_saved_and_loaded(new_model, tmp_path):
    """One layer narrower than the configuration says, another packed."""
    model = new_model("llama")
    mlp = model.model.layers[1].mlp
    for name, rows in (("gate_proj", 128), ("up_proj", 128)):
        layer = getattr(mlp, name)
        layer.weight, layer.out_features = nn.Parameter(layer.weight[:rows].detach()), rows
    mlp.down_proj.weight, mlp.down_proj.in_features = (
        nn.Parameter(mlp.down_proj.weight[:, :128].detach()),
        128,
    )
    for text in ("none", "quantize.rtn:bits=4,group_size=64"):
        changed = apply(text, model)
        variants.save(changed, tmp_path / text, {})
        again = variants.load(tmp_path / text)
        assert torch.equal(logits(again), logits(changed))
        shapes = variants.read_description(tmp_path / text).shapes
        assert shapes["model.layers.1.mlp.down_proj"] == [64, 128] and len(shapes) == 3


def test_a_stage_says_which_it_was_made_from(source, monkeypatch):
    monkeypatch.setattr(recipes.techniques()["quantize.bf16"], "kept", True)
    first, second = parse("quantize.bf16"), parse("quantize.bf16 + quantize.rtn:bits=4,group_size=32")
    folder = variants.build(second, source, 0, ignore)
    about = variants.read_about(folder)
    assert about["parent"] == variants.address(first, source, 0).name
    assert (folder.parent / about["parent"] / "variant.json").is_file()
    monkeypatch.setattr(recipes.techniques()["quantize.bf16"], "apply", lambda *_: pytest.fail("it was kept"))
    variants.build(parse("quantize.bf16 + quantize.rtn:bits=3,group_size=32"), source, 0, ignore)


@pytest.mark.parametrize(
    ("text", "kept"), [("quantize.bf16", True), ("quantize.bf16 + prune.magnitude", False)]
)
def test_a_prediction_holds_for_the_model_it_was_made_of(text, kept, source, monkeypatch):
    def foretells(self, model, context):
        context.record.numbers["predicted_kld"] = 0.5
        return model

    monkeypatch.setattr(recipes.techniques()["quantize.bf16"], "apply", foretells)
    record = variants.read_about(variants.build(parse(text), source, 0, ignore))["record"]
    assert record["numbers"] == ({"predicted_kld": 0.5} if kept else {})


def test_build_of_none_costs_nothing_to_make(source):
    assert variants.read_about(variants.build(parse("none"), source, 0, ignore))["apply_s"] is None


def test_a_variant_is_reused_from_a_read_only_cache(source, monkeypatch):
    folder = variants.build(parse("none"), source, 0, ignore)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", read_only)
    assert variants.build(parse("none"), source, 0, ignore) == folder


FULL = [
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
]


@pytest.mark.parametrize("error", FULL, ids=["safetensors", "oserror"])
def test_full_disk_leaves_nothing_and_says_one_sentence(error, source, monkeypatch):
    def half_written(tensors: dict, path: Path, metadata: dict) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(variants, "save_file", half_written)
    with pytest.raises(EdgeLabError, match="No space left on device") as caught:
        variants.build(parse("none"), source, 0, ignore)
    assert "\n" not in str(caught.value) and "EDGELAB_HOME" in str(caught.value)
    assert list(cache.place("variants").iterdir()) == []


def test_full_disk_while_the_description_is_written(source, monkeypatch):
    def full(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EdgeLabError, match="No space left on device"):
        variants.build(parse("none"), source, 0, ignore)
    assert list(cache.place("variants").iterdir()) == []


def test_a_failed_save_keeps_the_variant_that_was_there(tiny_reference, tmp_path, monkeypatch):
    folder = tmp_path / "variant"
    variants.save(tiny_reference.model, folder, {"recipe": "first"})

    def full(*_: object, **__: object) -> None:
        raise FULL[0]

    monkeypatch.setattr(variants, "save_file", full)
    with pytest.raises(EdgeLabError):
        variants.save(tiny_reference.model, folder, {"recipe": "second"})
    assert variants.read_about(folder)["recipe"] == "first"
    assert [path.name for path in tmp_path.iterdir() if "variant" in path.name] == ["variant"]


def test_place_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path / "file"))
    with pytest.raises(
        EdgeLabError, match=r"^Cannot write to .*set EDGELAB_HOME to a folder that can be written"
    ) as caught:
        variants.build(parse("none"), source, 0, ignore)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_interrupted_save_leaves_nothing(source, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(variants, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        variants.build(parse("none"), source, 0, ignore)
    assert list(cache.place("variants").iterdir()) == []


def test_trim_removes_what_was_unused_for_longest(source, monkeypatch):
    first, second, third = (
        variants.build(parse(f"quantize.rtn:bits={bits}"), source, 0, ignore) for bits in (8, 7, 6)
    )
    for age, folder in enumerate((third, second, first)):
        os.utime(folder, (1e9 - age, 1e9 - age))  # first is the oldest
    assert [entry.path for entry in cache.entries()] == [first, second, third]
    variants.build(parse("quantize.rtn:bits=8"), source, 0, ignore)  # used again: now the youngest
    assert [entry.path for entry in cache.entries()] == [second, third, first]
    total = sum(entry.n_bytes for entry in cache.entries())
    monkeypatch.setenv("EDGELAB_CACHE_GB", str((total - 1) / 1e9))
    cache.trim(first)
    assert [entry.path for entry in cache.entries()] == [third, first]
    monkeypatch.setenv("EDGELAB_CACHE_GB", "0")
    cache.trim(third)
    assert [entry.path for entry in cache.entries()] == [third]


def test_what_another_process_removes_meanwhile_is_not_listed(source, monkeypatch):
    gone, kept = (variants.build(parse(recipe), source, 0, ignore) for recipe in ("none", "quantize.bf16"))
    tree_bytes = cache.tree_bytes

    def removing(path):
        if path == gone:
            shutil.rmtree(path)
        return tree_bytes(path)

    monkeypatch.setattr(cache, "tree_bytes", removing)
    assert [entry.path for entry in cache.entries()] == [kept]


def test_a_new_variant_larger_than_the_limit_is_kept(source, monkeypatch):
    monkeypatch.setenv("EDGELAB_CACHE_GB", "0")
    old = variants.build(parse("none"), source, 0, ignore)
    new = variants.build(parse("quantize.bf16"), source, 0, ignore)
    assert new.is_dir() and not old.exists()


def test_cached_and_clear(source):
    assert cache.clear() == 0
    folder = variants.build(parse("none"), source, 0, ignore)
    [entry] = cache.entries()
    assert (entry.path, entry.what) == (folder, f"none of {source.name}")
    size = entry.n_bytes
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    assert cache.clear() == size
    assert cache.entries() == []


def cut_in_half(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: cut_in_half(folder / "model.safetensors"), id="weights cut"),
        pytest.param(lambda folder: (folder / "model.safetensors").write_bytes(b""), id="weights empty"),
        pytest.param(lambda folder: (folder / "model.safetensors").unlink(), id="weights gone"),
        pytest.param(lambda folder: cut_in_half(folder / "config.json"), id="config cut"),
        pytest.param(lambda folder: (folder / "config.json").unlink(), id="config gone"),
        pytest.param(lambda folder: cut_in_half(folder / "variant.json"), id="description cut"),
        pytest.param(lambda folder: (folder / "variant.json").write_text("{}"), id="description empty"),
        pytest.param(lambda folder: shutil.rmtree(folder), id="all gone"),
    ],
)
def test_damaged_variant_gives_one_sentence(damage, source):
    folder = variants.build(parse("quantize.rtn:bits=4"), source, 0, ignore)
    damage(folder)
    with pytest.raises(VariantError) as caught:
        variants.load(folder)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lost",
    ["model.norm.weight", "model.layers.1.mlp.up_proj.packed", "model.layers.0.mlp.up_proj.zero_point"],
)
def test_a_missing_tensor_is_noticed(lost, source):
    folder = variants.build(parse("quantize.rtn:bits=4"), source, 0, ignore)
    tensors = load_file(folder / "model.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(VariantError, match=lost.rpartition(".")[0]):
        variants.load(folder)


def test_a_missing_bias_is_noticed(folder_of):
    source = reference.resolve(str(folder_of("stablelm")))
    folder = variants.build(parse("quantize.rtn:bits=4"), source, 0, ignore)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        VariantError, match=r"lacks model.layers.1.self_attn.q_proj.bias; `edgelab cache clear`"
    ):
        variants.load(folder)


def test_a_tensor_of_another_shape_is_noticed(source):
    folder = variants.build(parse("quantize.rtn:bits=4"), source, 0, ignore)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(
        VariantError, match=r"is damaged \(its tensors have other shapes than its config.json says\);"
    ):
        variants.load(folder)


def test_variant_of_another_format(source):
    folder = variants.build(parse("none"), source, 0, ignore)
    about = json.loads((folder / "variant.json").read_text())
    (folder / "variant.json").write_text(json.dumps(about | {"format": 0}))
    with pytest.raises(VariantError, match=r"is of format 0, not 4; `edgelab cache clear` removes it\.$"):
        variants.load(folder)


# The embedded model: 30 layers, hidden 576, 9 heads and 3 KV heads of 64, MLP 1536, vocabulary 49,152 (tied), 61 norms.
LAYER = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("text", "bits", "group_size", "embedding_bits"),
    [
        ("quantize.rtn:bits=4,group_size=64", 4, 64, 0),
        ("quantize.rtn:bits=4,group_size=64 + quantize.embedding:symmetric=false", 4, 64, 8),
        ("quantize.rtn:bits=8,group_size=0", 8, 0, 0),
    ],
)
def test_size_of_the_embedded_model_by_hand(text, bits, group_size, embedding_bits, tmp_path, monkeypatch):
    integers, scales = (30 * part for part in sum_by_hand(LAYER, bits, group_size))
    assert integers == 106_168_320 * bits // 8
    assert scales == {4: 3_317_760 + 829_440, 8: 155_520 * 3}[bits]
    embedding = 49_152 * 576 * 4
    if embedding_bits:
        embedding, of_rows = sum_by_hand({"embedding": (49_152, 576)}, embedding_bits, 0)
        scales += of_rows
    monkeypatch.setattr(cache, "place", lambda kind: tmp_path / kind)
    folder = variants.build(parse(text), reference.resolve(), 0, ignore)
    try:
        size = sizes.Size(**variants.read_about(folder)["size"])
        assert size == sizes.Size(134_515_008, integers, embedding, scales, 61 * 576 * 4)
        total = {(4, 0): 170_618_112, (4, 8): 85_830_912, (8, 0): 220_021_632}[bits, embedding_bits]
        assert size.total_bytes == total
        assert (folder / "model.safetensors").stat().st_size == pytest.approx(size.total_bytes, rel=0.02)
    finally:
        shutil.rmtree(folder)


def test_what_fast_made_is_not_taken_for_the_whole(source, monkeypatch):
    recipe = parse("quantize.rtn:bits=4")
    whole = variants.address(recipe, source, 0)
    monkeypatch.setenv("EDGELAB_FAST", "1")
    assert variants.address(recipe, source, 0) != whole
    assert variants.address(parse("none"), source, 0) == variants.address(parse("none"), source, 1)
