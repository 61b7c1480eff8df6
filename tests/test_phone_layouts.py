"""The models that are made for phones, on every engine that knows their layout: PyTorch's logits, at every position.

Texts are longer than the windows of the models. What one setting does is seen from the same weights exported without
it: their logits have to be far away, so that an engine that leaves it out could not pass. On ONNX Runtime the models
have read a little, too, and what is exported without a setting fails the parity gate.
"""

import copy
import importlib.util
import math

import numpy as np
import pytest
import torch
from torch import nn

from edgelab import recipes, runtimes
from edgelab.runtimes import RuntimeRefused
from edgelab.storage import variants
from edgelab.techniques.quantization.rtn import quantize_affine
from tests import trained_layouts
from tests.trained_layouts import GRIDS, ROWS, entropy, quantized, verdict

WINDOW = 24
TEXT = torch.randint(2, 300, (90,), generator=torch.Generator().manual_seed(7)).tolist()
BASE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SHORT, LONG = [1.0 + place / 5 for place in range(8)], [3.0 + place for place in range(8)]
GEMMA = {"hidden_size": 96, "head_dim": 16}  # the root of 96 is no round number
CAPS = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 8.0}
PHI = {
    "tie_word_embeddings": False,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # half of 32 is turned
MODELS = {
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "phi": ("phi", PHI),
    "phi linear": ("phi", PHI | {"rope_parameters": {"rope_type": "linear", **BASE}}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3 longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "longrope", **BASE, "short_factor": SHORT, "long_factor": LONG},
        },
    ),
    "gemma": ("gemma", GEMMA),
    "gemma yarn": ("gemma", GEMMA | {"rope_parameters": {"rope_type": "yarn", **BASE}}),
    "gemma2": ("gemma2", GEMMA | CAPS | {"sliding_window": WINDOW}),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", **BASE, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
KNOWN = {  # of each engine that is installed
    "onnxruntime": ("onnxruntime_genai", list(MODELS)),
    "openvino": ("openvino", list(MODELS)),
    "litert": ("litert_torch", ["gemma", "gemma2", "gemma3"]),
    "executorch": ("executorch", ["gemma", "gemma2", "gemma3"]),
}
ROUNDED_CACHE = 0.3  # of a standard deviation, for keys and values that an engine keeps in int8
FAST = ("onnxruntime", "openvino")  # to export to
INSTALLED = [engine for engine, (package, _) in KNOWN.items() if importlib.util.find_spec(package)]
PAIRS = [(engine, name) for engine in INSTALLED for name in KNOWN[engine][1]]


def without_bias(model):
    for layer in model.modules():
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.zero_()


