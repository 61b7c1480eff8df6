"""llama.cpp against PyTorch on the same weights: the tiny model in every type, smaller ones, and the embedded one.

llama.cpp keeps keys and values in float16 and rounds the inputs of quantized matrices to int8 in blocks of 32. On the
tiny model, whose logits have a standard deviation of 1.6, that is a Kullback-Leibler divergence of some 1e-6 nats for
float32, 1e-5 for float16 and 1e-3 for bfloat16 and integers; two grids of one model are 0.1 and more apart.
"""

import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgelab import corpora, reference, runtimes
from edgelab.measure import parity
from edgelab.measure.perplexity import Window, logit_slices, slices
from edgelab.recipes import Context, parse
from edgelab.runtimes import EngineMissing, RuntimeRefused, gguf, llama_c
from edgelab.runtimes.eager import Simulated
from edgelab.runtimes.llama_c import LlamaError
from edgelab.runtimes.llamacpp import CONTEXT, FILE, LlamaCpp
from edgelab.runtimes.session import SessionError
from edgelab.storage import variants

IDS = torch.randint(0, 300, (64,), generator=torch.Generator().manual_seed(0)).tolist()
INT4 = "quantize.rtn:bits=4,group_size=32,embedding_bits=4"


def saved(text, model, folder):
    original = model
    for technique in parse(text).techniques:
        model = technique.apply(model, Context(reference=original))
    variants.save(model, folder, {"recipe": text})
    return folder


def started(folder, threads=1):
    """The engine on the export that the runtimes make of a variant."""
    return LlamaCpp(runtimes.exported("llamacpp", folder).folder, threads)


@pytest.fixture
def engine(new_model, tmp_path):
    """The tiny Llama at 4 bits."""
    made = started(saved(INT4, new_model("llama"), tmp_path / "variant"))
    yield made
    made.close()


def divergence(engine, torch_model, ids=IDS):
    """Mean Kullback-Leibler divergence of the next token from PyTorch to the engine, nats."""
    p, q = (runtime.logits(ids).float().log_softmax(-1) for runtime in (torch_model, engine))
    return functional.kl_div(q, p, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize(
    ("text", "bound", "kernel"),
    [
        ("none", 1e-5, "ggml F32 (float32 activations)"),
        ("quantize.fp16", 1e-4, "ggml F16 (float16 activations)"),
        ("quantize.bf16", 5e-3, "ggml BF16 (bfloat16 activations)"),
        (INT4, 5e-3, "ggml Q4_1 (int8 activations)"),
        (
            "quantize.rtn:bits=4,symmetric=true",
            5e-3,
            "ggml Q4_0 (int8 activations) + F32 (float32 activations)",
        ),
        ("quantize.rtn:bits=5,embedding_bits=5", 5e-3, "ggml Q5_1 (int8 activations)"),
        (
            "quantize.rtn:bits=5,symmetric=true,embedding_bits=8",
            5e-3,
            "ggml Q8_0 (int8 activations) + Q5_0 (int8 activations)",
        ),
        (
            "quantize.rtn:bits=8,group_size=0,symmetric=true",
            5e-3,
            "ggml Q8_0 (int8 activations) + F32 (float32 activations)",
        ),
        ("quantize.rtn:bits=6", 5e-3, "ggml Q8_0 (int8 activations) + F32 (float32 activations)"),
        ("quantize.rtn:bits=3", 5e-3, "ggml Q4_1 (int8 activations) + F32 (float32 activations)"),
        ("quantize.hqq:bits=4", 5e-3, "ggml Q4_1 (int8 activations) + F32 (float32 activations)"),
        ("quantize.binary", 5e-3, "ggml Q4_1 (int8 activations) + F32 (float32 activations)"),
        ("quantize.ternary", 5e-3, "ggml Q4_0 (int8 activations) + F32 (float32 activations)"),
    ],
)
def test_logits_are_those_of_pytorch(text, bound, kernel, new_model, tmp_path):
    folder = saved(text, new_model("llama"), tmp_path / "variant")
    engine = started(folder)
    assert set(engine.kernel.removeprefix("ggml ").split(" + ")) == set(
        kernel.removeprefix("ggml ").split(" + ")
    )
    assert (engine.badge, engine.model, engine.cache_bits) == ("runtime", None, 16)
    assert divergence(engine, Simulated(folder)) < bound
    engine.close()


def test_the_wrong_weights_are_noticed(engine, new_model, tmp_path):
    other = saved("quantize.rtn:bits=3,group_size=32", new_model("llama"), tmp_path / "other")
    assert divergence(engine, Simulated(other)) > 0.1


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"num_hidden_layers": 1}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}),
        ("llama", {"intermediate_size": 96}),
        ("llama", {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    ],
)  # fmt: skip
def test_other_shapes(layout, changes, new_model, tmp_path):
    folder = saved("none", new_model(layout, **changes), tmp_path / "variant")
    engine = started(folder)
    assert divergence(engine, Simulated(folder)) < 1e-5
    engine.close()


