"""Checkpoints in torch's own files, as OPT and Galactica have them: tensors are read, and nothing else is unpickled."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from edgelab.reference import ReferenceError, load, load_model, resolve

IDS = torch.arange(2, 40)[None]
WHOLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


class Running:
    """An object whose unpickling touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def pickle(folder, tensors, parts=1):
    """Put tensors in place of the weights of a folder, in one file or in parts with an index."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    if parts == 1:
        torch.save(tensors, folder / WHOLE)
        return
    places = {}
    for part in range(parts):
        name = f"pytorch_model-{part + 1:05}-of-{parts:05}.bin"
        mine = dict(list(tensors.items())[part::parts])
        torch.save(mine, folder / name)
        places |= dict.fromkeys(mine, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def folder(new_model, byte_tokenizer, tmp_path):
    new_model("opt", ffn_dim=96, word_embed_proj_dim=64).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tensors(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_the_same_model_as_from_safetensors(parts, prefix, folder, tensors):
    """Some of these files leave out the name of the base model in front."""
    expected = load(str(folder))
    pickle(folder, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, parts)
    found = load(str(folder))
    with torch.inference_mode():
        assert torch.equal(found.model(IDS).logits, expected.model(IDS).logits)
    assert found.notes == "" and found.sha != expected.sha


def test_in_the_form_that_torch_wrote_long_ago(folder, tensors):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / WHOLE, _use_new_zipfile_serialization=False)
    name = "model.decoder.layers.1.fc1.weight"
    assert torch.equal(load(str(folder)).model.get_parameter(name), tensors[name])


def test_safetensors_come_first(folder):
    before = resolve(str(folder))
    torch.save({}, folder / WHOLE)
    assert resolve(str(folder)) == before and load(str(folder)).notes == ""


def test_the_fingerprint_is_that_of_the_weights(folder, tensors):
    pickle(folder, tensors)
    before = resolve(str(folder))
    (folder / "training_args.bin").write_bytes(b"settings")
    assert resolve(str(folder)) == before
    tensors["model.decoder.layers.1.fc1.weight"][0] += 1
    pickle(folder, tensors)
    assert resolve(str(folder)).sha != before.sha


@pytest.mark.parametrize("parts", [1, 3])
def test_no_code_runs(parts, folder, tensors, tmp_path):
    pickle(folder, tensors | {"model.decoder.more": Running(tmp_path / "ran")}, parts)
    with pytest.raises(
        ReferenceError,
        match=r"^pytorch_model\S* of .*model is damaged or holds more than tensors, and nothing else is unpickled "
        r"here; give the weights as safetensors\.$",
    ):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            lambda raw: raw[: len(raw) // 2],
            r"^pytorch_model.bin of model is damaged \(.*\); fetch it again\.$",
        ),
        (lambda raw: b"", r"^pytorch_model.bin of model is damaged \(EOFError\); fetch it again\.$"),
        (
            lambda raw: b"version https://git-lfs",
            r"^pytorch_model.bin of model is damaged or holds more than",
        ),
    ],
)
def test_damaged_files(content, sentence, folder, tensors):
    pickle(folder, tensors)
    (folder / WHOLE).write_bytes(content((folder / WHOLE).read_bytes()))
    with pytest.raises(ReferenceError, match=sentence) as caught:
        load_model(resolve(str(folder)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


NAME = "model.decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (None, rf"^The weights of model lack {NAME}; give the whole checkpoint\.$"),
        (torch.ones(4, 64), rf"^{NAME} of model is 4 x 64 and by its config.json 96 x 64; give"),
        (torch.full((96, 64), torch.nan), rf"^{NAME} of model holds NaN; give finite weights"),
    ],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_tensors_are_checked_as_those_of_safetensors(changed, sentence, parts, folder, tensors):
    del tensors[NAME]
    pickle(folder, tensors if changed is None else tensors | {NAME: changed}, parts)
    with pytest.raises(ReferenceError, match=sentence):
        load(str(folder))


def test_parts_are_all_there(folder, tensors):
    pickle(folder, tensors, 3)
    index, part = folder / INDEX, sorted(folder.glob("*.bin"))[1]
    stated = json.loads(index.read_text())
    stated["weight_map"]["more"] = part.name
    index.write_text(json.dumps(stated))
    with pytest.raises(
        ReferenceError, match=rf"^{part.name} of .*model lacks more, for which {INDEX} names it;"
    ):
        resolve(str(folder))
    part.unlink()
    with pytest.raises(
        ReferenceError, match=rf"model lacks {part.name}, which {INDEX} names; give the whole"
    ):
        resolve(str(folder))
    index.unlink()
    with pytest.raises(
        ReferenceError, match=rf"has neither pytorch_model.bin nor {INDEX}, which says in which"
    ):
        resolve(str(folder))


@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_the_hub_is_asked_for_them_only_where_there_is_nothing_else(
    form, folder, tensors, tmp_path, monkeypatch
):
    """Both forms of the same weights would take twice the time and the disk."""
    if form == "pickled":
        pickle(folder, tensors)
    there, asked = tmp_path / "fetched", []

    def fetched(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        files = [file.name for file in folder.iterdir()]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        there.mkdir(exist_ok=True)
        for file in kept:
            asked.append(file)
            shutil.copy(folder / file, there)
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert resolve("someone/model").sha == resolve(str(folder)).sha
    assert (WHOLE in asked) == (form == "pickled")
