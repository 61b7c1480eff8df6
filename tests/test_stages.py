"""Stages of a model: together they are the model, to the last bit, however it is cut; each holds only its own."""

import copy
import itertools
import json

import pytest
import torch
from transformers import DynamicCache

import edgelab
from edgelab.deployments.partition.stage import Stage, StageError, chain_of, generate, read_through
from edgelab.model.logits import head_logits, hidden_states
from edgelab.runtimes.eager import Eager
from edgelab.storage.variants import VariantError

IDS = [5, 100, 42, 7, 299, 12, 8]


@torch.inference_mode()
def steps_of(model, ids=IDS, prompt=4):
    """Logits behind a prompt and behind each token after it, from the whole model."""
    cache, found = DynamicCache(config=model.config), []
    for piece in (ids[:prompt], *([token] for token in ids[prompt:])):
        hidden = hidden_states(model, torch.tensor([piece]), cache)
        found.append(head_logits(model, hidden[:, -1:])[0, -1])
    return found


def steps_through(stages, ids=IDS, prompt=4, request=0):
    found = [read_through(stages, torch.tensor(ids[:prompt]), 0, request)]
    for place, token in enumerate(ids[prompt:], prompt):
        found.append(read_through(stages, torch.tensor([token]), place, request))
    return found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_cut_gives_the_same_logits(new_model, layout):
    model = new_model(layout, num_hidden_layers=4)
    whole = steps_of(model)
    for count in (1, 2):
        for cuts in itertools.combinations(range(1, 6), count):
            assert same(steps_through(chain_of(model, list(cuts))), whole), cuts


@pytest.mark.parametrize("layout", ["gemma2", "gemma3_text"])
def test_blocks_with_windows_keep_them(layout, new_model):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = new_model(layout, num_hidden_layers=4, head_dim=16, sliding_window=3, layer_types=kinds)
    whole = steps_of(model)
    for cut in range(1, 6):
        assert same(steps_through(chain_of(model, [cut])), whole), cut


def test_requests_do_not_see_each_other(new_model):
    model = new_model("llama", num_hidden_layers=4)
    stages = chain_of(model, [2, 4])
    other = [9, 8, 7, 6, 5, 4, 3]
    alone = steps_of(model), steps_of(model, other)
    first = [read_through(stages, torch.tensor(IDS[:4]), 0, 0)]
    second = [read_through(stages, torch.tensor(other[:4]), 0, 1)]
    for place in range(4, 7):
        second.append(read_through(stages, torch.tensor([other[place]]), place, 1))
        first.append(read_through(stages, torch.tensor([IDS[place]]), place, 0))
    assert same(first, alone[0])
    assert same(second, alone[1])


def test_a_step_is_never_read_twice(new_model):
    stage = Stage(new_model("llama"), 0, 2)
    stage.read(torch.tensor(IDS[:4]), 0)
    with pytest.raises(StageError, match="goes on at token 4 in this stage, not at 3"):
        stage.read(torch.tensor([IDS[3]]), 3)
    assert stage.length() == 4
    stage.forget()
    assert stage.length() == 0
    stage.read(torch.tensor(IDS), 0)


def test_a_stage_lets_go_of_what_it_does_not_need(new_model):
    model = new_model("llama", num_hidden_layers=4)
    stage = Stage(copy.deepcopy(model), 2, 4)
    blocks = stage.model.get_submodule("model.layers")
    assert len(blocks) == 2
    for own, theirs in zip(blocks, model.model.layers[1:3], strict=True):
        assert torch.equal(own.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


def test_stages_hold_the_model_and_a_tied_matrix_twice(new_model):
    def numbers(model):
        return sum(one.numel() for one in model.parameters())

    for tied in (True, False):
        model = new_model("llama", num_hidden_layers=4, tie_word_embeddings=tied)
        stages = chain_of(model, [1, 3, 5])
        held = [numbers(stage.model) + numbers(stage._norm) * (stage.last == 6) for stage in stages]
        assert held[0] == 300 * 64
        assert held[1] == held[2]
        assert held[3] == 300 * 64 + 64
        assert sum(held) == numbers(model) + tied * 300 * 64


@pytest.mark.embedded
def test_embedded_model_in_stages():
    """Every split of its 30 blocks into two runs, a fortieth of the 406 into three, and head and embedding alone."""
    model = edgelab.load().model
    ids = [1, 338, 3575, 282, 253, 1165, 30, 198]
    tensors = {id(one): one for one in (*model.parameters(), *model.buffers())}

    def split(cuts):  # the weights are those of the model: their place in memory decides the order of sums
        ends = itertools.pairwise([0, *cuts, 32])
        return [Stage(copy.deepcopy(model, dict(tensors)), first, last) for first, last in ends]

    whole = steps_through(split([]), ids)
    two = [[first] for first in range(2, 31)]
    three = [list(pair) for pair in itertools.combinations(range(2, 31), 2)]
    assert (len(two), len(three)) == (29, 406)
    for cuts in (*two, *three[::40], [1, 31]):
        assert same(steps_through(split(cuts), ids), whole), cuts
    torch.testing.assert_close(whole, steps_of(model, ids), rtol=1e-5, atol=1e-4)


def test_written_tokens_are_those_of_the_whole(new_model):
    model = new_model("llama", num_hidden_layers=4)
    session = Eager(model)
    token, written = session.prefill(IDS), []
    for _ in range(6):
        written.append(token)
        token = session.decode(token)
    assert generate(chain_of(model, [3]), IDS, 6) == written


def test_parts_that_are_not_there(new_model):
    for first, last in ((0, 0), (2, 1), (0, 5), (-1, 2)):
        with pytest.raises(StageError, match="model of 4 parts"):
            Stage(new_model("llama"), first, last)


def test_layouts_that_are_not_cut(new_model):
    with pytest.raises(StageError, match="supported are llama"):
        Stage(new_model("gpt2", n_layer=2, n_embd=64, n_head=4), 0, 2)


@pytest.mark.parametrize(
    "recipe",
    [
        "quantize.bf16",
        "quantize.rtn:bits=4,group_size=32 + quantize.embedding",
        "quantize.rtn:bits=8,group_size=0",
    ],
)
def test_stages_of_a_variant_read_their_own_tensors_and_run_packed(recipe, tiny, variant):
    folder = variant(recipe)
    session = Eager(folder)
    token, written = session.prefill(IDS), []
    for _ in range(4):
        written.append(token)
        token = session.decode(token)
    for cuts in ([1, 3], [2]):
        ends = [0, *cuts, 4]
        stages = [Stage.load(folder, first, last) for first, last in itertools.pairwise(ends)]
        assert generate(stages, IDS, 4) == written
        assert not any(tensor.is_meta for stage in stages for tensor in stage.model.state_dict().values())
        assert all(stage.held_bytes() < Stage.load(folder, 0, 4).held_bytes() for stage in stages)


def test_an_adapter_is_not_read_in_parts(variant):
    folder = variant("none")
    about = json.loads((folder / "variant.json").read_text())
    (folder / "variant.json").write_text(json.dumps(about | {"adapter_of": "another"}))
    with pytest.raises(VariantError, match="put merge behind it"):
        Stage.load(folder, 0, 2)
