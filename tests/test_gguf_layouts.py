"""Every layout in GGUF, both ways: what llama.cpp computes from our files, and what we read from them.

The models are tiny and trained here, so that their answers are far from uniform: of a model that knows nothing, any
engine says the same.
"""

import copy
import math
import re

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerFast

from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.devices.file_sizes import gguf_bytes
from edgelab.devices.shapes import ModelShape
from edgelab.gguf_files import layouts, reader, tokenizer_writer
from edgelab.gguf_files.reader import GGUFError
from edgelab.recipes import Context, RecipeError, parse
from edgelab.runtimes import gguf as export
from edgelab.runtimes.llama_c import LlamaError
from edgelab.runtimes.llamacpp import LlamaCpp
from edgelab.storage import variants
from edgelab.techniques import calibration
from tests import trained_layouts
from tests.trained_layouts import GRIDS, ROWS, entropy, quantized, verdict

THETA = {"rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **THETA,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
    "long_factor": [4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0],
    "original_max_position_embeddings": 256,
    **THETA,
}
WINDOW = 12
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 20.0}}
CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": LOCAL | {"full_attention": LINEAR | {"factor": 16.0}},
        },
    ),
    "gemma2, no windows": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2},
    ),
    "gemma3, no windows": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": LOCAL | {"full_attention": LINEAR},
        },
    ),
    "phi": ("phi", {}),
    "phi, tied": ("phi", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, longrope": (
        "phi3",
        {"sliding_window": None, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE},
    ),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm, parallel": (
        "stablelm",
        {
            "use_qkv_bias": False,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "num_key_value_heads": 4,
        },
    ),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "gpt_neox, tanh": ("gpt_neox", {"hidden_act": "gelu_fast"}),
    "gpt_neox, in a row": ("gpt_neox", {"use_parallel_residual": False}),
}
IDS = torch.randint(2, 300, (1, 160), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_reads_back(case, new_model, tmp_path):
    layout, settings = copy.deepcopy(CASES[case])
    model = new_model(layout, **settings)
    export.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", "none")
    read = reader.read(tmp_path / "model.gguf")
    right = logits(model)
    assert (logits(read) - right).abs().max() < 1e-3
    assert getattr(read.config, "hidden_act", None) == getattr(model.config, "hidden_act", None)
    again = tmp_path / "again.gguf"
    export.write_model(read, tmp_path, again, "tiny", "none")
    assert again.read_bytes() == (tmp_path / "model.gguf").read_bytes()


@pytest.mark.parametrize(
    "recipe", ["none", "quantize.rtn:bits=4,group_size=32,embedding_bits=4", "quantize.fp16"]
)
@pytest.mark.parametrize(
    "layout",
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm"],
)
def test_the_size_of_a_file_is_known_before(layout, recipe, new_model, byte_tokenizer, tmp_path):
    settings = {"head_dim": 16, "query_pre_attn_scalar": 16} if "gemma" in layout else {}
    model = quantized(new_model(layout, **settings), recipe)
    byte_tokenizer.save_pretrained(tmp_path)
    export.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", recipe)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    stated = {key: one.contents() for key, one in fields.items() if not key.startswith("GGUF.")}
    kind = {"none": "F32", "quantize.fp16": "F16"}.get(recipe, "Q4_1")
    predicted = gguf_bytes(ModelShape.from_config(model.config), kind, embedding=kind, metadata=stated)
    assert (tmp_path / "model.gguf").stat().st_size == predicted


# What llama.cpp computes


@pytest.fixture(scope="module")
def tokenizers():
    return trained_layouts.learned_tokenizers_of_both_kinds()


@pytest.fixture(scope="module")
def tokenized(tokenizers):
    return trained_layouts.tokenize(tokenizers)


@pytest.fixture
def texts(tokenized, request):
    """Those of the tokenizer that the layout of a case has."""
    return tokenized[kind_of(request.node.callspec.params["case"])]


@pytest.fixture(scope="module")
def trained(new_model, tokenized):
    """`trained(case)`: a model that has read a little, whose mean entropy is below half of ln V."""
    made = {}

    def train(case):
        if case not in made:
            # Configurations change the dictionaries they are given.
            layout, settings = copy.deepcopy(CASES[case])
            model = new_model(layout, vocab_size=ROWS, **settings)
            made[case] = trained_layouts.train(model, *tokenized[kind_of(case)])
        return made[case]

    return train


def kind_of(case):
    return trained_layouts.kind_of(CASES[case][0])


class Exact(LlamaCpp):
    """llama.cpp with keys and values in float32."""

    cache_type = 0


@pytest.fixture
def session(tmp_path):
    """`session(model)`: llama.cpp with a model, which may be packed."""
    opened = []

    def open_(model):
        tmp_path.mkdir(exist_ok=True)
        export.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", "none")
        opened.append(Exact(tmp_path, 1))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


@pytest.mark.embedded
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_what_pytorch_does(case, trained, session, texts, tokenizers, tmp_path):
    model = trained(case)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizers[kind_of(case)], **names)
    own.save_pretrained(tmp_path)
    assert tokenizer_writer.why_not(tmp_path) is None
    assert entropy(model, texts[1]) < 0.5 * math.log(ROWS)
    assert export.refusal(variants.describe(model)) is None
    for recipe in GRIDS.values():
        twin = quantized(model, recipe)
        found = verdict(session(twin), twin, texts[1])
        assert found.passed, (recipe, found.detail)
    engine, ids = session(model), texts[1][0, :40].tolist()
    written = [engine.prefill(ids)]
    while len(written) < 32:
        written.append(engine.decode(written[-1]))
    with torch.inference_mode():
        expected = model.generate(torch.tensor([ids]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert written == expected[0, 40:].tolist()


@pytest.mark.embedded
@pytest.mark.parametrize("case", ["phi3, longrope"])
def test_longrope_has_other_factors_for_long_texts(case, trained, session, texts):
    model, ids = trained(case), texts[1].flatten()
    engine = session(model)
    for length in (100, 300, 100, 600):
        with torch.inference_mode():
            expected = model(ids[None, :length]).logits
        found = engine.logits(ids[:length].tolist())
        assert (found - expected[0]).abs().max() < 0.02 * expected.std(), length


DROPPED = [  # what a file of a case says that makes a difference
    ("llama, llama3", layouts.FACTORS),
    ("llama, linear", "rope.scaling.factor"),
    ("llama, yarn", "rope.scaling.type"),
    ("qwen3", "rope.scaling.type"),
    ("gemma2", "attn_logit_softcapping"),
    ("gemma2", "final_logit_softcapping"),
    ("gemma2", "attention.sliding_window"),
    ("gemma3", "rope.scaling.factor"),
    ("gemma3", "attention.sliding_window_pattern"),
    ("phi", "rope.dimension_count"),
    ("phi3, longrope", layouts.SHORT),
    ("stablelm", "rope.dimension_count"),
    ("gpt_neox", "rope.dimension_count"),
    ("gpt_neox, in a row", "use_parallel_residual"),
]


@pytest.mark.embedded
@pytest.mark.parametrize(("case", "dropped"), DROPPED)
def test_a_setting_that_is_dropped_fails_the_gate(case, dropped, trained, session, texts, monkeypatch):
    model, stated, factors = trained(case), layouts.stated, layouts.rotary_tensors

    asked = []

    def without(found):
        asked.extend(found)
        if isinstance(found.get(dropped), bool):  # which no file may lack
            return found | {dropped: not found[dropped]}
        return {key: value for key, value in found.items() if key != dropped}

    monkeypatch.setattr(export, "stated", lambda *about: without(stated(*about)))
    monkeypatch.setattr(export, "rotary_tensors", lambda *about: without(factors(*about)))
    engine = session(model)
    assert dropped in asked
    assert not verdict(engine, model, texts[1]).passed


@pytest.mark.embedded
@pytest.mark.parametrize("case", ["llama with biases", "qwen2", "phi", "stablelm", "gpt_neox"])
def test_biases_that_are_dropped_fail_the_gate(case, trained, session, texts):
    model = trained(case)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    assert not verdict(session(bare), model, texts[1]).passed


@pytest.mark.embedded
@pytest.mark.parametrize("case", ["gemma", "gemma2", "gemma3"])
def test_an_offset_that_is_dropped_fails_the_gate(case, trained, session, texts, monkeypatch):
    monkeypatch.setattr(layouts.Places, "offset", lambda places, place: 0.0)
    assert not verdict(session(trained(case)), trained(case), texts[1]).passed


SCALINGS = {"linear": LINEAR, "yarn": YARN, "llama3": LLAMA3, "longrope": LONGROPE}


@pytest.mark.parametrize(
    ("layout", "kind"),
    [(name, kind) for name, layout in layouts.LAYOUTS.items() for kind in layout.scaling],
)
def test_every_scaling_of_every_layout(layout, kind, new_model, session):
    settings = (
        {"head_dim": 16, "query_pre_attn_scalar": 16} if "gemma" in layout else {"sliding_window": None}
    )
    rope = copy.deepcopy(SCALINGS[kind])
    if layout == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", **THETA}}
        settings |= {"layer_types": ["full_attention", "sliding_attention"]}
    model = new_model(layout, rope_parameters=rope, original_max_position_embeddings=256, **settings)
    plain = new_model(layout, **settings)
    found = session(model).logits(IDS[0].tolist())
    right, other = (logits(one)[0] for one in (model, plain))
    assert (found - right).norm() < 0.02 * right.norm() < 0.2 * (other - right).norm()


@pytest.mark.parametrize(
    "case", ["llama with biases", "gemma2", "gemma3", "phi", "phi3", "stablelm", "olmo2", "gpt_neox"]
)
def test_another_program_loads_our_files(case, new_model, byte_tokenizer, tmp_path):
    """llama.cpp's own server, out of the wheel of the engine, with our tokenizer in the file."""
    xllamacpp = pytest.importorskip("xllamacpp")
    layout, settings = copy.deepcopy(CASES[case])
    model = new_model(layout, **settings)
    byte_tokenizer.save_pretrained(tmp_path)
    export.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", "none")
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "model.gguf")
    params.port, params.n_ctx, params.n_parallel, params.warmup = 0, 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    prompt = byte_tokenizer("Every evening he wrote", add_special_tokens=False)["input_ids"]
    said = []
    with torch.inference_mode(), Cloud(server.listening_address, deadline_s=60) as cloud:
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1).amax(-1)
        for end in range(1, len(prompt) + 1):
            # llama.cpp leaves tokens out that are a part of a character
            for likely in cloud.complete(prompt[:end], 1, logprobs=3).logprobs or ():
                said.append((likely, expected[end - 1].item()))
    found, right = zip(*said, strict=True)
    assert len(said) > 3 and found == pytest.approx(right, abs=0.1)
    del server


