"""Split inference: bytes by cut, a model in several pieces, and what rounding at a cut does to its NLL."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from edgelab.deployments.hybrid import split
from edgelab.deployments.hybrid.split import FORMATS, cut_behind, delta_nll, payload_bytes, through
from edgelab.deployments.partition.stage import StageError, chain_of, generate, read_through
from edgelab.deployments.partition.wire import WireError, encoded
from edgelab.devices.shapes import ModelShape
from edgelab.runtimes.eager import Eager

IDS = [5, 100, 42, 7, 299, 12, 8]


def states_of(seed, tokens=3, hidden=64):
    """States of any size, with one channel a hundred times as large."""
    states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))
    states[:, seed % hidden] *= 100
    return states * 10.0 ** (seed % 7 - 3)


@pytest.mark.parametrize("wire", FORMATS)
@given(st.integers(0, 10_000))
def test_what_arrives_says_how_far_off_it_may_be(wire, seed):
    states = states_of(seed)
    arrived = through(states, wire)
    bound = split.rounding_bound(arrived, wire)
    assert ((arrived - states).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize("wire", FORMATS[1:])
def test_some_numbers_are_as_far_off_as_they_may_be(wire):
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    arrived = through(states, wire)
    assert ((arrived - states).abs() / split.rounding_bound(arrived, wire)).max() > 0.8


def test_a_format_that_is_none_has_no_bound_and_no_bytes():
    for ask in (
        lambda: payload_bytes(64, "int2"),
        lambda: split.rounding_bound(torch.ones(1, 4), "int2"),
    ):
        with pytest.raises(WireError, match="wire=int2 is no format; there are float32, float16, int8, int4"):
            ask()


def test_every_cut_sends_the_same_but_for_the_last(new_model):
    shape = ModelShape.from_config(new_model("llama", num_hidden_layers=3).config)
    found = split.traffic(shape, "int4", prompt_tokens=10)
    state = 32 + 2 * 2
    assert [one.cut for one in found] == [0, 1, 2, 3]
    assert [one.prompt_bytes for one in found] == [10 * state, 10 * state, 10 * state, state]
    assert {(one.token_bytes, one.answer_bytes) for one in found} == {(state, 4)}


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_model_that_is_cut_is_the_model(cut, new_model, layout):
    model = new_model(layout, num_hidden_layers=3)
    whole, stages = Eager(model), cut_behind(model, [cut])
    found = read_through(stages, torch.tensor(IDS), 0, request=1)
    torch.testing.assert_close(found, whole.logits(IDS)[-1], rtol=1e-4, atol=1e-4)
    expected = [whole.prefill(IDS)]
    expected += [whole.decode(expected[-1]) for _ in range(1)]
    assert generate(stages, IDS, 2) == expected


@pytest.mark.parametrize("wire", FORMATS)
def test_an_edge_sends_what_traffic_says(wire, new_model):
    model = new_model("llama", num_hidden_layers=3)
    shape = ModelShape.from_config(model.config)
    for expected in split.traffic(shape, wire, prompt_tokens=5):
        edge, _ = cut_behind(model, [expected.cut])
        assert len(encoded(edge.read(torch.tensor(IDS[:5]), 0), wire)) == expected.prompt_bytes
        assert len(encoded(edge.read(torch.tensor(IDS[5:6]), 5), wire)) == expected.token_bytes


def test_stages_share_the_weights_of_a_model_that_stays_whole(new_model, layout):
    model = new_model(layout, num_hidden_layers=3)
    before = Eager(model).logits(IDS)
    stages = cut_behind(model, [0, 2])
    assert [(stage.first, stage.last) for stage in stages] == [(0, 1), (1, 3), (3, 5)]
    ours = {one.data_ptr() for one in model.parameters()}
    theirs = [{one.data_ptr() for one in stage.model.parameters()} for stage in stages]
    assert all(some <= ours for some in theirs)
    assert len(theirs[1]) < len(ours)
    assert torch.equal(Eager(model).logits(IDS), before)


def windows_of(story, count=2, length=70):
    return [story.ids[place * length : (place + 1) * length] for place in range(count)]


@torch.inference_mode()
def nll_of(model, ids):
    logits = model(input_ids=ids[None, :-1]).logits[0]
    return float(functional.cross_entropy(logits, ids[1:], reduction="sum"))


def test_float32_changes_nothing(new_model, layout, story):
    model = new_model(layout, num_hidden_layers=3)
    windows = windows_of(story)
    found = delta_nll(chain_of(model, [1, 3]), windows, ["float32"])
    assert [(one.cut, one.wire) for one in found] == [(0, "float32"), (2, "float32")]
    for one in found:
        assert one.nll == one.baseline
        assert one.delta_nll == 0
        assert one.tokens == [69, 69]
        assert one.baseline == pytest.approx([nll_of(model, ids) for ids in windows], rel=1e-5)


@pytest.mark.parametrize("wire", FORMATS[1:])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_rounding_is_that_of_a_model_whose_states_are_rounded(cut, wire, new_model, story):
    """The same model, with a hook that rounds what leaves the last layer of the edge."""
    model, windows = new_model("llama", num_hidden_layers=3), windows_of(story)
    stages = chain_of(model, [2, 3, 4])
    found = next(one for one in delta_nll(stages, windows, FORMATS) if (one.cut, one.wire) == (cut, wire))
    baseline = [nll_of(model, ids) for ids in windows]
    model.model.layers[cut - 1].register_forward_hook(
        lambda layer, given, states: through(states[0], wire)[None]
    )
    rounded = [nll_of(model, ids) for ids in windows]
    assert found.nll == pytest.approx(rounded, rel=1e-5)
    assert found.nll != found.baseline
    assert found.delta_nll == pytest.approx((sum(rounded) - sum(baseline)) / 138, abs=1e-4)


def test_stages_that_are_no_chain(new_model, story):
    stages = chain_of(new_model("llama", num_hidden_layers=3), [2, 3])
    for some in (stages[:2], stages[1:], [stages[0], stages[2]]):
        with pytest.raises(StageError, match="hold parts 0 to 4, one after the other"):
            delta_nll(some, windows_of(story))
    with pytest.raises(StageError, match="two or more"):
        delta_nll(chain_of(new_model("llama"), []), windows_of(story))
