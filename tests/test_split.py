"""Split inference: four formats of the wire, bytes by cut, a model in two places, and what rounding does to its NLL."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from edgelab.deployments.hybrid import split
from edgelab.deployments.hybrid.split import (
    FORMATS,
    Here,
    Split,
    cut_behind,
    delta_nll,
    payload_bytes,
    through,
)
from edgelab.deployments.partition.profile import hidden_bytes
from edgelab.deployments.partition.stage import StageError, chain_of
from edgelab.deployments.partition.wire import WireError
from edgelab.devices.shapes import ModelShape
from edgelab.runtimes.eager import Eager

IDS = [5, 100, 42, 7, 299, 12, 8]


def states_of(seed, tokens=3, hidden=64):
    """States of any size, with one channel a hundred times as large."""
    states = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))
    states[:, seed % hidden] *= 100
    return states * 10.0 ** (seed % 7 - 3)


def test_int4_by_hand():
    states = torch.tensor([[7.0, -3.4, 0.4, 2.6], [0.0, 0.0, 0.0, 0.0]])
    integers, scale = split.quantize_int4(states, 4)
    assert integers.tolist() == [[7, -3, 0, 3], [0, 0, 0, 0]]
    assert scale[0].tolist() == [1.0]
    assert through(states, "int4").tolist() == [[7, -3, 0, 3], [0, 0, 0, 0]]
    payload = split.encoded(states[:1], "int4")
    assert payload[2:] == bytes([0xF | 5 << 4, 8 | 11 << 4])  # the first of two in the lower half, plus 8


def test_a_large_channel_rounds_only_its_group_to_zero():
    states = torch.full((1, 64), 7.0)
    states[0, 3] = 7000.0
    arrived = through(states, "int4")
    assert (arrived[0, 32:] == 7).all()
    assert arrived[0, :32].count_nonzero() == 1
    assert through(states, "int8")[0, 32:].count_nonzero() == 0  # one scale for the token


@given(st.integers(0, 10_000))
def test_int4_is_off_by_half_a_step_at_most(seed):
    states = states_of(seed)
    step = states.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 7
    assert ((through(states, "int4") - states).abs().unflatten(-1, (-1, 32)) <= step * 0.505).all()


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


@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("hidden", [48, 64, 576])
def test_payloads_have_the_bytes_that_are_promised(wire, hidden):
    assert len(split.encoded(states_of(1, 5, hidden), wire)) == 5 * payload_bytes(hidden, wire)


def test_bytes_of_the_embedded_model():
    assert [payload_bytes(576, wire) for wire in FORMATS] == [2304, 1152, 580, 288 + 2 * 18]
    assert [payload_bytes(64, wire) for wire in FORMATS[:3]] == [
        hidden_bytes(64, wire) for wire in FORMATS[:3]
    ]


def test_groups_divide_the_hidden_size():
    assert [split.group_size(hidden) for hidden in (576, 64, 48, 40, 26)] == [32, 32, 24, 20, 26]
    with pytest.raises(WireError, match="75 is odd"):
        split.group_size(75)


def test_formats_and_payloads_that_are_none():
    for ask in (
        lambda: split.encoded(torch.ones(1, 4), "int2"),
        lambda: payload_bytes(64, "int2"),
        lambda: split.rounding_bound(torch.ones(1, 4), "int2"),
    ):
        with pytest.raises(WireError, match="wire=int2 is no format; there are float32, float16, int8, int4"):
            ask()
    for wire in FORMATS:
        payload = split.encoded(torch.ones(2, 64), wire)
        with pytest.raises(WireError, match="are no 3 states of 64"):
            split.decoded(payload, wire, 3, 64)
        with pytest.raises(WireError, match=f"{len(payload) - 1} bytes are no 2 states"):
            split.decoded(payload[:-1], wire, 2, 64)


def test_every_cut_sends_the_same_but_for_the_last(new_model):
    shape = ModelShape.from_config(new_model("llama", num_hidden_layers=3).config)
    found = split.traffic(shape, "int4", prompt_tokens=10)
    state = 32 + 2 * 2
    assert [one.cut for one in found] == [0, 1, 2, 3]
    assert [one.prompt_bytes for one in found] == [10 * state, 10 * state, 10 * state, state]
    assert {(one.token_bytes, one.answer_bytes) for one in found} == {(state, 4)}


def split_of(model, cut, wire="float32"):
    edge, cloud = cut_behind(model, [cut])
    return Split(edge, Here(cloud, wire), wire)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_a_split_model_is_the_model(cut, new_model, layout):
    model = new_model(layout, num_hidden_layers=3)
    whole, parts = Eager(model), split_of(model, cut)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(parts.logits(IDS), whole.logits(IDS), **close)
    assert parts.sent_bytes == len(IDS) * 4 * 64
    assert parts.prefill(IDS[:4]) == whole.prefill(IDS[:4])
    assert parts.sent_bytes == (len(IDS) + (4 if cut < 3 else 1)) * 4 * 64
    for token in IDS[4:]:
        assert parts.decode(token) == whole.decode(token)
    parts.rewind(2)
    whole.rewind(2)
    torch.testing.assert_close(parts.extend([9, 17]), whole.extend([9, 17]), **close)


def test_a_split_model_sends_what_traffic_says(new_model):
    model = new_model("llama", num_hidden_layers=3)
    shape = ModelShape.from_config(model.config)
    for wire in FORMATS:
        for expected in split.traffic(shape, wire, prompt_tokens=5):
            parts = split_of(model, expected.cut, wire)
            parts.prefill(IDS[:5])
            assert parts.sent_bytes == expected.prompt_bytes
            parts.decode(IDS[5])
            assert parts.sent_bytes == expected.prompt_bytes + expected.token_bytes


def test_an_edge_begins_with_the_embedding_and_is_not_all(new_model):
    edge, cloud = chain_of(new_model("llama"), [2])
    with pytest.raises(StageError, match="Parts 2 to 3 are no edge of a model of 4 parts"):
        Split(cloud, Here(cloud, "float32"))
    with pytest.raises(StageError, match="Parts 0 to 3 are no edge"):
        Split(chain_of(new_model("llama"), [])[0], Here(cloud, "float32"))
    with pytest.raises(WireError, match="int2"):
        Split(edge, Here(cloud, "int8"), "int2")


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
