"""Structured pruning: counts worked by hand, exactness on five layouts, criteria on made models, saved and loaded."""

import pytest
import torch

from edgelab.model.blocks import blocks, half_precision
from edgelab.model.losses import cross_entropy
from edgelab.recipes import Context, RecipeError, Record, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.techniques import calibration
from edgelab.techniques.observing import input_sizes, nll_behind, taylor
from edgelab.techniques.pruning.layers import without
from edgelab.techniques.pruning.structured import stay

LAYOUTS = ["llama", "qwen3", "gemma", "phi", "stablelm"]
IDS = torch.arange(2, 66)[None]


@pytest.fixture
def context(byte_tokenizer, monkeypatch, story) -> Context:
    """A context whose calibration text is the story of the tests."""
    monkeypatch.setattr(calibration.corpora, "tokenize", lambda corpus, tokenizer, split: story)
    return Context(tokenizer=byte_tokenizer, record=Record())


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# Channels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", ["taylor", "activation", "magnitude", "random"])
def test_channels_that_do_nothing_go_first_and_nothing_changes(layout, by, new_model, context):
    model = new_model(layout)
    idle = torch.arange(0, 192, 4)  # a quarter of the channels of each MLP
    with torch.no_grad():
        for block in model.model.layers:
            reader = getattr(block.mlp, "down_proj", None) or block.mlp.fc2
            reader.weight[:, idle] = 0
            if by == "magnitude":
                for name in ("gate_proj", "up_proj", "fc1"):
                    if hasattr(block.mlp, name):
                        getattr(block.mlp, name).weight[idle] = 0
    recipe = f"prune.channels:share=0.25,by={by},samples=2,length=64"
    pruned = parse(recipe).apply(model, context)
    assert pruned.config.intermediate_size == 144
    removed = 48 * 64 * (2 if layout == "phi" else 3) + (48 if layout == "phi" else 0)
    assert parameters(model) - parameters(pruned) == 2 * removed
    same = torch.allclose(pruned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    assert same == (by != "random")


def test_uneven_channels_are_saved_and_loaded(tiny):
    source = resolve(str(tiny))
    recipe = parse("prune.channels:share=0.3,by=magnitude,by_layer=global,multiple=8")
    folder = variants.build(recipe, source, 0, lambda done, total: None)
    loaded = variants.load(folder)
    widths = [block.mlp.down_proj.in_features for block in loaded.model.layers]
    assert all(width % 8 == 0 for width in widths) and sum(widths) >= 0.7 * 384
    about = variants.read_about(folder)
    assert about["size"]["parameters"] == parameters(loaded)
    assert loaded(IDS).logits.isfinite().all()


def test_which_stay_by_hand():
    scores = torch.tensor([[4.0, 1, 3, 2], [8, 7, 6, 5]])
    assert [kept.tolist() for kept in stay(scores, 0.5, "uniform")] == [[0, 2], [0, 1]]
    assert [kept.tolist() for kept in stay(scores, 0.5, "global")] == [[0], [0, 1, 2, 3]]
    assert [kept.tolist() for kept in stay(scores, 0.5, "global", multiple=2)] == [[0, 2], [0, 1, 2, 3]]
    with pytest.raises(RecipeError, match="leaves none"):
        stay(scores, 0.9, "uniform")


# Heads


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma", "stablelm"])
@pytest.mark.parametrize("setting", ["groups=1", "queries=1"])
def test_heads_that_do_nothing_go_first_and_nothing_changes(layout, setting, new_model, context):
    model = new_model(layout)  # 4 query heads of 16 on 2 key-value heads
    size = 16
    idle = [2, 3] if setting == "groups=1" else [1, 2]
    with torch.no_grad():
        for block in model.model.layers:
            for head in idle:
                block.self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0
    pruned = parse(f"prune.heads:{setting},samples=2,length=64").apply(model, context)
    attention = pruned.model.layers[0].self_attn
    assert attention.q_proj.out_features == attention.o_proj.in_features == 2 * size
    assert attention.k_proj.out_features == (1 if setting == "groups=1" else 2) * size
    assert (pruned.config.num_attention_heads, pruned.config.head_dim) == (2, size)
    assert torch.allclose(pruned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_would_be_read_back_as_another_model_is_refused(folder_of, context):
    """StableLM divides its width by the number of heads, whatever the configuration says of their size."""
    source = resolve(str(folder_of("stablelm")))
    recipe = parse("prune.heads:groups=1,by=magnitude")
    with pytest.raises(
        variants.VariantError, match="makes of a StableLmForCausalLM is another model when it is read"
    ):
        variants.build(recipe, source, 0, lambda done, total: None)
    assert not variants.address(recipe, source, 0).exists()


def test_what_is_said_of_each_layer_goes_with_it(new_model, context):
    model = new_model("llama", num_hidden_layers=4)
    model.config.no_rope_layers = [1, 1, 0, 1]
    assert parse("prune.layers:drop=1").apply(model, context).config.no_rope_layers == [1, 0, 1]


def test_heads_are_an_ordinary_model_on_disk(tiny, context):
    source = resolve(str(tiny))
    recipe = parse("prune.heads:groups=1,by=magnitude")
    folder = variants.build(recipe, source, 0, lambda done, total: None)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(plain(IDS).logits, variants.load(folder)(IDS).logits, atol=1e-5)


# Layers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", ["influence", "angular"])
def test_a_block_that_does_nothing_goes_first_and_nothing_changes(layout, by, new_model, context):
    model = new_model(layout, num_hidden_layers=4)
    with torch.no_grad():
        for name, parameter in model.model.layers[2].named_parameters():
            if name.split(".")[-2] in ("o_proj", "dense", "down_proj", "fc2"):
                parameter.zero_()
    pruned = parse(f"prune.layers:keep=3,by={by},samples=2,length=64").apply(model, context)
    assert len(pruned.model.layers) == pruned.config.num_hidden_layers == 3
    assert torch.allclose(pruned(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    out = pruned.generate(
        IDS[:, :8], max_new_tokens=4, do_sample=False
    )  # caches count the blocks that are left
    assert out.shape == (1, 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_decides_as_if_every_choice_had_been_tried(layout, new_model, context):
    model = new_model(layout, num_hidden_layers=4)
    tokens = parse("prune.layers:keep=3,samples=2,length=64").techniques[0].draw(context, 4096)

    def best(gone: set[int]) -> set[int]:
        tried = {place: gone | {place} for place in range(4) if place not in gone}
        with torch.no_grad(), half_precision():
            losses = {
                place: float(cross_entropy(without(model, those), tokens)) for place, those in tried.items()
            }
        return tried[min(losses, key=losses.get)]

    ids = tokens[:1]
    for recipe, gone in (("keep=3,by=nll", best(set())), ("keep=2,by=greedy", best(best(set())))):
        pruned = parse(f"prune.layers:{recipe},samples=2,length=64").apply(model, context)
        assert torch.equal(pruned(ids).logits, without(model, gone)(ids).logits)


def test_named_blocks_and_even_ones(new_model, context):
    model = new_model("llama", num_hidden_layers=5)
    assert without(model, {1, 3}).config.num_hidden_layers == 3
    kept = parse("prune.layers:keep=3,by=even").apply(model, context)
    for ours, place in zip(kept.model.layers, (0, 2, 4), strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, model.model.layers[place].mlp.up_proj.weight)
    named = parse("prune.layers:drop=1/3").apply(model, context)
    assert torch.equal(named(IDS).logits, kept(IDS).logits)
    assert [block.self_attn.layer_idx for block in named.model.layers] == [0, 1, 2]


# Hidden size


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma"])
def test_a_rotation_that_removes_nothing_changes_nothing(layout, new_model, context):
    model = new_model(layout)
    turned = parse("prune.hidden:share=0,samples=2,length=64").apply(model, context)
    torch.testing.assert_close(turned(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(turned.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=0.1)


@pytest.mark.parametrize("layout", ["llama", "qwen3", "gemma"])
def test_directions_that_carry_nothing_go_first_and_nothing_changes(layout, new_model, context):
    model = new_model(layout)
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    subspace = turn[:, :48] @ turn[:, :48].T  # all that is written to the stream lies in 48 directions
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ subspace)
        for block in model.model.layers:
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.weight.copy_(subspace @ layer.weight)
    narrow = parse("prune.hidden:share=0.25,samples=2,length=64").apply(model, context)
    assert narrow.config.hidden_size == 48 and narrow.model.layers[0].mlp.up_proj.in_features == 48
    torch.testing.assert_close(narrow(IDS).logits, model(IDS).logits, atol=1e-3, rtol=1e-3)
    linear = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    head = 300 * 64
    assert parameters(narrow) == 0.75 * (linear - head) + 2 * 300 * 48 + 5 * 48 + parameters_of_heads(narrow)


def parameters_of_heads(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "q_norm" in name or "k_norm" in name)


def test_norms_with_a_mean_are_refused(new_model, context):
    with pytest.raises(RecipeError, match="needs RMSNorm"):
        parse("prune.hidden:samples=2,length=64").apply(new_model("stablelm"), context)
    with pytest.raises(RecipeError, match="knows models with input_layernorm and post_attention_layernorm"):
        parse("prune.hidden:samples=2,length=64").apply(new_model("phi"), context)


# What is looked at


def test_the_loss_behind_the_blocks_is_that_of_the_model(new_model):
    for layout in LAYOUTS:
        model = new_model(layout)
        tokens = torch.stack([IDS[0, :32], IDS[0, 32:]])
        found, hidden = blocks(model, tokens)
        with torch.no_grad():
            for block in found:
                hidden = block(hidden)
        whole = cross_entropy(model, tokens)
        assert nll_behind(model, found, hidden, tokens) == pytest.approx(whole.item(), rel=1e-5), layout


def test_taylor_is_the_slope_of_a_gate_on_each_channel(new_model):
    model = new_model("llama")
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    found = taylor(model, [name], IDS, lambda done, total: None)[name]
    gate = torch.ones(layer.in_features, requires_grad=True)
    hook = layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * gate,))
    slope = torch.autograd.grad(cross_entropy(model, IDS), gate)[0]
    hook.remove()
    torch.testing.assert_close(found, slope.abs(), rtol=0.1, atol=0.05 * float(slope.abs().max()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_sizes_of_inputs_are_root_mean_squares(new_model):
    model = new_model("llama")
    name = "model.layers.1.mlp.down_proj"
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    found = input_sizes(model, [name], IDS, lambda done, total: None)[name]
    hook.remove()
    torch.testing.assert_close(found, seen[0][0].float().square().mean(0).sqrt())


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("prune.layers", "takes keep"),
        ("prune.layers:keep=2,drop=1", "takes keep"),
        ("prune.layers:drop=a", "no list of blocks"),
        ("prune.layers:drop=1,by=even", "one of the two"),
        ("prune.heads", "takes groups"),
        ("prune.heads:queries=1,by_layer=global", "needs groups"),
        ("prune.channels:share=1", "below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(recipe, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(recipe)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("prune.layers:keep=3", "more than the 2 blocks"),
        ("prune.layers:drop=0/1", "not all"),
        ("prune.layers:drop=7", "blocks 0 to 1"),
        ("prune.heads:groups=3", "more than there are: 2"),
    ],
)
def test_amounts_that_the_model_does_not_have_are_refused(recipe, sentence, new_model, context):
    with pytest.raises(RecipeError, match=sentence):
        parse(recipe).apply(new_model("llama"), context)


def test_other_layouts_name_those_that_are_supported(new_model, context):
    with pytest.raises(RecipeError, match="Llama, Qwen2, Qwen3, Gemma, Phi and StableLM are supported"):
        parse("prune.channels").apply(new_model("phi3", pad_token_id=0), context)
    with pytest.raises(RecipeError, match="before they are quantized"):
        parse("quantize.rtn:group_size=32 + prune.heads:groups=1").apply(new_model("llama"), context)
