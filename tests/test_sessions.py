"""Sessions go on and go back: every engine that is installed, on a tiny model, against a reading from the start."""

import importlib.util

import pytest
import torch
import torch._dynamo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelab import runtimes
from edgelab.runtimes.compiled import PAGE, Compiled
from edgelab.runtimes.eager import Eager, Simulated
from edgelab.runtimes.layers import LayerSession
from edgelab.runtimes.session import Session, SessionError
from edgelab.storage import variants

LAYOUTS = ("llama", "qwen3", "gemma", "phi", "stablelm")
IDS = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
OTHER = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
INT4 = "quantize.rtn:bits=4,group_size=32 + quantize.embedding:bits=4"
ENGINES = [
    ("torch", "none"),
    ("torch", INT4),
    ("simulated", INT4),
    ("compiled", "none"),
    ("onnxruntime", "none"),
    ("onnxruntime", INT4),
    ("openvino", "quantize.fp16"),
    ("openvino", INT4),
    ("llamacpp", "none"),
    ("llamacpp", INT4),
    ("executorch", "none"),
    ("executorch", "native.int8"),
    ("litert", "none"),
    ("litert", "native.int8"),
]
MODULES = {"executorch": "executorch", "litert": "ai_edge_litert", "llamacpp": "xllamacpp"}


@pytest.fixture(params=ENGINES, ids=lambda pair: f"{pair[0]}-{pair[1].partition(':')[0]}")
def session(request, variant, monkeypatch):
    name, text = request.param
    if importlib.util.find_spec(MODULES.get(name, name)) is None and name not in ("simulated", "compiled"):
        pytest.skip(f"{name} is not installed here")
    monkeypatch.setattr(Compiled, "backend", "eager")
    torch._dynamo.reset()
    made = runtimes.load(name, variant(text))
    yield made
    made.close()


def apart(session: Session, found, expected):
    """Root-mean-square distance in standard deviations of the logits, as a share of what the runtime allows."""
    return ((found - expected).pow(2).mean().sqrt() / expected.std() / session.tolerance).item()


def test_pieces_and_going_back_give_the_logits_of_the_whole(session):
    whole = session.logits(IDS)
    assert whole.shape == (40, 300) and whole.dtype == torch.float32 and session.length == 40
    assert session.prefill(IDS[:10]) == session.top(IDS[:10], 1)[0][0]
    assert apart(session, session.extend(IDS[10:17]), whole[10:17]) < 1
    session.decode(IDS[17])
    session.rewind(3)  # a step of writing and two of reading
    assert session.length == 15
    assert apart(session, session.extend(IDS[15:16]), whole[15:16]) < 1
    session.extend(OTHER)  # another way to go on, and back
    session.rewind(len(OTHER))
    assert apart(session, session.extend(IDS[16:]), whole[16:]) < 1
    session.rewind(40)
    assert session.length == 0
    assert apart(session, session.extend(IDS), whole) < 1


