"""LongRoPE: texts of up to so many tokens have the short factors, longer ones the long ones, in all their tokens."""

import pytest
import torch
from transformers import DynamicCache

from edgelab import runtimes
from edgelab.deployments.partition.stage import Stage
from edgelab.model.logits import LogitsError, hidden_states, short_text
from edgelab.recipes import Context, parse
from edgelab.runtimes.eager import Eager
from edgelab.runtimes.layers import LayerSession
from edgelab.storage import variants

ROUNDED_CACHE = 0.3  # of a standard deviation, for keys and values that an engine keeps in few bits
ENGINES = [("torch", 64), ("openvino", 64), ("llamacpp", 256)]  # whose contexts come in steps of 256 tokens
IDS = torch.randint(2, 300, (300,), generator=torch.Generator().manual_seed(7)).tolist()
OTHERS = r"more than 64 tokens have other rotary frequencies .*, and 60 tokens were read"


@pytest.fixture
def model(new_model):
    """`model(short)`: a model that changes its frequencies behind so many tokens."""

    def make(short):
        factors = {"short_factor": [1.0 + place / 5 for place in range(8)], "long_factor": [4.0] * 8}
        scaling = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": short}
        return new_model("phi3", original_max_position_embeddings=short, rope_parameters=scaling | factors)

    return make


def expected(model, length):
    """Logits of a text read as a whole, (length, vocabulary)."""
    with torch.inference_mode():
        return model(torch.tensor([IDS[:length]])).logits[0]


@pytest.mark.parametrize(("engine", "short"), ENGINES)
def test_a_text_that_grows_or_shrinks_past_the_change_is_read_again(
    engine, short, model, tmp_path, byte_tokenizer
):
    made = model(short)
    if engine != "torch":
        pytest.importorskip({"llamacpp": "xllamacpp"}.get(engine, engine))
    variants.save(made, tmp_path, {"recipe": "none"}, byte_tokenizer)
    running = runtimes.load(engine, tmp_path)
    exact = 1e-4 if engine != "llamacpp" else 0.05  # its keys and values are float16

    def apart(found, length):
        """Largest distance of the last logits of a text, in standard deviations."""
        wanted = expected(made, length)[-len(found) :]
        return (found - wanted).abs().max() / wanted.std()

    assert running.short == short and apart(running.logits(IDS[: short + 26]), short + 26) < exact
    running.prefill(IDS[: short - 1])
    for length in range(short, short + 4):
        running.decode(IDS[length - 1])
        assert apart(running.next_logits(), length) < (exact if engine == "torch" else ROUNDED_CACHE)
    assert apart(running.extend(IDS[short + 3 : short + 12]), short + 12) < exact
    running.rewind(20)
    assert apart(running.extend(IDS[short - 8 : short]), short) < exact
    assert apart(running.extend(IDS[short : short + 16]), short + 16) < exact
    running.close()


def test_candidates_are_weighed_across_the_change(model):
    running = Eager(made := model(64))
    running.prefill(IDS[:62])
    candidates = [IDS[62:64], IDS[62:70], [5]]
    for found, candidate in zip(running.continuations(candidates), candidates, strict=True):
        ids = torch.tensor([IDS[:62] + candidate])
        with torch.inference_mode():
            wanted = made(ids[:, :-1]).logits[0].log_softmax(-1)
        # Up to 64 tokens are read with the short factors: the first log-probability is of 62 of them.
        first = expected(made, 62)[-1].log_softmax(-1)[candidate[0]]
        assert found[0] == pytest.approx(float(first), abs=1e-3)
        rest = wanted[62:].gather(1, torch.tensor(candidate[1:])[:, None].long())[:, 0]
        torch.testing.assert_close(found[1:], rest, rtol=0, atol=1e-3)
    assert running.length == 62


def test_what_cannot_read_a_text_again_refuses_to_go_on(model):
    made = model(64)
    assert short_text(made.config) == 64
    cache = DynamicCache(config=made.config)
    with torch.inference_mode():
        hidden_states(made, torch.tensor([IDS[:60]]), cache)
        hidden_states(made, torch.tensor([IDS[:300]]), DynamicCache(config=made.config))
        with pytest.raises(LogitsError, match=OTHERS):
            hidden_states(made, torch.tensor([IDS[60:70]]), cache)
    layers = LayerSession(made, 0, 1)
    layers.extend(IDS[:60])
    with pytest.raises(LogitsError, match=OTHERS):
        layers.extend(IDS[60:70])
    stage = Stage(made, 0, 2)
    stage.read(torch.tensor(IDS[:60]), 0)
    with pytest.raises(LogitsError, match=OTHERS):
        stage.read(torch.tensor(IDS[60:70]), 60)
    stage.read(torch.tensor(IDS[:70]), 0, request=1)


def test_a_cache_that_is_packed_piece_by_piece_takes_shorter_texts_alone(model):
    made = model(64)
    running = Eager(parse("quantize.kv:bits=8").techniques[0].apply(made, Context(reference=made)))
    assert running.logits(IDS[:64]).shape == (64, 300)
    with pytest.raises(LogitsError, match="read the whole text at once, or a shorter one"):
        running.logits(IDS[:70])