def test_blocks_with_a_window_have_a_base_of_their_own(new_model, session):
    settings = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    settings["layer_types"] = ["sliding_attention", "full_attention"]
    full = {"full_attention": {"rope_type": "default", **THETA}}
    model = new_model("gemma3_text", rope_parameters=copy.deepcopy(full | LOCAL), **settings)
    other = new_model("gemma3_text", rope_parameters=copy.deepcopy(full), **settings)
    found, right = session(model).logits(IDS[0].tolist()), logits(model)[0]
    assert (found - right).norm() < 0.02 * right.norm() < 0.2 * (logits(other)[0] - right).norm()


# Smaller models

# Norms behind sublayers or with a mean: none is rotated away.
TWO_SIDED = ("gemma2", "gemma3_text", "phi", "stablelm")


@pytest.mark.parametrize(
    "recipe",
    [
        "prune.layers:drop=0",
        "prune.channels:share=0.5,by=magnitude",
        "prune.heads:groups=1,by=magnitude",
        "prune.heads:queries=1,by=magnitude",
        "prune.hidden:share=0.25,samples=2,length=64",
    ],
)
@pytest.mark.parametrize("layout", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "stablelm"])
def test_pruned_models_run_or_are_refused(
    layout, recipe, new_model, session, story, byte_tokenizer, monkeypatch
):
    """What is left of a model is an ordinary smaller one; where llama.cpp wants another shape it says so."""
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    settings = {"head_dim": 16, "query_pre_attn_scalar": 16} if "gemma" in layout else {}
    if layout in ("gemma2", "gemma3_text"):
        settings["sliding_window"] = WINDOW
    model = new_model(layout, num_hidden_layers=3, **settings)
    context = Context(reference=model, tokenizer=byte_tokenizer)
    try:
        for technique in parse(recipe).techniques:
            model = technique.apply(model, context)
    except RecipeError:
        assert "prune.hidden" in recipe and layout in TWO_SIDED
        return
    if reason := export.refusal(variants.describe(model)):
        assert ("heads" in recipe and "as wide as its hidden states" in reason) or "hidden" in recipe, reason
        return
    with torch.inference_mode():
        expected = model(IDS[:, :64]).logits[0]
    found = session(model).logits(IDS[0, :64].tolist())
    assert (found - expected).norm() < 0.01 * expected.norm()


