"""Inversion: prompts read back from hidden states, one state alone and by the search, with and without rounding."""

import pandas as pd
import pytest
import torch

import edgelab
from edgelab.assets import data_dir
from edgelab.deployments.hybrid.inversion import (
    AT_ONCE,
    closeness,
    cloud_prior,
    exposure,
    lone_states,
    nearest,
    recover,
    tolerance_of,
)
from edgelab.deployments.hybrid.split import FORMATS, cut_behind, through
from edgelab.deployments.partition.stage import StageError, chain_of
from edgelab.model.logits import head_logits, hidden_states

IDS = [5, 100, 42, 7, 299, 12, 8, 8, 8, 131]
UNKNOWING = torch.zeros(300)  # every token is as likely as the others: tried in order of their ids


def unknowing(ids):
    return UNKNOWING


def sent_by(edge, ids=IDS, wire="float32"):
    edge.forget()
    states = through(edge.read(torch.tensor(ids), 0, every=True), wire)
    edge.forget()
    return states


@pytest.fixture
def halves(new_model):
    """A tiny Llama of four layers, cut behind the second."""
    return chain_of(new_model("llama", num_hidden_layers=4), [3])


# One state alone


@pytest.mark.parametrize("cosine", [False, True])
def test_embeddings_give_every_token_away(cosine, new_model, layout):
    edge, _ = chain_of(new_model(layout), [1])
    assert nearest(sent_by(edge), lone_states(edge), cosine) == IDS


def test_a_table_holds_what_the_edge_makes_of_one_token(halves):
    edge, _ = halves
    for before in ([], [17, 3]):
        table = lone_states(edge, before)
        assert table.shape == (300, 64)
        for token in (0, 42, 299):
            torch.testing.assert_close(
                table[token], sent_by(edge, [*before, token])[-1], rtol=1e-4, atol=1e-4
            )


def test_closeness_by_hand():
    table = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    states = torch.tensor([[1.0, 2.0]])
    assert closeness(states, table)[0].tolist() == pytest.approx([-2.0, -(5**0.5)])
    assert closeness(states, table, cosine=True)[0].tolist() == pytest.approx([5**-0.5, 2 * 5**-0.5])
    assert nearest(states, table) == [0]
    assert nearest(states, table, cosine=True) == [1]


# The search


@pytest.mark.parametrize("wire", FORMATS)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_every_token_is_found(cut, wire, new_model, layout):
    edge, _ = chain_of(new_model(layout, num_hidden_layers=3), [cut + 1])
    arrived = sent_by(edge, wire=wire)
    found = recover(edge, arrived, unknowing, tolerance_of(arrived, wire))
    assert found.ids == IDS
    assert all(found.matched)
    if wire == "float32":
        assert max(found.distances) < 1e-4
    assert found.share(IDS) == 1
    assert found.share([*IDS[:-1], 0]) == 0.9


def test_one_state_alone_does_not_do_what_the_search_does(halves):
    edge, cloud = halves
    for known, table in (([], lone_states(edge)), (IDS[:3], None)):
        found = exposure(edge, cloud, IDS[len(known) :], "float32", known, table)
        assert (found.cut, found.wire, found.searched) == (2, "float32", 1)
        assert found.nearest < 0.5
        assert AT_ONCE <= found.tried <= 300


def test_an_edge_that_only_embeds_hides_nothing(new_model):
    edge, cloud = chain_of(new_model("llama"), [1])
    found = exposure(edge, cloud, IDS, "int8")
    assert (found.cut, found.nearest, found.searched) == (0, 1, 1)
    assert exposure(edge, cloud, IDS, "int8", most=1).searched < 1