def test_a_model_that_keeps_a_state_goes_on_and_back(variant):
    """Jamba: a state in the first layer, keys and values in the second."""
    mixed = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
    session = Eager(variant("none", "jamba", **mixed))
    whole = session.logits(IDS)
    session.prefill(IDS[:10])
    assert apart(session, session.extend(IDS[10:17]), whole[10:17]) < 1
    session.extend(OTHER)
    session.rewind(len(OTHER))
    (found,) = session.continuations([IDS[17:20]])
    expected = whole[16:19].log_softmax(-1).gather(1, torch.tensor(IDS[17:20])[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert apart(session, session.extend(IDS[17:]), whole[17:]) < 1


@pytest.mark.parametrize(
    ("layout", "changes"), [("mamba", {}), ("openai-gpt", {"n_embd": 64, "n_layer": 2, "n_head": 4})]
)
def test_a_model_that_does_not_go_on_from_keys_and_values_says_so(variant, layout, changes):
    session = Eager(variant("none", layout, **changes))
    assert session.logits(IDS).shape == (40, 300)
    with pytest.raises(SessionError, match=f"A {layout} model does not go on .* use only=quality"):
        session.decode(5)


CANDIDATES = [OTHER[:5], OTHER[5:6], IDS[20:23], OTHER[:5]]


def test_continuations_are_what_the_logits_say_and_leave_the_sequence(session):
    session.prefill(IDS[:15])
    found = session.continuations(CANDIDATES)
    assert session.ids == IDS[:15]
    again = session.extend(IDS[15:20])
    for candidate, log_probs in zip(CANDIDATES, found, strict=True):
        logits = session.logits(IDS[:15] + candidate)[14:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(candidate)[:, None])[:, 0]
        assert log_probs.shape == (len(candidate),)
        assert (log_probs - expected).abs().max() < 5 * session.tolerance * logits.std()
    assert apart(session, again, session.logits(IDS[:20])[15:]) < 1


def test_a_sequence_is_put_by_and_gone_on_with(session):
    if not session.can.sequences:
        with pytest.raises(SessionError, match="This engine holds one sequence"):
            session.exchange()
        return
    whole, other = session.logits(IDS), session.logits(OTHER)
    session.prefill(IDS[:20])
    first = session.exchange()
    assert (session.length, first.ids) == (0, IDS[:20])
    session.prefill(OTHER[:9])
    second = session.exchange(first)
    assert session.ids == IDS[:20] and second.kept.nbytes > 0
    assert apart(session, session.next_logits(), whole[19:20]) < 1
    assert apart(session, session.extend(IDS[20:]), whole[20:]) < 1
    session.exchange(second)
    assert apart(session, session.extend(OTHER[9:]), other[9:]) < 1


@pytest.mark.parametrize(
    ("text", "layout", "changes"),
    [
        ("none", "llama", {}),
        ("none", "mistral", {"sliding_window": 8}),
        ("quantize.kv:bits=8,group_size=8,residual=8", "llama", {}),
    ],
)
def test_a_fork_and_its_origin_go_their_own_ways(text, layout, changes, variant):
    session = runtimes.load("torch", variant(text, layout, **changes))
    expected = []
    for count, more in ((5, OTHER[:15]), (0, IDS[30:])):
        session.prefill(IDS[:30])
        session.rewind(count)
        expected.append(session.extend(more))
    session.prefill(IDS[:30])
    origin = session.exchange()
    session.exchange(origin.fork())
    session.rewind(5)
    found = [session.extend(OTHER[:15])]
    session.exchange(origin)
    found.append(session.extend(IDS[30:]))
    assert session.ids == IDS
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_state_is_put_by_and_not_forked(variant):
    mixed = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
    session = Eager(variant("none", "jamba", **mixed))
    whole = session.logits(IDS)
    session.prefill(IDS[:10])
    first = session.exchange()
    assert first.fork() is None
    session.prefill(OTHER)
    session.exchange(first)
    assert apart(session, session.extend(IDS[10:]), whole[10:]) < 1


def test_what_a_sequence_cannot_do_is_refused_in_one_sentence(session):
    with pytest.raises(SessionError, match="nothing to continue yet"):
        session.continuations(CANDIDATES)
    session.prefill(IDS)
    with pytest.raises(SessionError, match="41 tokens cannot be taken back from a sequence of 40"):
        session.rewind(41)
    with pytest.raises(SessionError, match="below 300, and these go up to 300"):
        session.extend([3, 300])
    with pytest.raises(SessionError, match="at least one token"):
        session.extend([])
    session.rewind(0)
    assert session.ids == IDS


def test_a_batch_of_continuations_is_one_after_the_other(variant):
    eager = runtimes.load("torch", variant("none"))
    eager.prefill(IDS[:20])
    eager.rewind(4)  # the logits after the last token are gone, too
    batch = eager.continuations(CANDIDATES)
    one_by_one = Session.continuations(eager, CANDIDATES)
    for found, expected in zip(batch, one_by_one, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def layouts(new_model, tmp_path_factory):
    """Every layout as a variant on disk and as a model in memory."""
    made = {}
    for layout in LAYOUTS:
        model = new_model(layout, num_hidden_layers=3)
        folder = tmp_path_factory.mktemp("variants") / layout
        variants.save(model, folder, {"recipe": "none"})
        made[layout] = folder, model
    return made


STEPS = st.lists(st.tuples(st.sampled_from(["extend", "rewind", "decode"]), st.integers(1, 12)), max_size=8)


@given(steps=STEPS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_way_to_a_sequence_gives_its_logits(steps, layout, layouts):
    eager = Eager(layouts[layout][0])
    for step, count in steps:
        if step == "rewind":
            eager.rewind(min(count, eager.length))
        elif step == "decode":
            eager.decode(OTHER[count])
        else:
            eager.extend(OTHER[-count:])
    ids = [*eager.ids, *IDS[:3]]
    whole = Eager.logits(Eager(layouts[layout][0]), ids)
    torch.testing.assert_close(eager.extend(IDS[:3]), whole[-3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("layout", "changes"), [
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}),
    ("mistral", {"sliding_window": 8}),
])  # fmt: skip
def test_a_window_that_has_moved_on_is_read_again(layout, changes, variant):
    eager = runtimes.load("torch", variant("none", layout, **changes))
    whole = eager.logits(IDS)
    eager.extend(OTHER[:3])
    eager.rewind(13)
    torch.testing.assert_close(eager.extend(IDS[30:]), whole[30:], rtol=0, atol=1e-4)


def test_a_quantized_cache_gives_back_what_is_not_packed_and_reads_again_what_is(variant):
    """A piece sees itself before it is rounded, so that other pieces give other logits: the same pieces, the same."""
    eager = runtimes.load("torch", variant("quantize.kv:bits=8,group_size=8,residual=8"))
    eager.prefill(IDS[:30])
    expected = eager.extend(IDS[30:34])
    for count in (4, 20):  # of the recent tokens; more than those
        eager.prefill(IDS[:30])
        eager.extend(OTHER[:count])
        eager.rewind(count)
        assert eager.length == 30
        torch.testing.assert_close(eager.extend(IDS[30:34]), expected, rtol=0, atol=0.3)
    assert eager.continuations([IDS[:3], IDS[:2]])[1].shape == (2,) and eager.length == 34


def test_a_compiled_sequence_outgrows_its_page_in_reading_too(variant, monkeypatch):
    monkeypatch.setattr(Compiled, "backend", "eager")
    torch._dynamo.reset()
    folder = variant("none", num_hidden_layers=1)
    compiled, eager = runtimes.load("compiled", folder), runtimes.load("torch", folder)
    long = IDS * (PAGE // 40 + 2)
    whole = eager.logits(long)
    compiled.prefill(long[:20])
    torch.testing.assert_close(compiled.extend(long[20:]), whole[20:], rtol=0, atol=1e-4)
    compiled.rewind(len(long) - 10)
    torch.testing.assert_close(compiled.extend(long[10:13]), whole[10:13], rtol=0, atol=1e-4)


# Some of the layers


def test_three_parts_are_the_whole_model(layout, layouts):
    folder, model = layouts[layout]
    whole = Eager(folder).logits(IDS)
    parts = [LayerSession(folder, 0, 1), LayerSession(model, 1, 2), LayerSession(folder, 2, 3)]

    def extend(inputs):
        for part in parts:
            inputs = part.extend(inputs)
        return inputs

    assert parts[0].extend(IDS[:2]).shape == (2, 64)
    parts[0].rewind(2)
    torch.testing.assert_close(extend(IDS[:25]), whole[:25], rtol=0, atol=1e-4)
    for part in parts:
        part.rewind(7)
    torch.testing.assert_close(extend(IDS[18:19]), whole[18:19], rtol=0, atol=1e-4)
    extend(OTHER)
    for part in parts:
        part.rewind(len(OTHER))
    torch.testing.assert_close(extend(IDS[19:]), whole[19:], rtol=0, atol=1e-4)
    assert [part.length for part in parts] == [40, 40, 40]
    torch.testing.assert_close(Simulated(folder).logits(IDS), whole)  # the model given is as it was
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor([IDS])).logits[0], whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("text", [INT4, "quantize.dynamic", "quantize.kv:bits=8,group_size=8,residual=8"])
def test_halves_of_a_packed_model_stay_packed(text, variant):
    folder = variant(text)
    whole = Eager(folder)
    first, second = LayerSession(folder, 0, 1), LayerSession(folder, 1, 2)
    assert first.kernel in whole.kernel
    expected = whole.logits(IDS[:8])
    found = second.extend(first.extend(IDS[:8]))
    assert (found - expected).abs().max() < 1e-4
    for part in (first, second):
        part.extend(torch.randn(20, 64))
        part.rewind(20)
    found = second.extend(first.extend(IDS[8:12]))
    assert (found - whole.extend(IDS[8:12])).abs().max() < 0.1 * found.std()


def test_a_part_holds_the_weights_of_its_layers_and_ends_alone(new_model):
    model = new_model("llama", num_hidden_layers=4)
    middle = LayerSession(model, 1, 3)
    held = {name for name, _ in middle.model.named_parameters()}
    assert held == {name for name in held if name.startswith(("model.layers.0.", "model.layers.1."))}
    kept = middle.model.model.layers[0].mlp.up_proj.weight
    assert kept.data_ptr() == model.model.layers[1].mlp.up_proj.weight.data_ptr()
    assert "lm_head.weight" not in dict(LayerSession(model, 0, 2).model.named_parameters())


def test_what_layers_cannot_do_is_refused(new_model):
    model = new_model("llama")
    for first, last in ((0, 3), (1, 1), (-1, 1)):
        with pytest.raises(SessionError, match="no part of a model of 2 layers"):
            LayerSession(model, first, last)
    second = LayerSession(model, 1, 2)
    with pytest.raises(SessionError, match="take hidden states, not tokens"):
        second.extend(IDS)
    with pytest.raises(SessionError, match="1 tokens cannot be taken back from a sequence of 0"):
        second.rewind(1)