def without_offset(model):
    """Norms that multiply by the weight, where Gemma's multiply by one and the weight."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.sub_(1)


DEFAULT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
WHOLE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}
GEMMA3_ROTARY = MODELS["gemma3"][1]["rope_parameters"]
DROPPED = {  # of which model, as another setting or as another weight
    "mistral window": ("mistral", {"sliding_window": None}),
    "a token of the window": ("mistral", {"sliding_window": WINDOW + 1}),
    "phi bias": ("phi", without_bias),
    "phi epsilon": ("phi", {"layer_norm_eps": 1e-2}),
    "phi part of a head": ("phi", WHOLE),
    "phi scaling": ("phi linear", DEFAULT),
    "phi3 window": ("phi3", {"sliding_window": None}),
    "phi3 scaling": ("phi3 longrope", DEFAULT),
    "gemma offset": ("gemma", without_offset),
    "gemma scaling": ("gemma yarn", DEFAULT),
    "gemma2 attention cap": ("gemma2", {"attn_logit_softcapping": None}),
    "gemma2 final cap": ("gemma2", {"final_logit_softcapping": None}),
    "gemma2 query scale": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma2 window": ("gemma2", {"sliding_window": 4096}),
    "gemma2 turns": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3 window": ("gemma3", {"sliding_window": 4096}),
    "gemma3 base": (
        "gemma3",
        {"rope_parameters": GEMMA3_ROTARY | {"full_attention": GEMMA3_ROTARY["sliding_attention"]}},
    ),
    "gemma3 offset": ("gemma3", without_offset),
}


@pytest.fixture(scope="module")
def keep(tmp_path_factory, byte_tokenizer):
    """`keep(model, recipe)`: the folder of a variant of a model."""

    def keep(model: nn.Module, text: str = "none"):
        for technique in recipes.parse(text).techniques:
            model = technique.apply(model, recipes.Context(reference=model))
        folder = tmp_path_factory.mktemp("variants") / "one"
        variants.save(model, folder, {"recipe": text}, byte_tokenizer)
        return folder

    return keep


@pytest.fixture(scope="module")
def born(new_model):
    """`born(name, **other)`: a fresh model of MODELS; transformers fills the settings in that it is given."""

    def born(name, **other):
        layout, changes = MODELS[name]
        return new_model(layout, **copy.deepcopy(changes | other))

    return born


@pytest.fixture(scope="module")
def pair(born, keep):
    """`pair(engine, name)`: a session on a float32 variant, which is exported once, and its model in PyTorch."""
    made = {}

    def pair(engine, name):
        if (engine, name) not in made:
            model = born(name)
            made[engine, name] = runtimes.load(engine, keep(model)), model
        return made[engine, name]

    yield pair
    for session, _ in made.values():
        session.close()


def expected(model):
    with torch.inference_mode():
        return model(torch.tensor([TEXT])).logits[0].float()


def apart(found, wanted):
    """Largest distance of a logit, in standard deviations of all."""
    return float((found - wanted).abs().max() / wanted.std())


def refused(engine, folder):
    return runtimes.find(engine).refusal(variants.read_description(folder))


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_float_logits_are_those_of_pytorch_beyond_a_window(pair, engine, name):
    session, model = pair(engine, name)
    wanted = expected(model)
    assert wanted.softmax(-1).amax(-1).median() > 0.05  # far from uniform over 300 tokens
    assert apart(session.logits(TEXT), wanted) < 1e-4


@pytest.mark.parametrize(("engine", "name"), PAIRS)
def test_a_greedy_continuation_is_that_of_pytorch(pair, engine, name):
    session, model = pair(engine, name)
    ids = (TEXT + TEXT)[: min(getattr(session, "room", 200), 200) - 50]
    slack = ROUNDED_CACHE if session.cache_bits < 32 else 0.0
    token = session.prefill(ids)
    for _ in range(32):
        with torch.inference_mode():
            wanted = model(torch.tensor([ids])).logits[0, -1]
        assert wanted.max() - wanted[token] <= slack * wanted.std()
        ids = [*ids, token]
        token = session.decode(token)
    session.rewind(20)
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -20:]
    assert apart(session.extend(ids[-20:]), wanted) < max(slack, 1e-4)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(
    "text", ["quantize.rtn:bits=4,group_size=32", "quantize.rtn:bits=8,group_size=0,embedding_bits=8"]
)
@pytest.mark.parametrize("name", ["mistral", "phi", "phi3", "gemma", "gemma2", "gemma3"])
def test_our_integers_give_pytorchs_logits(born, keep, engine, name, text):
    """Up to activations that the engine rounds to int8."""
    folder = keep(born(name), text)
    session, wanted = runtimes.load(engine, folder), expected(variants.load(folder))
    found = session.logits(TEXT)
    assert (found - wanted).norm() / wanted.norm() < 0.05
    assert session.prefill(TEXT) == found[-1].argmax()
    session.close()


SLOW = (
    "gemma2 attention cap",
    "gemma2 final cap",
    "gemma3 window",
    "gemma3 base",
)  # enough where an export is slow
CASES = [(engine, case) for engine in INSTALLED for case in (DROPPED if engine == "onnxruntime" else SLOW)]


@pytest.mark.parametrize(("engine", "case"), CASES)
def test_an_export_without_a_setting_is_far_away(born, keep, engine, case):
    name, other = DROPPED[case]
    wanted = expected(born(name))
    lacking = born(name) if callable(other) else born(name, **other)  # the same seed, the same weights
    if callable(other):
        other(lacking)
    session = runtimes.load(engine, keep(lacking))
    assert apart(session.logits(TEXT), wanted) > 1e-3
    session.close()


# Models that have read a little

LINEAR = {"rope_parameters": {"rope_type": "linear", **BASE}}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **BASE, "factor": 8.0}
GEMMA3_FAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 16.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
NEAR = 12  # tokens of a window
TRAINED = {  # with settings so strong that none of them is left out without notice
    "llama": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    ),
    "qwen2": ("qwen2", LINEAR),
    "qwen3": ("qwen3", {"rope_parameters": LINEAR["rope_parameters"] | {"factor": 16.0}}),
    **MODELS,
    "mistral": ("mistral", MODELS["mistral"][1] | LINEAR | {"sliding_window": NEAR}),
    "phi": ("phi", PHI | {"layer_norm_eps": 0.05}),
    "gemma2": (
        "gemma2",
        GEMMA
        | {
            "sliding_window": NEAR,
            "query_pre_attn_scalar": 96,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 10.0,
        },
    ),
    # A cap of 4 bounds what the scale of the queries can do, and few tokens that are told apart make it count.
    "gemma2 near": (
        "gemma2",
        GEMMA
        | {
            "sliding_window": 6,
            "layer_types": ["sliding_attention"] * 2,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},
        },
    ),
    "gemma3 linear": (
        "gemma3_text",
        MODELS["gemma3"][1]
        | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": GEMMA3_FAR,
        },
    ),
}
FAILING = DROPPED | {  # what is left out, of which of them
    "llama bias": ("llama", without_bias),
    "llama scaling": ("llama", DEFAULT),
    "qwen2 bias": ("qwen2", without_bias),
    "qwen2 scaling": ("qwen2", DEFAULT),
    "qwen3 scaling": ("qwen3", DEFAULT),
    "mistral scaling": ("mistral", DEFAULT),
    "a token of the window": ("mistral", {"sliding_window": NEAR + 1}),
    "phi epsilon": ("phi", {"layer_norm_eps": 1e-5}),  # that of the class
    "gemma2 query scale": ("gemma2 near", {"query_pre_attn_scalar": 16}),  # the size of a head
    "gemma3 base": (
        "gemma3 linear",
        {"rope_parameters": GEMMA3_FAR | {"full_attention": GEMMA3_FAR["sliding_attention"]}},
    ),
    "gemma3 scaling": (
        "gemma3 linear",
        {"rope_parameters": GEMMA3_FAR | {"full_attention": DEFAULT["rope_parameters"]}},
    ),
}


@pytest.fixture(scope="module")
def tokenized():
    return trained_layouts.tokenize(trained_layouts.learned_tokenizers_of_both_kinds())


@pytest.fixture(scope="module")
def texts(tokenized):
    """`texts(name)`: what a model of TRAINED reads, and windows that it has not read."""
    return lambda name: tokenized[trained_layouts.kind_of(TRAINED[name][0])]


@pytest.fixture(scope="module")
def unread(new_model):
    """`unread(name, **other)`: a fresh model of TRAINED."""

    def unread(name, **other):
        layout, changes = TRAINED[name]
        return new_model(layout, vocab_size=ROWS, **copy.deepcopy(changes | other))

    return unread


@pytest.fixture(scope="module")
def trained(unread, texts):
    """`trained(name)`: a model of TRAINED, whose mean entropy is below half of ln V."""
    made = {}

    def train(name):
        if name not in made:
            made[name] = trained_layouts.train(unread(name), *texts(name))
        return made[name]

    return train


@pytest.mark.embedded
@pytest.mark.parametrize("name", TRAINED)
def test_onnx_runtime_passes_the_gate_on_a_trained_model(name, trained, texts, keep):
    pytest.importorskip("onnxruntime_genai")
    model, asked = trained(name), texts(name)[1]
    assert entropy(model, asked) < 0.5 * math.log(ROWS)
    prompt, written = asked[0, :40].tolist(), []
    for grid, recipe in GRIDS.items():
        twin = quantized(model, recipe)
        session = runtimes.load("onnxruntime", keep(twin))
        found = verdict(session, twin, asked)
        assert found.passed, (grid, found.detail)
        if grid == "float32":
            written.append(session.prefill(prompt))
            while len(written) < 32:
                written.append(session.decode(written[-1]))
        session.close()
    with torch.inference_mode():
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert written == wanted[0, 40:].tolist()


@pytest.mark.embedded
@pytest.mark.parametrize("case", FAILING)
def test_a_trained_model_without_a_setting_fails_the_gate(case, trained, unread, texts, keep):
    pytest.importorskip("onnxruntime_genai")
    name, other = FAILING[case]
    model = trained(name)
    lacking = unread(name) if callable(other) else unread(name, **other)
    lacking.load_state_dict(model.state_dict())
    if callable(other):
        other(lacking)
    session = runtimes.load("onnxruntime", keep(lacking))
    found = verdict(session, model, texts(name)[1])
    session.close()
    assert not found.passed, found.detail


@pytest.mark.parametrize("engine", [engine for engine in INSTALLED if engine not in FAST])
def test_rounded_by_an_engine_it_stays_near(born, keep, engine):
    """An embedding that lost its multiplier would be far away."""
    model = born("gemma")
    session, wanted = runtimes.load(engine, keep(model, "native.int8")), expected(model)
    assert 1e-4 < (session.logits(TEXT) - wanted).norm() / wanted.norm() < 0.1
    session.close()


REFUSED = {  # on one engine, of one layout and setting, and what its sentence names
    "phi norms": ("onnxruntime", "phi", PHI | {"qk_layernorm": True}, "norms of queries and keys"),
    "phi small part": ("onnxruntime", "phi", PHI | {"num_attention_heads": 4}, "not 8 of 16"),
    "phi dynamic": (
        "onnxruntime",
        "phi",
        PHI | {"rope_parameters": {"rope_type": "dynamic", **BASE}},
        "only linear, llama3 and yarn rotary scaling of a phi model, and this one has 'dynamic'",
    ),
    "gemma both ways": (
        "onnxruntime",
        "gemma",
        GEMMA | {"use_bidirectional_attention": True},
        "earlier tokens",
    ),
    "gemma window": ("onnxruntime", "gemma", GEMMA | {"sliding_window": WINDOW}, "no sliding window"),
    "gemma2 activation": (
        "onnxruntime",
        "gemma2",
        GEMMA | {"hidden_activation": "quick_gelu"},
        "not quick_gelu",
    ),
    "gemma3 dynamic": (
        "onnxruntime",
        "gemma3_text",
        GEMMA | {"rope_parameters": GEMMA3_ROTARY | {"full_attention": {"rope_type": "dynamic", **BASE}}},
        "'dynamic'",
    ),
    "stablelm": ("onnxruntime", "stablelm", {}, "not stablelm"),
    "olmo2": ("onnxruntime", "olmo2", {}, "not olmo2"),
    "gpt_neox": ("onnxruntime", "gpt_neox", {}, "not gpt_neox"),
    "opt": ("onnxruntime", "opt", {"ffn_dim": 192, "word_embed_proj_dim": 64}, "not opt"),
}


@pytest.mark.parametrize(("engine", "layout", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_an_engine_cannot_do_is_refused_before_it_is_exported(
    new_model, keep, engine, layout, changes, words
):
    folder = keep(new_model(layout, **copy.deepcopy(changes)))
    with pytest.raises(RuntimeRefused) as refusal:
        runtimes.load(engine, folder)
    said = str(refusal.value)
    assert words in said and said.endswith(".") and len(said) < 220
    assert not (folder / "exports").exists()


def test_longrope_stops_where_its_frequencies_change(born, keep):
    pytest.importorskip("onnxruntime_genai")
    session = runtimes.load("onnxruntime", keep(born("phi3 longrope")))
    assert session.room == 128
    with pytest.raises(RuntimeRefused, match="128 positions"):
        session.prefill(TEXT + TEXT)


def test_the_graph_of_a_fused_matrix_holds_our_integers_to_the_bit(born, keep):
    """The rows of gate and up, which the builder takes apart, and those of query, key and value, which it leaves."""
    onnx = pytest.importorskip("onnx")
    folder = keep(born("phi3"), "quantize.rtn:bits=8,group_size=32,symmetric=true")
    graph = onnx.load(runtimes.exported("onnxruntime", folder).folder / "model.onnx")
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in graph.graph.initializer}
    layer = variants.load(folder).model.layers[1]
    fused, place = layer.mlp.gate_up_proj.tensor, "model.layers.1.mlp"
    for part, ours in {"qweight": fused.integers, "scales": fused.scale.float()}.items():
        both = np.concatenate([stored[f"{place}.{one}_proj.{part}"] for one in ("gate", "up")])
        assert np.array_equal(both.reshape(ours.shape), ours)
    whole = stored["model.layers.1.attn.qkv_proj.qweight"]
    assert np.array_equal(whole.reshape(128, 64), layer.self_attn.qkv_proj.tensor.integers)


@pytest.mark.parametrize("name", ["phi", "phi3", "gemma2", "gemma3"])
def test_the_builders_own_rounding_is_another_one(born, keep, name):
    pytest.importorskip("onnxruntime_genai")
    model = born(name)
    session, wanted = runtimes.load("onnxruntime", keep(model, "native.int4")), expected(model)
    assert "4 bits" in session.kernel and 0.02 < (session.logits(TEXT) - wanted).norm() / wanted.norm() < 1


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 0), (3, 16)])
def test_openvinos_constants_are_our_matrix_to_the_bit(bits, group_size):
    openvino = pytest.importorskip("openvino")
    from edgelab.runtimes import openvino_export
    from edgelab.runtimes.openvino import core

    tensor = quantize_affine(
        torch.randn(12, 64, generator=torch.Generator().manual_seed(0)), bits, group_size
    )
    graph = openvino.Model([openvino.opset13.result(openvino_export.integers(tensor))], [], "matrix")
    compiled = core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert np.array_equal(compiled([])[0], tensor.dequantize())


@pytest.mark.parametrize("text", ["quantize.fp16", "native.int8", "native.int4"])
def test_openvino_takes_halves_and_rounds_by_itself(born, keep, text):
    pytest.importorskip("openvino")
    model = born("mistral" if text == "native.int4" else "gemma")  # NNCF takes groups of 64, and 96 has none
    session, wanted = runtimes.load("openvino", keep(model, text)), expected(model.float())
    bound = {"quantize.fp16": (0, 0.01), "native.int8": (1e-4, 0.1), "native.int4": (0.01, 1)}[text]
    assert bound[0] < (session.logits(TEXT) - wanted).norm() / wanted.norm() < bound[1]
    session.close()


@pytest.mark.parametrize("recipe", ["prune.layers:drop=0", "prune.channels:share=0.5,by=magnitude"])
@pytest.mark.parametrize("name", ["phi", "gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("engine", [one for one in FAST if one in INSTALLED])
def test_smaller_models_are_exported_the_same_way(engine, name, recipe, born, keep):
    turns = (
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
        if name in ("gemma2", "gemma3")
        else {}
    )
    folder = keep(born(name, num_hidden_layers=3, **turns), recipe)
    session = runtimes.load(engine, folder)
    with torch.inference_mode():
        expected = variants.load(folder)(torch.tensor([TEXT])).logits[0]
    assert (session.logits(TEXT) - expected).abs().max() < 1e-3 * expected.std()
    session.close()