def test_the_likeliest_are_tried_first(halves):
    edge, _ = halves
    arrived = sent_by(edge)
    bound = tolerance_of(arrived, "float32")

    def expecting(ids):
        return torch.nn.functional.one_hot(torch.tensor(IDS[len(ids)]), 300)

    assert recover(edge, arrived, expecting, bound).tried == [AT_ONCE] * len(IDS)
    assert recover(edge, arrived, lambda ids: -expecting(ids), bound).tried == [300] * len(IDS)
    tried = recover(edge, arrived, unknowing, bound).tried
    assert tried == [min((token // AT_ONCE + 1) * AT_ONCE, 300) for token in IDS]


def test_of_those_that_match_the_likeliest_is_taken(halves):
    edge, _ = halves
    arrived = sent_by(edge, IDS[:3])
    anything = torch.full((3, 1), torch.inf)
    likes = torch.eye(300)[[7, 8, 9]]
    assert recover(edge, arrived, lambda ids: likes[len(ids)], anything).ids == [7, 8, 9]


def test_noise_within_the_tolerance_is_no_matter(halves):
    edge, _ = halves
    clean = sent_by(edge)
    size = 0.2 * clean.std()
    noise = size * (2 * torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) - 1)
    found = recover(edge, clean + noise, unknowing, (size * 1.001).expand(len(IDS), 1))
    assert found.ids == IDS
    assert all(found.matched)


def test_with_too_little_tolerance_the_nearest_of_all_is_taken(halves):
    edge, _ = halves
    clean = sent_by(edge)
    noise = 0.2 * clean.std() * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    found = recover(edge, clean + noise, unknowing, tolerance_of(clean, "float32"))
    assert found.ids == IDS
    assert not any(found.matched)
    assert found.tried == [300] * len(IDS)
    few = recover(edge, clean + noise, unknowing, tolerance_of(clean, "float32"), most=5)
    assert few.tried == [5] * len(IDS)
    assert max(few.ids) < 5


def test_a_known_beginning_is_not_searched(halves):
    edge, _ = halves
    arrived = sent_by(edge)
    found = recover(edge, arrived, unknowing, tolerance_of(arrived, "float32"), known=IDS[:4])
    assert found.ids == IDS[4:]
    assert len(found.tried) == len(found.matched) == len(found.distances) == len(IDS) - 4


def test_nothing_matches_behind_a_wrong_token(halves):
    edge, _ = halves
    arrived = sent_by(edge)
    found = recover(edge, arrived, unknowing, tolerance_of(arrived, "float32"), known=[IDS[0] + 1])
    assert not any(found.matched)
    assert found.tried == [300] * (len(IDS) - 1)
    assert min(found.distances) > 1e-3


def test_the_cloud_expects_what_the_model_does(halves, new_model):
    edge, cloud = halves
    model = new_model("llama", num_hidden_layers=4)
    first = torch.arange(300.0)
    prior = cloud_prior(cloud, sent_by(edge), first)
    with torch.inference_mode():
        expected = head_logits(model, hidden_states(model, torch.tensor([IDS])))[0]
    for length in range(1, len(IDS)):
        torch.testing.assert_close(prior(IDS[:length]), expected[length - 1], rtol=1e-4, atol=1e-4)
    assert torch.equal(prior([]), first)


def test_a_search_needs_the_edge(halves):
    with pytest.raises(StageError, match="begins at part 3"):
        recover(halves[1], torch.zeros(1, 64), unknowing, torch.zeros(1, 1))


def test_what_the_project_measured_was_read_back():
    rows = pd.read_csv(data_dir() / "reference" / "exposure.csv")
    found = rows[rows["wire"] == "float32"].groupby("cut")["search"]
    assert {1, 5, 15} <= set(found.groups) and found.count().min() >= 6
    assert found.mean().min() >= 0.99


# The embedded model


@pytest.fixture(scope="module")
def embedded():
    return edgelab.load()


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("cut", "wire"), [(1, "float32"), (5, "float32"), (15, "float32"), (1, "int8"), (5, "int4")]
)
def test_the_embedded_model_gives_a_message_away(cut, wire, embedded):
    """Behind the opening of the chat template, which everybody knows, with a number that no model expects."""
    known = embedded.tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    ids = embedded.tokenizer.encode("My number is 4825, call me back.", add_special_tokens=False)
    edge, cloud = cut_behind(embedded.model, [cut])
    arrived = sent_by(edge, [*known, *ids], wire)
    found = recover(edge, arrived, cloud_prior(cloud, arrived), tolerance_of(arrived, wire), known)
    assert embedded.tokenizer.decode(found.ids) == "My number is 4825, call me back."
    assert all(found.matched)
