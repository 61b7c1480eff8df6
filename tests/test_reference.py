"""Loading a reference: folders, names that lead nowhere, weights that are damaged or pickled."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from edgelab import assets, reference
from edgelab.reference import ReferenceError, load, resolve


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny model that a test may damage."""
    import shutil

    return shutil.copytree(tiny, tmp_path / "model")


def test_a_folder(layout, folder_of, new_model):
    loaded = load(str(folder_of(layout)))
    assert (loaded.name, loaded.notes) == (f"tiny-{layout}", "")
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, new_model(layout)(ids).logits)
    assert loaded.tokenizer.decode(
        loaded.tokenizer("Zwölf Möwen\n", add_special_tokens=False)["input_ids"]
    ) == ("Zwölf Möwen\n")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_in_sixteen_bits(dtype, tiny):
    assert load(str(tiny), dtype).model.dtype == dtype


def test_the_fingerprint_is_that_of_the_weights(folder):
    before = resolve(str(folder))
    (folder / "README.md").write_text("a note")
    assert resolve(str(folder)) == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(folder)).sha != before.sha
    assert len(before.sha) == 16


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/no/such/folder", "There is no model at /no/such/folder; give a folder, a .gguf file, a Hub id"),
        ("./nothing", "There is no model at ./nothing"),
        ("models/of/mine", "There is no model at models/of/mine"),
        ("missing.gguf", "There is no model at missing.gguf"),
    ],
)
def test_names_that_lead_nowhere(name, sentence):
    with pytest.raises(ReferenceError, match=f"^{sentence}"):
        load(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ReferenceError, match=r"holds no model: a folder needs config.json"):
        load(str(tmp_path))


def test_pickled_weights_are_not_loaded(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ReferenceError, match="pickled weights are not loaded"):
        load(str(folder))


def cut(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_damaged_files_give_one_sentence(file, folder):
    cut(folder / file)
    with pytest.raises(ReferenceError, match=r"^model cannot be loaded as a causal language model") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ReferenceError, match=r"^No tokenizer can be loaded for model"):
        load(str(folder))


def test_a_model_of_another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ReferenceError, match="cannot be loaded as a causal language model"):
        load(str(folder))


def test_a_hub_name_without_network(monkeypatch):
    def offline(*_: object, local_files_only: bool = False, **__: object) -> None:
        raise LocalEntryNotFoundError("not here") if local_files_only else ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        ReferenceError, match=r"^'HuggingFaceTB/SmolLM2-135M' is neither a local folder nor"
    ) as caught:
        load("HuggingFaceTB/SmolLM2-135M")
    assert "use 'embedded', which works offline." in str(caught.value)


def test_a_hub_name_that_is_cached(monkeypatch, tiny):
    def cached(*_: object, local_files_only: bool = False, **__: object) -> str:
        if not local_files_only:
            raise ConnectionError("no network")
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    found = resolve("someone/model")
    assert (found.name, str(found.folder), found.sha) == ("someone/model", str(tiny), resolve(str(tiny)).sha)


@pytest.mark.embedded
def test_the_embedded_model():
    source = resolve()
    assert source.name == "SmolLM2-135M-Instruct-Q4_1"
    assert "4-bit GGUF" in source.notes and "not the original" in source.notes
    loaded = load()
    assert (loaded.name, loaded.sha, loaded.notes) == (source.name, source.sha, source.notes)
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert loaded.model.dtype == torch.float32


@pytest.mark.embedded
def test_embedded_weights_are_those_of_the_gguf_file():
    """Against the gguf package's own decoding; queries and keys are left out, whose rows GGUF reorders."""
    import gguf

    tensors = {one.name: one for one in gguf.GGUFReader(assets.fetch() / "gguf" / assets.GGUF_FILE).tensors}
    state = reference.load().model.state_dict()
    for theirs, ours in {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.17.attn_output.weight": "model.layers.17.self_attn.o_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.29.ffn_gate.weight": "model.layers.29.mlp.gate_proj.weight",
        "blk.3.ffn_up.weight": "model.layers.3.mlp.up_proj.weight",
        "blk.3.attn_norm.weight": "model.layers.3.input_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        decoded = gguf.quants.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        assert torch.equal(state[ours], torch.from_numpy(decoded.copy())), ours
