"""LoRA on tiny models: peft's own numbers, what stays, merging, packed bases, files, and what is refused."""

import dataclasses

import peft
import pytest
import torch
from torch.nn import functional

from edgelab import training
from edgelab.recipes import Context, RecipeError, parse
from edgelab.storage import adapters
from edgelab.storage.adapters import NAME, AdapterError, adapted_layers, merged
from edgelab.storage.layers import PackedLinear, packed_layers
from edgelab.techniques.lora import LoRA, QLoRA
from edgelab.techniques.quantization.rtn import RoundToNearest, linear_layers

ROWS = torch.randint(2, 300, (8, 24), generator=torch.Generator().manual_seed(5))
SHORT = LoRA(steps=8, batch=4, length=24, learning_rate=1e-2, rank=4)
INT4 = RoundToNearest(bits=4, group_size=32)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """Random tokens in place of the training texts."""
    monkeypatch.setattr(training, "windows", lambda *arguments: ROWS)


def trained(model, **changes):
    context = Context(reference=changes.pop("reference", model))
    return dataclasses.replace(SHORT, **changes).apply(model, context), context


@pytest.mark.parametrize(
    "changes",
    [{}, {"dora": True}, {"rank_stabilized": True}, {"start": "pissa"}, {"loss": "kl"}, {"dropout": 0.1}],
    ids=str,
)
def test_it_learns_and_the_model_stays(new_model, layout, changes):
    model = new_model(layout)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    reference = new_model("phi" if layout != "phi" else "llama") if changes.get("loss") == "kl" else model
    made, context = trained(model, reference=reference, **changes)
    losses = [point["loss"] for point in context.record.curve]
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    for name, layer in adapted_layers(made).items():
        torch.testing.assert_close(layer.get_base_layer().weight, before[f"{name}.weight"], rtol=0, atol=0)
    assert len(adapted_layers(made)) == len(linear_layers(model))


def test_fifteen_lines_give_what_peft_gives(new_model):
    """The forward pass of an adapter, from scratch."""
    model = new_model("llama")
    made, _ = trained(model)
    name, layer = next(iter(adapted_layers(made).items()))
    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(1))
    weight = model.get_submodule(name).weight
    torch.testing.assert_close(layer(x), functional.linear(x, weight) + 2.0 * (x @ a.T) @ b.T)


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_scale_and_lengths_by_hand(new_model, dora, stabilized):
    """y = m (W + scale B A) / |W + scale B A| x, with |.| the length of each row; without DoRA m is that length."""
    model = new_model("llama")
    made, _ = trained(model, rank=4, alpha=6.0, dora=dora, rank_stabilized=stabilized)
    for name, layer in adapted_layers(made).items():
        scale = 6 / 4**0.5 if stabilized else 6 / 4
        weight = model.get_submodule(name).weight
        weight = weight + scale * layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
        if dora:
            lengths = layer.lora_magnitude_vector[NAME].weight
            assert not torch.allclose(lengths, model.get_submodule(name).weight.norm(dim=1))  # it was trained
            weight = lengths[:, None] * weight / weight.norm(dim=1, keepdim=True)
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(layer(x), functional.linear(x, weight), rtol=1e-4, atol=1e-5)


def test_how_many_numbers_are_trained(new_model):
    model = new_model("llama")
    made, _ = trained(model, steps=1, rank=3)
    counted = sum(tensor.numel() for tensor in adapters.adapter_tensors(made).values())
    assert counted == sum(3 * sum(layer.weight.shape) for layer in linear_layers(model).values())


@pytest.mark.parametrize(
    ("targets", "count"), [("all", 14), ("attention", 8), ("q_proj/v_proj", 4), ("down_proj", 2)]
)
def test_targets(new_model, targets, count):
    made, _ = trained(new_model("llama"), steps=1, targets=targets)
    assert len(adapted_layers(made)) == count


