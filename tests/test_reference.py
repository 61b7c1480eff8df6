"""Loading a reference: folders, names that lead nowhere, weights that are damaged."""

import errno
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from edgelab import assets, measure, reference
from edgelab.errors import EdgeLabError
from edgelab.reference import ReferenceError, config_of, load, resolve
from edgelab.runtimes import gguf


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny model that a test may damage."""
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gguf_file_in_sixteen_bits(dtype, tiny, new_model, tmp_path):
    """Weights are rounded; rotary frequencies are not, of which the far ones would turn otherwise."""
    gguf.write_model(new_model("llama"), tiny, tmp_path / "tiny.gguf", "tiny", "none")
    exact, rounded = (
        reference.load_model(resolve(str(tmp_path / "tiny.gguf")), one) for one in (None, dtype)
    )
    assert rounded.dtype == dtype and rounded.lm_head.weight is rounded.model.embed_tokens.weight
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(rounded.get_parameter(up), exact.get_parameter(up).to(dtype))


@pytest.mark.parametrize(("stated", "ends"), [('{"eos_token_id": [1, 9]}', [1, 9]), ("{}", 1), ('{"eos', 1)])
def test_the_ends_of_an_answer_are_those_of_generating(stated, ends, folder):
    (folder / "generation_config.json").write_text(stated)
    assert reference.config_of(str(folder)).eos_token_id == ends
    assert load(str(folder)).model.config.eos_token_id == ends


def test_weights_that_are_there_twice_are_left_out(folder, monkeypatch):
    before, asked = resolve(str(folder)), {}
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert resolve(str(folder)) == before
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or str(folder)
    )
    assert resolve("someone/model").sha == before.sha
    files = ["model.safetensors", "consolidated.safetensors", "fp32/model.safetensors", "config.json"]
    kept = filter_repo_objects(files, **{key: asked[key] for key in ("allow_patterns", "ignore_patterns")})
    assert list(kept) == ["model.safetensors", "config.json"]


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
        ("missing.GGUF", "There is no model at missing.GGUF"),
        ("a\nb", r"There is no model at 'a\\nb'; give"),
        ("a b", "There is no model at a b; give"),
        ("https://huggingface.co/a/b", "There is no model at https://huggingface.co/a/b; give"),
    ],
)
def test_names_that_lead_nowhere(name, sentence):
    with pytest.raises(ReferenceError, match=f"^{sentence}"):
        load(name)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ReferenceError, match=r"holds no model: a folder needs config.json"):
        load(str(tmp_path))


def cut(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("model.safetensors", r"^model\.safetensors of model is damaged \(.+\); fetch it again\.$"),
        ("config.json", "^model cannot be loaded as a causal language model"),
    ],
)
def test_damaged_files_give_one_sentence(file, sentence, folder):
    cut(folder / file)
    with pytest.raises(ReferenceError, match=sentence) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300, "/tmp/" + "a" * 300, "a\0b", "/a\0b"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(EdgeLabError) as caught:
        resolve(name)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_folder_called_like_a_file(folder, tiny):
    assert torch.equal(
        load(str(folder.rename(folder.with_name("model.gguf")))).model.lm_head.weight,
        load(str(tiny)).model.lm_head.weight,
    )


def test_files_that_may_not_be_read(folder, monkeypatch):
    def refused(_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(assets, "fingerprint", refused)
    with pytest.raises(
        ReferenceError, match=r"model cannot be read \(Permission denied\); check its permissions\.$"
    ):
        resolve(str(folder))


@pytest.mark.parametrize("other", ["llama", "qwen3", "gpt2", "gemma", "opt", "bloom"])
def test_a_folder_without_a_tokenizer(other, new_model, tmp_path):
    """Of some of these transformers makes a tokenizer without tokens."""
    new_model(other).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ReferenceError, match=r"^No tokenizer can be loaded for model \(.+\); put tokenizer.json and"
    ):
        load(str(tmp_path / "model"))


def test_a_tokenizer_larger_than_the_embedding(new_model, byte_tokenizer, tmp_path):
    new_model("llama", vocab_size=256).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ReferenceError, match="has tokens up to number 299, and the embedding 256 rows; give"):
        load(str(tmp_path))


def test_a_special_token_that_was_added_later_needs_no_row(folder):
    tokenizer = load(str(folder)).tokenizer
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    assert load(str(folder)).tokenizer.pad_token_id == 300


# Weights and configuration that do not belong together


def change(folder, left_out=(), **added):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    save_file(kept | added, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["llama", "phi", "gpt2", "opt"])
def test_each_missing_tensor_is_refused_by_name(layout, new_model, tmp_path):
    model = new_model(layout)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    for name in [name for name in whole if "layers.0" not in name and "h.0" not in name]:
        save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
        change(tmp_path, [name])
        with pytest.raises(
            ReferenceError, match=r"^The weights of .* lack .*; give the whole checkpoint\.$"
        ) as caught:
            reference.load_model(resolve(str(tmp_path)))
        assert name.rpartition(".")[0].split(".")[-1] in str(caught.value)


@pytest.mark.parametrize("left_out", [["w2"], ["w1", "w2", "w3"]])
def test_a_missing_expert(left_out, new_model, tmp_path):
    """transformers stacks the experts of a block to one tensor."""
    new_model("mixtral").save_pretrained(tmp_path)
    names = [
        name
        for name in load_file(tmp_path / "model.safetensors")
        if "layers.1" in name and "experts.3." in name
    ]
    change(tmp_path, [name for name in names if name.split(".")[-2] in left_out])
    with pytest.raises(ReferenceError) as caught:
        reference.load_model(resolve(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_loading_says_nothing_of_its_own(folder, caplog):
    change(folder, ["model.norm.weight"], extra=torch.ones(2))
    with pytest.raises(ReferenceError):
        load(str(folder))
    assert not caplog.records


def test_an_untied_head_that_is_missing(new_model, tmp_path):
    new_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    change(tmp_path, ["lm_head.weight"])
    with pytest.raises(ReferenceError, match=r"^The weights of .* lack lm_head.weight; give"):
        reference.load_model(resolve(str(tmp_path)))


def test_a_tied_head_may_be_missing(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(str(folder)).notes == ""


def test_a_bias_that_the_configuration_does_not_announce_is_noted(folder):
    change(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    note = "Not read, because the model has no place for it: model.layers.0.self_attn.q_proj.bias."
    assert load(str(folder)).notes == note
    text = folder.parent / "text.txt"
    text.write_text("One gull saw two ships. " * 200)
    assert measure("none", model=str(folder), corpus=str(text), windows=1, only="quality").notes == note


def test_a_tensor_of_another_shape(folder):
    change(folder, **{"model.layers.0.mlp.up_proj.weight": torch.ones(100, 64)})
    with pytest.raises(
        ReferenceError,
        match=r"^model.layers.0.mlp.up_proj.weight of model is 100 x 64 and by its config.json 192 x 64;",
    ):
        load(str(folder))


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4", "new"]
)
def test_quantized_checkpoints(method, folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ReferenceError, match=f"^model is a quantized checkpoint .by '{method}'.; give the float model"
    ):
        load(str(folder))


def test_quantized_tensors_that_the_configuration_does_not_announce(folder):
    name = "model.layers.0.mlp.up_proj"
    change(folder, [f"{name}.weight"], **{f"{name}.qweight": torch.ones(8, 192, dtype=torch.int32)})
    with pytest.raises(
        ReferenceError, match=r"^model is a quantized checkpoint .with model.layers.0.mlp.up_proj.qwe"
    ):
        load(str(folder))


INDEX = "model.safetensors.index.json"


def edit_index(folder, change):
    file = folder / INDEX
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


PARTS = {
    "no shard": r"model lacks model-00002-of-0000\d.safetensors, which model.safetensors.index.json names; give",
    "cut shard": r"model-00002-of-0000\d.safetensors of .*model is damaged \(.*\); fetch it again\.$",
    "no index": r"has neither model.safetensors nor model.safetensors.index.json, which says in which of its files",
    "cut index": r"index.json of .*model does not say in which file each tensor lies; fetch it again\.$",
    "an index of nothing": r"index.json of .*model does not say in which file each tensor lies; fetch it again\.$",
    "a tensor too many": r"model-00002-of-0000\d.safetensors of .*model lacks model.extra.weight, for which",
    "a shard too many": r"model lacks other.safetensors, which model.safetensors.index.json names; give the whole",
}


@pytest.mark.parametrize("damage", PARTS)
def test_checkpoints_in_parts(damage, new_model, byte_tokenizer, tmp_path):
    folder = tmp_path / "model"
    new_model("llama").save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer.save_pretrained(folder)
    whole = load(str(folder)).model
    assert torch.equal(whole.lm_head.weight, new_model("llama").lm_head.weight)
    index, shard = folder / INDEX, sorted(folder.glob("*.safetensors"))[1]
    {
        "no shard": shard.unlink,
        "cut shard": lambda: cut(shard),
        "no index": index.unlink,
        "cut index": lambda: cut(index),
        "an index of nothing": lambda: index.write_text('{"weight_map": ["model.safetensors"]}'),
        "a tensor too many": lambda: edit_index(
            folder, lambda found: found["weight_map"].update({"model.extra.weight": shard.name})
        ),
        "a shard too many": lambda: edit_index(
            folder, lambda found: found["weight_map"].update({"model.norm.weight": "other.safetensors"})
        ),
    }[damage]()
    with pytest.raises(ReferenceError, match=PARTS[damage]) as caught:
        resolve(str(folder))  # before anything is made of it
    assert "\n" not in str(caught.value)


def test_a_tensor_that_neither_index_nor_shard_has(new_model, byte_tokenizer, tmp_path):
    folder = tmp_path / "model"
    new_model("llama").save_pretrained(folder, max_shard_size="100KB")
    byte_tokenizer.save_pretrained(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_index(folder, lambda found: found["weight_map"].pop(name))
    with pytest.raises(
        ReferenceError, match=rf"^The weights of model lack {name}; give the whole checkpoint\.$"
    ):
        load(str(folder))


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(value, words, name, folder):
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[3] = value
    change(folder, **{name: tensor})
    with pytest.raises(ReferenceError, match=rf"^{name} of model holds {words}; give finite weights"):
        load(str(folder))


def test_weights_beyond_the_format_that_is_asked_for(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    tensor[0, 0] = 1e5
    change(folder, **{name: tensor})
    load(str(folder), torch.bfloat16)
    with pytest.raises(
        ReferenceError, match=rf"^{name} of model holds infinity; .* a number format that reaches"
    ):
        load(str(folder), torch.float16)


def test_a_layout_that_nobody_knows(folder):
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(
        ReferenceError,
        match=r"^model has the layout 'nonsense', which transformers [\d.]+\S* does not know; give",
    ):
        load(str(folder))
    about = {"model_type": "nonsense", "auto_map": {"AutoModelForCausalLM": "modeling.Nonsense"}}
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(
        ReferenceError, match=r"^model comes with code of its own, which is not run here, and has"
    ):
        load(str(folder))


def test_a_class_that_transformers_does_not_have(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForDreaming"]}))
    with pytest.raises(
        ReferenceError,
        match=r"^The config.json of model names LlamaForDreaming, and transformers [\d.]+\S* has no such class; give",
    ):
        load(str(folder))


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_configurations_that_say_nothing(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(
        ReferenceError, match=r"^model cannot be loaded as a causal language model \(.*\); check"
    ) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["four", 7])
def test_a_configuration_with_a_wrong_value(value, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": value}))
    with pytest.raises(
        ReferenceError, match=r"^model cannot be loaded as a causal language model \(.*\); check"
    ):
        load(str(folder))


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_looks_ahead(kind, byte_tokenizer, tmp_path):
    config = AutoConfig.for_model(kind, **SMALL, intermediate_size=32)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ReferenceError, match=rf"reads what follows a token to predict it \({kind}\); give a causal"
    ):
        load(str(tmp_path))


def test_a_model_that_cannot_run(byte_tokenizer, tmp_path):
    """RoBERTa counts positions from its padding token, and this one has none."""
    config = AutoConfig.for_model("roberta", **SMALL, intermediate_size=32, pad_token_id=None)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ReferenceError, match=r"cannot be loaded as a causal language model \(.*\); check"):
        reference.load_model(resolve(str(tmp_path)))


def test_a_decoder_of_the_same_family_looks_back_only(byte_tokenizer, tmp_path):
    config = AutoConfig.for_model("bert", **SMALL, intermediate_size=32, is_decoder=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert load(str(tmp_path)).model.config.model_type == "bert"


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("t5", {"vocab_size": 300, "d_model": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32}),
        ("bart", {"vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}),
    ],
)
def test_an_encoder_and_a_decoder(kind, config, byte_tokenizer, tmp_path):
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ReferenceError, match=rf"is an encoder-decoder model \({kind}\); give a model that has a decoder"
    ):
        load(str(tmp_path))


def test_a_model_of_another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        ReferenceError, match=r"^model has the layout 'vit', of which transformers has no causal"
    ):
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


def gated(*_: object, local_files_only: bool = False, **__: object) -> None:
    if local_files_only:
        raise LocalEntryNotFoundError("not here")
    raise GatedRepoError("403 Client Error.", response=SimpleNamespace(headers={}, request=None))


def test_a_model_whose_licence_was_not_accepted(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(
        ReferenceError,
        match=r"^'google/gemma-3-1b-it' is gated: accept its licence on its page, "
        r"https://huggingface.co/google/gemma-3-1b-it, and log in with `hf auth login`\.$",
    ):
        load("google/gemma-3-1b-it")


def test_a_configuration_is_had_without_the_weights(tiny, folder, monkeypatch):
    asked = []

    def fetched(name: str, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(folder)

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert reference.config_of("someone/model").hidden_size == 64
    assert asked == ["*.json"]
    assert reference.config_of(str(tiny)).to_dict() == load(str(tiny)).model.config.to_dict()


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


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("foo", r"by 'foo', which transformers does not know; give one of dynamic, linear, llama3,"),
        ("su", r"by 'su', an older name of 'longrope'; write that in its place\.$"),
    ],
)
@pytest.mark.parametrize("read", [load, config_of])
def test_a_scaling_that_nobody_knows_is_named(kind, sentence, read, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    stated = json.loads(file.read_text())
    stated["rope_scaling"] = {"type": kind, "factor": 2.0}
    file.write_text(json.dumps(stated))
    with pytest.raises(ReferenceError, match=sentence):
        read(str(tmp_path / "model"))