# What is refused


@pytest.mark.parametrize(
    ("layout", "settings", "sentence"),
    [
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "The export to GGUF knows llama, .*, not opt;"),
        ("gemma", {"head_dim": 16, "attention_bias": True}, "gemma models with attention_bias=False, and"),
        ("gemma2", {"head_dim": 16}, "scores of this gemma2 model by the root of 16, and .* of 256"),
        ("phi", {"qk_layernorm": True}, "phi models with qk_layernorm=False, and this one has True"),
        ("phi", {"hidden_act": "relu"}, "phi models with gelu_pytorch_tanh, and this one has relu"),
        ("stablelm", {"rope_parameters": LLAMA3}, "only linear and yarn rotary scaling of a stablelm model"),
        (
            "phi3",
            {"original_max_position_embeddings": 128, "rope_parameters": LONGROPE},
            "in steps of 256 tokens .* those of this phi3 model change at 128; run it on torch",
        ),
        ("gpt_neox", {"hidden_act": "relu"}, "gpt_neox models with gelu, and this one has relu"),
        ("gpt_neox", {"attention_bias": False}, "gpt_neox models with attention_bias=True, and this one"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(layout, settings, sentence, new_model):
    assert re.search(sentence, export.refusal(variants.describe(new_model(layout, **settings))))


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("llama", {"max_position_embeddings": 64}),
        ("llama", {"attention_chunk_size": 64}),
        ("mistral", {"sliding_window": 64}),
        ("phi3", {"sliding_window": 64}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
    ],
)
def test_a_window_that_llama_cpp_does_not_know_bounds_the_texts(layout, settings, new_model, tmp_path):
    """As long as no token is forgotten, the window makes no difference."""
    model = new_model(layout, **settings)
    export.write_model(model, tmp_path, tmp_path / "model.gguf", "tiny", "none")
    engine = Exact(tmp_path, 1)
    ids = IDS[0, :64].tolist()
    with torch.inference_mode():
        torch.testing.assert_close(engine.logits(ids), model(IDS[:, :64]).logits[0], rtol=0, atol=0.05)
    with pytest.raises(LlamaError, match="for texts of up to 64 tokens; use a shorter one"):
        engine.logits(IDS[0, :65].tolist())
    engine.close()


def states(model, file, key, value):
    """Our file of a model, with one more key."""
    write = export.add_shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            export,
            "add_shape",
            lambda writer, one: (write(writer, one), export.add_value(writer, key, value)),
        )
        export.write_model(model, file.parent, file, "tiny", "none")
    return file


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma.attention.scale", 0.5),
        ("gemma.logit_scale", 2.0),
        ("gemma.something_new", 7),
        (layouts.ACTIVATION, "relu"),
    ],
)
def test_a_key_that_is_not_understood_is_refused(key, value, new_model, tmp_path):
    file = states(new_model("gemma", head_dim=16), tmp_path / "model.gguf", key, value)
    with pytest.raises(
        GGUFError, match=rf"^model.gguf states {re.escape(key)}(=relu)?, which is not read here; give"
    ):
        reader.read(file)