@pytest.mark.parametrize("start", ["pissa", "residual"])
def test_where_it_starts(new_model, start, monkeypatch):
    """PiSSA computes what the model computed; the start from a residual is nearer to the float model than rounding."""
    monkeypatch.setattr(LoRA, "fit", lambda *_: None)
    reference = new_model("llama")
    base = reference if start == "pissa" else INT4.apply(reference, Context())
    made, _ = trained(base, start=start, reference=reference)
    expected = reference(ROWS[:1]).logits
    if start == "pissa":
        torch.testing.assert_close(made(ROWS[:1]).logits, expected, rtol=1e-4, atol=1e-4)
    else:
        apart = (made(ROWS[:1]).logits - expected).norm()
        assert apart < 0.9 * (base(ROWS[:1]).logits - expected).norm()


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"start": "pissa"}], ids=str)
def test_merged_is_unmerged(new_model, layout, changes):
    made, _ = trained(new_model(layout), **changes)
    whole = parse("merge").apply(made, Context())
    assert not adapted_layers(whole) and adapted_layers(made)
    torch.testing.assert_close(whole(ROWS[:2]).logits, made(ROWS[:2]).logits, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in whole.named_parameters()} == {
        name for name, _ in new_model(layout).named_parameters()
    }


def test_merged_into_packed_weights_is_float(new_model):
    base = INT4.apply(new_model("llama"), Context())
    made, _ = trained(base)
    whole = merged(made)
    assert not packed_layers(whole)
    torch.testing.assert_close(whole(ROWS[:2]).logits, made(ROWS[:2]).logits, rtol=1e-4, atol=1e-4)


# Packed bases


@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_beside_packed_weights_are_those_of_dense_ones(new_model, bits):
    base = RoundToNearest(bits=bits, group_size=32).apply(new_model("llama"), Context())
    dense = parse("quantize.unpack").apply(base, Context())
    found = []
    for model in (base, dense):
        torch.manual_seed(3)
        adapters.attach(model, SHORT.config(list(linear_layers(dense))))
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[NAME].weight, std=0.1)
        training.cross_entropy(model, ROWS).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    packed, expected = found
    assert packed.keys() == expected.keys() and len(packed) == 28
    for name, gradient in expected.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6)


