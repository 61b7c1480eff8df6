"""The compiled decode step: the same tokens as eager, one graph for all of them, and its seconds in their own column.

Most tests let the traced graph run as it is (backend "eager"): tracing takes seconds, compiling C++ far longer.
"""

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from edgelab import runtimes
from edgelab.lab.bench import Bench
from edgelab.recipes import Context, parse
from edgelab.runtimes import load
from edgelab.runtimes.compiled import PAGE, Compiled, CompileError, use_compiler
from edgelab.runtimes.eager import Eager
from edgelab.storage import variants

IDS = list(range(5, 25))
INT8 = "quantize.rtn:bits=8,group_size=0,embedding_bits=8"


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced, not turned into C++; none is left over from another test."""
    monkeypatch.setattr(Compiled, "backend", "eager")
    torch._dynamo.reset()
    counters.clear()


def variant(text, model, folder):
    for technique in parse(text).techniques:
        model = technique.apply(model, Context())
    variants.save(model, folder, {})
    return folder


def same_tokens(compiled, eager, ids, count=8):
    """Both go on from `ids`, fed with eager's tokens."""
    mine, theirs = [compiled.prefill(ids)], [eager.prefill(ids)]
    for _ in range(count):
        mine.append(compiled.decode(theirs[-1]))
        theirs.append(eager.decode(theirs[-1]))
    return mine == theirs


def test_tokens_are_those_of_eager_from_one_graph(layout, new_model, tmp_path, traced):
    folder = variant(INT8, new_model(layout, num_hidden_layers=1), tmp_path / "variant")
    compiled, eager = load("compiled", folder), Eager(folder)
    assert isinstance(compiled, Compiled)
    assert (compiled.badge, compiled.kernel) == ("packed", f"compiled, {eager.kernel}")
    assert compiled.compile() > 0
    assert same_tokens(compiled, eager, IDS)
    assert same_tokens(compiled, eager, IDS[::-1])  # a new sequence, of the same graph
    assert counters["stats"]["unique_graphs"] == 1


def test_weights_without_a_kernel_are_unpacked_inside_the_graph(new_model, tmp_path, traced):
    folder = variant("quantize.rtn:bits=8,group_size=32", new_model("llama"), tmp_path / "variant")
    compiled = Compiled(folder)
    assert compiled.kernel == "compiled, unpacked when used, float32"
    assert same_tokens(compiled, Eager(folder), IDS)


def test_a_sequence_that_outgrows_the_cache_goes_on_in_a_longer_one(new_model, tmp_path, traced):
    folder = variant("none", new_model("llama", num_hidden_layers=1), tmp_path / "variant")
    compiled, eager = Compiled(folder), Eager(folder)
    assert same_tokens(compiled, eager, IDS * 6, count=PAGE - len(IDS * 6) + 4)
    assert same_tokens(compiled, eager, IDS * 20)  # a long prompt from the start


def test_inductor_gives_the_same_tokens_and_its_seconds_go_into_the_row(new_model, tmp_path, home):
    torch._dynamo.reset()
    folder = variant("none", new_model("llama", num_hidden_layers=1), tmp_path / "variant")
    compiled = Compiled(folder)
    assert same_tokens(compiled, Eager(folder), IDS)
    assert list((home / "inductor").rglob("*.cpp"))  # what the next process finds


@pytest.mark.parametrize(("runtime", "compiles"), [("compiled", True), ("torch", False)])
def test_seconds_of_compiling_have_their_own_column(runtime, compiles, tiny, traced):
    bench = Bench(f"none @ {runtime}", str(tiny), seed=0)
    bench.build()
    found = bench.open()
    assert (found["compile_s"] is not None) == compiles
    assert found["load_s"] > 0


def test_without_a_compiler_one_sentence_says_what_to_install(monkeypatch, tiny, tmp_path):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with pytest.raises(CompileError, match=r"install g\+\+"):
        use_compiler()
    with pytest.raises(CompileError, match=r"install g\+\+"):
        Compiled(tmp_path)


def test_a_quantized_cache_is_refused(new_model, tmp_path):
    folder = variant("quantize.kv:bits=8", new_model("llama"), tmp_path / "variant")
    with pytest.raises(runtimes.RuntimeRefused, match="runs on 'torch'"):
        runtimes.load("compiled", folder)


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("falcon", {"alibi": True}, r"no one graph over a cache of fixed length \(.*\); use 'torch'"),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "no one graph over a cache of fixed length"),
        ("mamba", {}, "a mamba model keeps a state; use 'torch'"),
    ],
    ids=["alibi", "learned positions", "state"],
)
def test_a_model_that_cannot_be_one_graph_is_refused(layout, changes, words, new_model, tmp_path, traced):
    with pytest.raises(CompileError, match=words):
        Compiled(variant("none", new_model(layout, **changes), tmp_path / "variant")).compile()
