"""Distillation on tiny models: what a student learns from whom, what stays, and what is refused."""

import dataclasses
import errno
from functools import partial

import pytest
import torch
from torch.nn import functional

from edgelab import training
from edgelab.assets import AssetError
from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.divergences import TopK
from edgelab.model.losses import Divergence, live
from edgelab.model.marks import fingerprint
from edgelab.recipes import Context, RecipeError, parse
from edgelab.reference import load_tokenizer, resolve
from edgelab.storage import outputs, variants
from edgelab.storage.layers import ActivationGrid, packed_layers
from edgelab.storage.stages import stage_keys
from edgelab.techniques.distillation import (
    Distill,
    Matched,
    Written,
    anew,
    attention_apart,
    continued,
    opposite,
    seeing,
    states_apart,
)
from edgelab.techniques.quantization.rtn import linear_layers

ROWS = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(5))
SHORT = Distill(steps=8, batch=4, length=24, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Random tokens in place of the training texts."""
    monkeypatch.setattr(training, "windows", lambda *arguments: ROWS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "reverse_kl"},
        {"loss": "jsd", "mix": 0.3},
        {"loss": "skew_kl", "mix": 0.1},
        {"loss": "logits"},
        {"loss": "ce"},
        {"temperature": 2.0, "hard": 0.5},
        {"top_k": 5},
        {"hidden": 1.0},
        {"attention": 1.0},
        {"written": 0.5},
    ],
    ids=str,
)
def test_a_student_learns(new_model, changes):
    reference = new_model("llama")
    student = parse("prune.layers:drop=1").apply(reference, Context())
    before = {name: weight.clone() for name, weight in student.named_parameters()}
    context = Context(reference=reference)
    taught = dataclasses.replace(SHORT, **changes).apply(student, context)
    losses = [point["loss"] for point in context.record.curve]
    assert losses[-1] < losses[0] and context.record.train_tokens == 8 * 4 * 24
    assert all(torch.equal(before[name], weight) for name, weight in student.named_parameters())
    assert taught.config._attn_implementation == student.config._attn_implementation
    assert {name: one.shape for name, one in taught.named_parameters()} == {
        name: one.shape for name, one in before.items()
    }


def test_the_same_seed_gives_the_same_weights(new_model):
    reference = new_model("qwen3")
    student = parse("prune.layers:drop=0").apply(reference, Context())
    for changes in ({}, {"written": 1.0}, {"fresh": True}):
        one, two = (
            dataclasses.replace(SHORT, steps=3, **changes).apply(
                student, Context(reference=reference, seed=4)
            )
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_student_begins_as_the_layers_it_keeps(new_model):
    """Bit for bit: what comes before training changes nothing of what stays."""
    reference = new_model("llama", num_hidden_layers=4)
    student = parse("prune.layers:drop=1/2").apply(reference, Context())
    kept = [dict(block.named_parameters()) for block in student.model.layers]
    for place, block in zip((0, 3), kept, strict=True):
        theirs = dict(reference.model.layers[place].named_parameters())
        assert block.keys() == theirs.keys() and all(torch.equal(block[name], theirs[name]) for name in block)
    made = dataclasses.replace(SHORT, steps=1, learning_rate=1e-30).apply(
        student, Context(reference=reference)
    )
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), student.parameters(), strict=True))


def test_a_fresh_student_has_the_shapes_and_none_of_the_weights(new_model, layout):
    student = new_model(layout, intermediate_size=100)
    fresh = anew(student, 1)
    weights = dict(fresh.named_parameters())
    for name, weight in student.named_parameters():
        assert weights[name].shape == weight.shape
        if weight.dim() > 1:
            assert not torch.equal(weights[name], weight) and weights[name].std() > 0
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.parameters(), anew(student, 1).parameters(), strict=True)
    )
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert (fresh.get_input_embeddings().weight is fresh.get_output_embeddings().weight) == tied
    assert fresh(ROWS[:1]).logits.isfinite().all()


def test_the_last_blocks_meet():
    assert opposite(3, 6) == [1, 3, 5] and opposite(2, 2) == [0, 1] and opposite(1, 30) == [29]
    assert opposite(15, 30)[-1] == 29 and opposite(20, 30) == sorted(set(opposite(20, 30)))


def test_states_and_attention_of_oneself_are_matched(new_model):
    model = new_model("llama")
    said = Divergence(live(model))
    assert Matched(said, model, model, hidden=1.0, attention=1.0)(model, ROWS).item() == pytest.approx(
        0, abs=1e-5
    )


def test_what_blocks_hand_on_and_how_they_attend(new_model):
    model = new_model("qwen3")
    with seeing(model, attention=True) as seen:
        model(ROWS[:1])
    expected = new_model("qwen3")
    expected.set_attn_implementation("eager")
    expected = expected(ROWS[:1], output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(seen.states[0], expected.hidden_states[1])
    torch.testing.assert_close(seen.attention[1], expected.attentions[1])
    assert seen.attention[1].shape == (1, 4, 24, 24)


def test_how_far_apart_by_hand():
    assert states_apart(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 5.0]]])).item() == pytest.approx(
        10 / 25
    )
    p, q = torch.tensor([0.8, 0.2]), torch.tensor([0.4, 0.6])
    assert attention_apart(q.view(1, 1, 1, 2), p.view(1, 1, 1, 2)).item() == pytest.approx(0.334795, abs=1e-6)
    two = torch.stack([q, p]).view(1, 2, 1, 2)  # mean (0.6, 0.4)
    mean = functional.kl_div(torch.tensor([0.6, 0.4]).log(), p, reduction="sum")
    assert attention_apart(two, p.view(1, 1, 1, 2)).item() == pytest.approx(mean.item(), abs=1e-6)


def test_masked_attention_has_a_gradient():
    own = torch.tensor([[1.0, 0.0], [0.5, 0.5]], requires_grad=True)
    attention_apart(own.view(1, 1, 2, 2), torch.tensor([[1.0, 0.0], [0.3, 0.7]]).view(1, 1, 2, 2)).backward()
    assert own.grad.isfinite().all()


def test_a_narrower_student_is_mapped_to_the_teacher(new_model):
    teacher, student = new_model("llama"), new_model("llama", hidden_size=32)
    matched = Matched(Divergence(live(teacher)), student, teacher, hidden=1.0, attention=1.0)
    assert [tuple(one.weight.shape) for one in matched.maps] == [(64, 32)] * 2
    matched(student, ROWS).backward()
    assert all(one.weight.grad is not None for one in matched.maps)


def test_what_a_student_writes_begins_with_the_window(new_model):
    model = new_model("llama")
    torch.manual_seed(0)
    ids = continued(model, ROWS[:3, :6], 24)
    assert ids.shape == (3, 24) and torch.equal(ids[:, :6], ROWS[:3, :6])
    read = []
    Written(lambda model, ids: read.append(ids), 1.0)(model, ROWS)
    assert torch.equal(read[0][:, :6], ROWS[:, :6]) and not torch.equal(read[0], ROWS)
    with torch.no_grad():
        Written(lambda model, ids: read.append(ids), 1.0)(model, ROWS)  # a look at held-out text
    assert torch.equal(read[1], ROWS)


def test_a_teacher_that_a_recipe_makes(new_model, tiny):
    """On the road a teacher is a variant; without one it is made of the reference."""
    source = resolve(str(tiny))
    recipe = parse("distill:teacher=(prune.layers:drop=1),steps=2,batch=2,length=24")
    folder = variants.build(recipe, source, 0, lambda done, total: None)
    from_road = variants.load(folder)
    context = Context(reference=variants.load_model(source))
    by_hand = recipe.techniques[0].apply(context.reference, context)
    assert all(torch.equal(a, b) for a, b in zip(from_road.parameters(), by_hand.parameters(), strict=True))
    assert (
        stage_keys(recipe, source, 0)[-1]
        != stage_keys(parse("distill:steps=2,batch=2,length=24"), source, 0)[-1]
    )


KEPT = partial(outputs.kept_outputs, progress=lambda done, total: None)


def test_a_teacher_reads_once(new_model, home, monkeypatch):
    """A run with an address keeps what the teacher answers; a second loss on the same windows reads it from disk."""
    reference = new_model("llama")
    student = parse("prune.layers:drop=1").apply(reference, Context())
    for changes in ({}, {"hard": 0.5}, {"loss": "logits"}, {"top_k": 3}):
        technique = dataclasses.replace(SHORT, **changes)
        context = Context(reference=reference, outputs=KEPT)
        one = technique.apply(student, context)
        other = technique.apply(student, Context(reference=reference))
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            if "top_k" in changes:  # in 16 bits: a weight whose gradient is near zero may go the other way
                assert (a - b).abs().mean() < 1e-4
            else:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        # states; or the logarithms of 3 tokens and the rest in float16, and the tokens in 16 bits
        each = 64 * (2 if bfloat16_is_fast() else 4) if "top_k" not in changes else 4 * 2 + 3 * 2
        assert context.record.teacher_mb == pytest.approx(8 * 24 * each / 1e6, rel=0.1)
    assert len(list((home / "states").glob("[!.]*"))) == 2
    monkeypatch.setattr(outputs, "_read", lambda *_: pytest.fail("read again"))
    context = Context(reference=reference, outputs=KEPT)
    SHORT.apply(student, context)
    assert context.record.spared_s == context.record.teacher_s > 0  # it cost that all the same


def test_kept_tokens_are_those_of_the_teacher(new_model, home):
    model, ids = new_model("llama"), torch.randint(300, (3, 24))
    kept = KEPT(model, ids, "tokens", 4, 2.0)
    for where in (slice(0, 24), slice(24, 72)):
        wanted = TopK.of((live(model)(ids)(where) / 2).log_softmax(-1), 4)
        found = kept(ids)(where)
        assert torch.equal(found.index, wanted.index)
        torch.testing.assert_close(found.log_p, wanted.log_p, atol=5e-3, rtol=0)
        torch.testing.assert_close(found.log_rest, wanted.log_rest, atol=5e-3, rtol=0)
        sums = found.log_p.exp().sum(-1) + found.log_rest.exp()
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_full_disk_while_a_teacher_reads(new_model, home, monkeypatch):
    def full(self, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outputs._Array, "append", full)
    with pytest.raises(AssetError, match="No space left"):
        KEPT(new_model("llama"), torch.zeros(2, 24, dtype=torch.long), "full", 0, 1.0)
    assert not list((home / "states").glob("*"))  # nothing half-written stays


def test_a_teacher_that_changes_while_it_teaches(tiny, new_model, byte_tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    other = new_model("llama")
    other.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    recipe = parse(f"distill:model={folder},steps=1,batch=2,length=24")
    whole = Distill.fit

    def disturbed(self, *arguments):
        whole(self, *arguments)
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        other.save_pretrained(folder)

    monkeypatch.setattr(Distill, "fit", disturbed)
    with pytest.raises(RecipeError, match="changed while it taught"):
        variants.build(recipe, resolve(str(tiny)), 0, lambda done, total: None)


def test_a_teacher_with_another_tokenizer(tiny, new_model, tmp_path):
    folder = tmp_path / "teacher"
    new_model("llama", vocab_size=400).save_pretrained(folder)
    tokenizer = load_tokenizer(resolve(str(tiny)))
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    recipe = parse(f"distill:model={folder},steps=1,batch=2,length=24")
    with pytest.raises(RecipeError, match="has another tokenizer than the student"):
        variants.build(recipe, resolve(str(tiny)), 0, lambda done, total: None)


def test_another_model_teaches(tiny, new_model, byte_tokenizer, tmp_path):
    wider = new_model("llama", hidden_size=96, num_attention_heads=6)
    wider.save_pretrained(tmp_path / "wider")
    byte_tokenizer.save_pretrained(tmp_path / "wider")
    recipe = parse(f"distill:model={tmp_path / 'wider'},steps=2,batch=2,length=24")
    source = resolve(str(tiny))
    first = stage_keys(recipe, source, 0)
    variants.build(recipe, source, 0, lambda done, total: None)
    with torch.no_grad():
        wider.model.layers[0].mlp.up_proj.weight.add_(1)
    wider.save_pretrained(tmp_path / "wider")
    assert stage_keys(recipe, source, 0) != first  # a teacher that has changed is another one


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("distill:mix=1.5", "outside 0 to 1"),
        ("distill:hard=-0.1", "outside 0 to 1"),
        ("distill:loss=jsd,mix=0", "vanishes"),
        ("distill:loss=skew_kl,mix=1", "vanishes"),
        ("distill:temperature=0", "above 0"),
        ("distill:loss=ce,hidden=1", "loss=ce makes no use of hidden; leave it out"),
        ("distill:loss=ce,written=1", "no use of written"),
        ("distill:loss=ce,teacher=(quantize.bf16)", "no use of teacher"),
        ("distill:loss=logits,temperature=2", "no use of temperature"),
        ("distill:loss=kl,mix=0.1", "no use of mix"),
        ("distill:hard=0.5,written=0.5", "choose one"),
        ("distill:attention=1,activation_checkpointing=true", "choose one"),
        ("distill:teacher=(none @ llamacpp)", "leave out what follows the @"),
        ("distill:top_k=-1", "top_k=-1 should be at least 0"),
    ],
)
def test_settings_that_mean_nothing(recipe, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(recipe)


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ("quantize.rtn:bits=4,group_size=32", "is quantized; put it before"),
        ("quantize.bf16", "in bfloat16; put it"),
    ],
)
def test_students_that_cannot_be_trained(new_model, before, sentence):
    reference = new_model("llama")
    with pytest.raises(RecipeError, match=sentence):
        SHORT.apply(parse(before).apply(reference, Context()), Context(reference=reference))


def test_a_teacher_of_other_tokens(new_model):
    with pytest.raises(RecipeError, match="predicts 300 tokens and the teacher 200"):
        SHORT.apply(new_model("llama"), Context(reference=new_model("llama", vocab_size=200)))
    with pytest.raises(RecipeError, match="needs the reference"):
        SHORT.apply(new_model("llama"), Context())


@pytest.mark.parametrize("top_k", [300, 301])
def test_a_bucket_for_nothing(new_model, top_k):
    model = new_model("llama")
    with pytest.raises(RecipeError, match=f"top_k={top_k} leaves no rest of 300 tokens"):
        dataclasses.replace(SHORT, top_k=top_k).apply(model, Context(reference=model))


def test_zeros_of_pruning_stay_zeros(new_model):
    reference = new_model("llama")
    student = parse("prune.magnitude:sparsity=0.5").apply(reference, Context())
    made = SHORT.apply(student, Context(reference=reference))
    for name, layer in linear_layers(student).items():
        after = made.get_submodule(name).weight
        assert torch.equal(after == 0, layer.weight == 0) and not torch.equal(after, layer.weight)
    with pytest.raises(RecipeError, match="fresh=true would fill in the zeros"):
        dataclasses.replace(SHORT, fresh=True).apply(student, Context(reference=reference))


def test_a_teacher_with_a_packed_head(new_model):
    reference = new_model("llama")
    short = dataclasses.replace(
        SHORT, steps=1, teacher=parse("quantize.rtn:bits=8,group_size=32 + quantize.embedding")
    )
    made = short.apply(parse("prune.layers:drop=1").apply(reference, Context()), Context(reference=reference))
    assert not torch.equal(made.get_output_embeddings().weight, reference.get_output_embeddings().weight)


def test_a_map_of_widths_is_of_the_seed(new_model):
    teacher, student = new_model("llama", hidden_size=96, num_attention_heads=6), new_model("llama")
    maps = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        maps.append(Matched(None, student, teacher, 1.0, 0.0, seed=3).maps)
    assert all(torch.equal(*pair) for pair in zip(*(one.parameters() for one in maps), strict=True))


def test_teachers_that_round_their_inputs_otherwise_are_others(new_model):
    """The same integers, with a grid of the inputs for each token, one from calibration, and none."""
    model = new_model("llama")
    packed = parse("quantize.rtn:bits=8,group_size=0,symmetric=true").apply(model, Context())
    found = [fingerprint(packed)]
    for grid in (
        ActivationGrid(), ActivationGrid(torch.tensor(0.1), torch.tensor(3.0)),
        ActivationGrid(torch.tensor(0.2), torch.tensor(3.0)),
    ):  # fmt: skip
        for layer in packed_layers(packed).values():
            layer.activation = grid
        found.append(fingerprint(packed))
    assert len(set(found)) == 4


def test_the_last_token_of_a_window_tells_two_apart(new_model, home):
    model = new_model("llama")
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    kept = KEPT(model, ids, "last", 0, 1.0)
    torch.testing.assert_close(kept(ids)(slice(0, 6)), live(model)(ids)(slice(0, 6)), rtol=1e-2, atol=1e-2)