def test_no_dense_weight_is_kept_between_the_passes(new_model):
    layer = next(
        one
        for one in packed_layers(INT4.apply(new_model("llama"), Context())).values()
        if isinstance(one, PackedLinear)
    )
    x = torch.randn(5, layer.in_features, requires_grad=True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
        layer(x).sum().backward()
    assert torch.Size([layer.out_features, layer.in_features]) not in kept
    torch.testing.assert_close(x.grad, layer.tensor.dequantize().sum(0).expand(5, -1))


def test_qlora_wants_packed_layers(new_model):
    reference = new_model("llama")
    technique = QLoRA(steps=1, batch=2, length=24)
    with pytest.raises(RecipeError, match="is in float; quantize first, or use lora"):
        technique.apply(reference, Context(reference=reference))
    assert adapted_layers(technique.apply(INT4.apply(reference, Context()), Context(reference=reference)))


# Files


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers for it
def test_peft_reads_what_we_write_and_we_read_what_peft_writes(new_model, tmp_path):
    model = new_model("llama")
    made, _ = trained(model)
    ours = tmp_path / "ours"
    ours.mkdir()
    adapters.write(made, ours)
    theirs = peft.PeftModel.from_pretrained(new_model("llama"), ours)
    torch.testing.assert_close(theirs(ROWS[:1]).logits, made(ROWS[:1]).logits)
    theirs.save_pretrained(tmp_path / "theirs")
    back = new_model("llama")
    adapters.read(back, tmp_path / "theirs")
    torch.testing.assert_close(back(ROWS[:1]).logits, made(ROWS[:1]).logits)


def test_several_on_one_base(new_model, tmp_path):
    model, logits = new_model("llama"), {}
    for name, seed in (("one", 1), ("two", 2)):
        made = SHORT.apply(model, Context(reference=model, seed=seed))
        (tmp_path / name).mkdir()
        adapters.write(made, tmp_path / name)
        logits[name] = made(ROWS[:1]).logits
    base = new_model("llama")
    for name in logits:
        adapters.read(base, tmp_path / name, name)
    for name in ("two", "one", "two"):
        adapters.use(base, name)
        torch.testing.assert_close(base(ROWS[:1]).logits, logits[name])
    adapters.use(base, None)
    torch.testing.assert_close(base(ROWS[:1]).logits, model(ROWS[:1]).logits)


def test_an_adapter_of_another_model_is_refused(new_model, tmp_path):
    made, _ = trained(new_model("llama"))
    adapters.write(made, tmp_path)
    for other in (new_model("llama", hidden_size=32), new_model("phi")):
        with pytest.raises(AdapterError, match="is of another model"):
            adapters.read(other, tmp_path)
        assert not adapted_layers(other)
    other = new_model("llama")
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(AdapterError, match="was trained beside other weights"):
        adapters.read(other, tmp_path)
    (tmp_path / adapters.BASE).unlink()  # as PEFT leaves it, which says nothing of the base
    adapters.read(other, tmp_path)
    assert adapted_layers(other)
    with pytest.raises(AdapterError, match="holds no adapter of PEFT's"):
        adapters.read(new_model("llama"), tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("lora:rank=0", "at least 1"),
        ("lora:dropout=1", "0 to below 1"),
        ("lora:alpha=-1", "alpha=-1.0 should be above 0"),
        ("lora:dora=true,start=pissa", "choose one"),
        ("recover:rank=0", "recover:rank=0 should be"),
        ("recover:rank=16", "belongs to adapter=lora"),
    ],
)
def test_settings_that_mean_nothing(recipe, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(recipe)


def test_unknown_targets_are_listed(new_model):
    with pytest.raises(
        RecipeError, match="no linear layer called k_prj; there are down_proj, gate_proj, k_proj"
    ):
        trained(new_model("llama"), targets="q_proj/k_prj")


@pytest.mark.parametrize(
    "after",
    [
        "quantize.kv",
        "quantize.bf16",
        "quantize.rtn",
        "quantize.embedding",
        "prune.magnitude",
        "prune.layers:drop=0",
        "recover:loss=ce",
        "distill",
        "lowrank.svd",
    ],
)
def test_only_merge_follows_an_adapter(after, new_model):
    made, context = trained(new_model("llama"), steps=1)
    with pytest.raises(RecipeError, match="without an adapter, and this one has one; put merge before"):
        parse(after).apply(made, context)


def test_a_residual_needs_weights_that_were_rounded_and_nothing_else(new_model):
    reference = new_model("llama")
    rounded = parse("prune.layers:drop=0").apply(reference, Context())
    packed = INT4.apply(rounded, Context())
    with pytest.raises(RecipeError, match="makes up for rounding alone"):
        trained(packed, reference=reference, start="residual")


@pytest.mark.parametrize("before", ["prune.magnitude:sparsity=0.5", "prune.channels:by=magnitude,share=0.5"])
def test_a_residual_does_not_bring_back_what_was_removed(before, new_model):
    reference = new_model("llama")
    packed = INT4.apply(parse(before).apply(reference, Context()), Context())
    with pytest.raises(RecipeError, match="makes up for rounding alone"):
        trained(packed, reference=reference, start="residual")


def test_a_residual_does_not_take_back_what_was_learned(new_model):
    reference = new_model("llama")
    packed = INT4.apply(parse("merge").apply(trained(reference)[0], Context()), Context())
    context = Context(reference=reference)
    context.record.train_tokens = 1000
    with pytest.raises(RecipeError, match="something else has changed the weights"):
        QLoRA(start="residual", steps=1, batch=2, length=24).started(packed, context)


def test_adapters_are_trained_in_float32_whatever_the_base_is(new_model):
    model = parse("quantize.bf16").apply(new_model("llama"), Context())
    made, _ = trained(model)
    layers = adapted_layers(made)
    assert {layer.lora_A[NAME].weight.dtype for layer in layers.values()} == {torch.float32}
    assert {layer.get_base_layer().weight.dtype for layer in layers.values()} == {torch.bfloat16}
    assert made(torch.arange(8)[None]).logits.isfinite().all()


def test_an_adapter_that_does_not_agree_with_itself(new_model, tmp_path):
    made, _ = trained(new_model("llama"), rank=4)
    adapters.write(made, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(AdapterError, match="its settings say rank 8, and model"):
        adapters.read(new_model("llama"), tmp_path)


def test_a_rank_above_what_there_is_to_begin_from(new_model):
    with pytest.raises(RecipeError, match="rank=200 is above the"):
        trained(new_model("llama"), rank=200, start="pissa")


def test_the_seed_alone_decides_where_an_adapter_begins(new_model):
    model, begun = new_model("llama"), []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        begun.append(SHORT.started(model, Context(seed=7)))
    first, second = ([layer.lora_A[NAME].weight for layer in adapted_layers(one).values()] for one in begun)
    assert all(map(torch.equal, first, second))


def test_one_adapter_at_a_time(new_model):
    made, _ = trained(new_model("llama"), steps=1)
    with pytest.raises(RecipeError, match="merge it before"):
        trained(made)
    with pytest.raises(RecipeError, match="there is none; put lora before it"):
        parse("merge").apply(new_model("llama"), Context())