def test_layers_of_different_sizes(new_model, tmp_path):
    """As pruning leaves them: fewer MLP channels, heads and key-value heads in the second layer than in the first."""
    model = new_model("llama")
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    kept = {
        "gate_proj": (mlp, 96),
        "up_proj": (mlp, 96),
        "q_proj": (attention, 32),
        "k_proj": (attention, 16),
    }
    for name, (owner, rows) in (kept | {"v_proj": (attention, 16)}).items():
        layer = getattr(owner, name)
        layer.weight, layer.out_features = nn.Parameter(layer.weight[:rows].clone()), rows
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :96].clone())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :32].clone())
    gguf.write_model(model, tmp_path, tmp_path / FILE, "tiny", "by hand")
    engine = LlamaCpp(tmp_path, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            engine.logits(IDS), model(torch.tensor([IDS])).logits[0], rtol=0, atol=0.05
        )
    engine.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_any_token_continues_the_sequence(threads, new_model, tmp_path):
    folder = saved("none", new_model("llama"), tmp_path / "variant")
    engine, torch_model = started(folder, threads), Simulated(folder)
    assert engine.prefill(IDS[:20]) == torch_model.prefill(IDS[:20])
    for token in IDS[20:40]:  # not those that were most likely
        assert engine.decode(token) == torch_model.decode(token)
    written = [engine.prefill(IDS[:20])]
    for _ in range(20):
        written.append(engine.decode(written[-1]))
    expected = [torch_model.prefill(IDS[:20])]
    for _ in range(20):
        expected.append(torch_model.decode(expected[-1]))
    assert written == expected
    engine.close()


def test_top_and_logits_start_anew(engine):
    engine.prefill(IDS[5:30])
    row = engine.logits(IDS)[-1].log_softmax(-1)
    likely = engine.top(IDS, 20)
    assert [token for token, _ in likely] == row.topk(20).indices.tolist()
    assert [value for _, value in likely] == pytest.approx(row.topk(20).values.tolist(), abs=1e-4)
    assert engine.prefill(IDS) == likely[0][0]


def test_a_sequence_may_outgrow_the_context(new_model, tmp_path):
    folder = saved("none", new_model("llama", num_hidden_layers=1), tmp_path / "variant")
    engine, torch_model = started(folder), Simulated(folder)
    ids = torch.randint(0, 300, (CONTEXT + 10,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.prefill(ids[: CONTEXT - 5])
    grown = [engine.decode(token) for token in ids[CONTEXT - 5 :]]
    logits = torch_model.logits(ids)
    assert grown == logits[CONTEXT - 5 :].argmax(-1).tolist()
    assert (engine.logits(ids) - logits).abs().max() < 0.05
    engine.close()


def test_own_timings_are_part_of_ours(engine):
    """llama.cpp's clock runs inside ours, so that its rates are at least ours; that they agree, `benchmarks/` says."""
    started = time.perf_counter()
    engine.prefill(IDS)
    prefill_s = time.perf_counter() - started
    assert engine.own_timings().keys() == {"prefill_tok_s"}
    started = time.perf_counter()
    for token in IDS:
        engine.decode(token)
    decode_s = time.perf_counter() - started
    own = engine.own_timings()
    assert own["prefill_tok_s"] >= 0.999 * len(IDS) / prefill_s
    assert own["decode_tok_s"] >= 0.999 * len(IDS) / decode_s


def test_a_token_beyond_the_vocabulary_is_refused(engine):
    with pytest.raises(SessionError, match="have to be below 300, and these go up to 300"):
        engine.prefill([5, 300])
    assert engine.prefill(IDS) == engine.top(IDS, 1)[0][0]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "absent"])