def test_a_window_that_llama_cpp_heeds_is_refused(new_model, tmp_path):
    """Of the layouts whose keys have no window here OLMo 2 alone, as which llama.cpp computes an OLMo 3."""
    file, key = tmp_path / "model.gguf", "attention.sliding_window"
    with pytest.raises(
        GGUFError, match=r"^model.gguf has blocks that see 16 tokens of the text, which is not read"
    ):
        reader.read(states(new_model("olmo2"), file, f"olmo2.{key}", 16))
    assert reader.read(states(new_model("llama"), file, f"llama.{key}", 16)).config.sliding_window is None


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"holds a model of mamba, and llama, qwen2, .* are read here"):
        reader.read(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_other_quantizations_are_decoded(kind, new_model, tmp_path):
    """Blocks of 256 need rows as long; what the gguf package cannot round is given as bytes that make sense of it."""
    model = new_model("gemma", head_dim=64, hidden_size=256, intermediate_size=256)
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", export.find_architecture(model))
    export.add_shape(writer, model)
    for name, values, stored in export.tensors(model):
        if values.ndim == 1:
            writer.add_tensor(name, values, raw_dtype=stored)
        else:
            blocks = np.random.default_rng(0).integers(0, 60, (len(values), values.shape[1] // block * size))
            writer.add_tensor(name, blocks.astype(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = reader.read(tmp_path / "model.gguf")
    stored = {one.name: one for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    down = stored["blk.1.ffn_down.weight"]
    expected = torch.from_numpy(dequantize(down.data, down.tensor_type))
    assert torch.equal(read.model.layers[1].mlp.down_proj.weight, expected)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("phi", {"num_key_value_heads": 2}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 2}),
        ("stablelm", {"use_qkv_bias": True}),
        ("qwen3", {"head_dim": 32}),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_queries_keys_and_values_in_one_tensor(layout, settings, kind, new_model, tmp_path):
    """As in older files of Phi-2: rows of the queries, then of the keys, then of the values; biases too."""
    model = new_model(layout, **settings)
    kind = gguf.GGMLQuantizationType[kind]

    def write(file, fused):
        writer = gguf.GGUFWriter(file, export.find_architecture(model))
        export.add_shape(writer, model)
        stored = {}
        for name, values, _ in export.tensors(model):
            place = re.sub(r"attn_[qkv]\.", "attn_qkv.", name) if fused else name
            stored.setdefault(place, []).append(values)
        for name, values in stored.items():
            whole = np.concatenate(values)
            if whole.ndim > 1:
                writer.add_tensor(name, gguf.quants.quantize(whole, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, whole)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return reader.read(file), set(stored)

    apart, names = write(tmp_path / "apart.gguf", False)
    fused, fewer = write(tmp_path / "fused.gguf", True)
    biased = "blk.0.attn_q.bias" in names
    assert len(names) - len(fewer) == 2 * 2 * (1 + biased)
    assert apart.config.to_dict() | {"_name_or_path": ""} == fused.config.to_dict() | {"_name_or_path": ""}
    assert torch.equal(logits(fused), logits(apart))
    assert (logits(apart) - logits(model)).norm() < 0.05 * logits(model).norm()


def test_a_fused_tensor_of_another_size_is_refused(new_model, tmp_path):
    model = new_model("phi")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", export.find_architecture(model))
    export.add_shape(writer, model)
    for name, values, stored in export.tensors(model):
        if "attn_q." in name:
            writer.add_tensor(name.replace("attn_q", "attn_qkv"), values, raw_dtype=stored)
        elif not re.search(r"attn_[kv]\.", name):
            writer.add_tensor(name, values, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match=r"a phi model has no place here \(blk.0.attn_qkv.bias, "):
        reader.read(tmp_path / "model.gguf")


# What a file says in few words


@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        YARN | {"attention_factor": 1.3},
    ],
)
def test_all_that_yarn_is_given_goes_into_the_file(rope, new_model, session):
    model = new_model("llama", rope_parameters=copy.deepcopy(rope))
    found, right = session(model).logits(IDS[0].tolist()), logits(model)[0]
    plain = logits(new_model("llama", rope_parameters=copy.deepcopy(YARN)))[0]
    assert (found - right).norm() < 0.02 * right.norm() < 0.4 * (plain - right).norm()


@pytest.mark.parametrize("setting", [{"truncate": False}, {"beta_slow": 2.0}, {"beta_fast": 16.0}])
def test_bounds_of_yarn_that_llama_cpp_does_not_heed_are_refused(setting, new_model):
    model = new_model("llama", rope_parameters=YARN | setting)
    assert "YaRN with beta_fast=32, beta_slow=1, truncate=True, and" in export.refusal(
        variants.describe(model)
    )


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("gemma.attention.causal", False, "is a model whose tokens see what follows"),
        ("gemma.rope.scaling.attn_factor", 1.5, "attn_factor without YaRN"),
    ],
)
def test_what_would_change_the_model_is_refused(key, value, sentence, new_model, tmp_path):
    file = states(new_model("gemma", head_dim=16), tmp_path / "model.gguf", key, value)
    with pytest.raises(GGUFError, match=sentence):
        reader.read(file)


def test_a_factor_without_a_kind_scales_linearly(new_model, tmp_path):
    """As llama.cpp does."""
    file = states(new_model("llama"), tmp_path / "model.gguf", "llama.rope.scaling.factor", 4.0)
    assert torch.equal(logits(reader.read(file)), logits(new_model("llama", rope_parameters=dict(LINEAR))))


def test_a_configuration_is_read_without_decoding(new_model, tmp_path, monkeypatch):
    export.write_model(new_model("llama"), tmp_path, tmp_path / "model.gguf", "tiny", "none")
    monkeypatch.setattr(reader, "decode", None)
    assert reader.read_config(tmp_path / "model.gguf").tie_word_embeddings