def test_a_file_that_is_none_is_refused_in_silence(damage, new_model, tmp_path, capfd):
    folder = runtimes.exported("llamacpp", saved(INT4, new_model("llama"), tmp_path / "variant")).folder
    file = folder / FILE
    content = file.read_bytes()
    if damage == "absent":
        file.unlink()
    else:
        file.write_bytes(
            content[: len(content) // 2] if damage == "truncated" else b"PK\x03\x04" + content[4:]
        )
    with pytest.raises(
        RuntimeRefused, match=r"llama\.cpp cannot load .*llamacpp-1, changed since it was written"
    ):
        LlamaCpp(folder, 1)
    assert capfd.readouterr() == ("", "")


def test_a_fresh_export_that_llama_cpp_does_not_load_is_not_advised_to_be_written_again(
    new_model, tmp_path, monkeypatch
):
    """A Qwen3 with biases, were it not refused before: llama.cpp has no place for them."""
    monkeypatch.setattr("edgelab.runtimes.gguf.refusal", lambda about: None)
    folder = saved("none", new_model("qwen3", attention_bias=True), tmp_path / "variant")
    for _ in range(2):
        with pytest.raises(RuntimeRefused, match=r"wrong number of tensors.*use 'torch'") as refused:
            runtimes.load("llamacpp", folder)
        assert "remove" not in str(refused.value)


@pytest.mark.parametrize("taken", [False, True])
def test_nothing_is_said_on_the_way(taken, new_model, tmp_path, capfd):
    """Also where somebody else, as llama.cpp's own server does, has taken the log of the process."""
    if taken:
        llama_c.library().llama_log_set(
            llama_c.Logger(), None
        )  # none of ours: llama.cpp writes to stderr itself
    engine = started(saved(INT4, new_model("llama"), tmp_path / "variant"))
    engine.prefill(IDS)
    engine.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("native.int8", "not native.int8; use quantize.rtn"),
        ("quantize.kv", "run quantize.kv on torch"),
        ("quantize.dynamic", "rounds inputs on a grid of its own"),
        ("quantize.nf4", "no type for the codebook of model.layers.0"),
        ("quantize.rtn:bits=8", "use symmetric=true"),
    ],
)
def test_refusals(text, sentence, new_model, tmp_path):
    folder = saved(text, new_model("llama"), tmp_path / "variant")
    with pytest.raises(RuntimeRefused, match=sentence):
        runtimes.exported("llamacpp", folder)


def test_without_the_package_one_sentence(new_model, monkeypatch):
    llama_c.opened.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(EngineMissing, match=r"pip install --editable '.\[runtimes\]'"):
        llama_c.library()
    # the table of recipes and runtimes is made where no engine is installed
    assert LlamaCpp.refusal(variants.describe(new_model("llama"))) is None


def test_another_layout_is_refused(monkeypatch):
    llama_c.opened.cache_clear()
    monkeypatch.setitem(llama_c.DEFAULTS, "n_batch", 4096)
    with pytest.raises(LlamaError, match="another layout"):
        llama_c.library()


def test_the_second_form_of_the_gate(new_model, tmp_path):
    asked = parity.prompts(torch.randint(0, 300, (3000,), generator=torch.Generator().manual_seed(0)))
    folder = saved("none", new_model("llama"), tmp_path / "variant")
    expected = list(parity.answers(Simulated(folder), asked))
    for text, passes in {"none": True, INT4: False}.items():
        engine = started(saved(text, new_model("llama"), tmp_path / text))
        assert parity.by_answers(list(parity.answers(engine, asked)), expected).passed == passes
        engine.close()


@pytest.mark.embedded
def test_the_embedded_model_passes_the_gate_with_our_integers_and_fails_with_others(tmp_path):
    """4 windows of 512 tokens: 8-bit inputs cost 0.003 nats and 4 % of the tokens, one bit of the weights far more."""
    source = reference.resolve()
    windows = corpora.tokenize("wiki", reference.load_tokenizer(source)).ids[: 4 * 512].reshape(4, 512)
    cut = [Window(ids, 1, 511) for ids in windows]
    variant, other = (
        saved(
            f"quantize.rtn:bits={bits} + quantize.embedding",
            reference.load_model(source),
            tmp_path / f"{bits}",
        )
        for bits in (4, 3)
    )
    twin = Simulated(variant)
    for folder, passes in ((variant, True), (other, False)):
        engine = started(folder)
        verdict = parity.by_logits(logit_slices(engine.logits, cut), slices(twin.model, cut))
        assert verdict.passed == passes, verdict.detail
        engine.close()
