"""The quantized key-value cache: tensors worked by hand, the bound of its error, real caches, variants and rows."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoConfig, DynamicCache

from edgelab import lab
from edgelab.devices import (
    PRECISIONS,
    ModelShape,
    fits_and_speed,
    inference_memory,
    kv_cache_bytes,
    models,
    operations,
)
from edgelab.measure.perplexity import Protocol, evaluate
from edgelab.measure.size import kv_cache_mb_per_1k
from edgelab.model import logits as model_logits
from edgelab.model.logits import last_hidden_states
from edgelab.model.marks import marked, marks_of
from edgelab.recipes import Context, RecipeError, parse
from edgelab.runtimes.eager import Eager, Simulated
from edgelab.storage import variants
from edgelab.storage.kv_cache import (
    CacheGrid,
    QuantizedCacheError,
    QuantizedLayer,
    dequantize_keys,
    dequantize_values,
    quantize_groups,
    quantize_keys,
    quantize_values,
)
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.quantization.rtn import GroupSizeError

BITS = [8, 4, 2]


def apply(text, model):
    for technique in parse(text).techniques:
        model = technique.apply(model, Context())
    return model


def states(tokens, seed=0):
    """Keys or values of two heads with 16 channels, as the tiny Llama has."""
    return torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def filled(grid, config, tokens, steps=(1,)):
    """A cache of `tokens` seeded random tokens that came in `steps`, repeated, and the tokens themselves."""
    cache, keys, values = grid.new_cache(config), states(tokens), states(tokens, seed=1)
    begin, turn = 0, 0
    while begin < tokens:
        end = min(begin + steps[turn % len(steps)], tokens)
        for layer in range(config.num_hidden_layers):
            cache.update(keys[:, :, begin:end], values[:, :, begin:end], layer)
        begin, turn = end, turn + 1
    return cache, keys, values


def final_states(model, ids):
    with torch.inference_mode():
        return last_hidden_states(model, ids)


@pytest.fixture(scope="module")
def config(folder_of):
    return AutoConfig.from_pretrained(folder_of("llama"))


def test_two_bits_by_hand():
    # From -1 to 2 in three steps of 1; 0.4 goes down, 0.6 up. The second group lies on its grid of 0.5.
    groups = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [10.0, 10.5, 11.0, 11.5]])
    grid = quantize_groups(groups, 2)
    assert (grid.low.tolist(), grid.scale.tolist()) == ([-1.0, 10.0], [1.0, 0.5])
    assert grid.packed.tolist() == [[0 + 1 * 4 + 2 * 16 + 3 * 64], [0 + 1 * 4 + 2 * 16 + 3 * 64]]
    assert grid.dequantize().tolist() == [[-1.0, 0.0, 1.0, 2.0], [10.0, 10.5, 11.0, 11.5]]
    assert grid.low.dtype == grid.scale.dtype == torch.float16 and grid.packed.dtype == torch.uint8


GROUPS = arrays(
    "float32",
    st.tuples(st.integers(1, 4), st.sampled_from([8, 16, 32])),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False) | st.floats(100, 100.0625, width=32),
).map(torch.from_numpy)


@given(GROUPS, st.sampled_from(BITS))
def test_error_is_at_most_half_a_scale(groups, bits):
    """Nothing is clipped, so no more than the rounding; 2**-20 is float32 arithmetic on numbers up to the largest."""
    grid = quantize_groups(groups, bits)
    unit = 2.0**grid.exponent
    scale = grid.scale.float()[:, None] * unit
    slack = 2**-20 * (scale + groups.abs().amax(-1, keepdim=True))
    assert ((grid.dequantize() - groups).abs() <= scale / 2 + slack).all()
    assert (grid.low.float() * unit <= groups.amin(-1)).all()  # outwards, not merely near


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("constant", [0.0, 3.0, -100.0625])
def test_constant_groups(bits, constant):
    grid = quantize_groups(torch.full((1, 8), constant), bits)
    assert grid.scale.item() == 2**-14
    torch.testing.assert_close(grid.dequantize(), torch.full((1, 8), constant))


@given(st.integers(-40, 40), st.sampled_from(BITS))
def test_numbers_of_any_size_err_by_half_a_step(power, bits):
    """Group by group, 100,000 between the largest and the smallest: half a step of its own range, and 2**-8 of that
    for scale and minimum in eleven bits."""
    groups = states(32).flatten(1, 2).repeat(1, 2, 1) * torch.logspace(-5, 0, 128)[:, None]
    grid = quantize_groups(groups * 2.0**power, bits)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / (2**bits - 1)
    error = grid.dequantize() * 2.0**-power - groups
    assert (error.abs() <= step * (0.5 + 2**-8)).all()
    beyond = quantize_groups(groups[-1:].abs() * 2.0**power, bits)  # of one sign: no minimum beyond float16
    assert ((beyond.dequantize() * 2.0**-power - groups[-1:].abs()).abs() <= step[-1:]).all()
    assert grid.scale.dtype == grid.low.dtype == torch.float16


@pytest.mark.parametrize("powers", [(-30, 0), (0, -30), (0, 18), (-30, -31, -29, 3), (20, 0, -8)])
def test_batches_of_different_size_lie_in_one_cache(powers):
    """Values come token by token, and neither large nor small ones may spoil what is packed already."""
    batches = [states(32, seed) * 2.0**power for seed, power in enumerate(powers)]
    first, *others = (quantize_values(batch, 8, 16) for batch in batches)
    for other in others:
        first = first.append(other)
    for batch, found in zip(batches, dequantize_values(first, torch.float32).split(32, 2), strict=True):
        largest = max(one.abs().max() for one in batches)
        step = (batch.amax(-1, keepdim=True) - batch.amin(-1, keepdim=True)) / 255
        assert ((found - batch).abs() <= step * (0.5 + 2**-8) + largest * 2.0**-30).all()


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("bits", BITS)
def test_values_in_another_unit_cost_as_much(bits, factor, new_model):
    """What v_proj multiplies, o_proj divides: the same model, whose cache goes beyond float16."""
    plain = new_model("llama")
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        for block in scaled.model.layers:
            block.self_attn.v_proj.weight *= factor
            block.self_attn.o_proj.weight /= factor
    ids = torch.randint(2, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    recipe = f"quantize.kv:bits={bits},group_size=8,residual=8"
    found, expected, exact = (
        final_states(model, ids) for model in (apply(recipe, scaled), apply(recipe, plain), plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * (expected - exact).abs().max().item())


def test_keys_share_scales_per_channel_and_values_per_token():
    """One channel of the keys, and one token of the values, are a thousand times the others."""
    keys, values = states(64), states(64)
    keys[..., 5] *= 1000
    values[:, :, 7] *= 1000
    by_channel, by_token = quantize_keys(keys, 4, 32), quantize_values(values, 4, 8)
    assert by_channel.scale.shape == (1, 2, 2, 16)  # (batch, heads, groups of tokens, channels)
    assert by_token.scale.shape == (1, 2, 64, 2)  # (batch, heads, tokens, groups of channels)
    usual = torch.arange(16) != 5
    assert (by_channel.scale[..., 5] > 100).all() and (by_channel.scale[..., usual] < 1).all()
    usual = torch.arange(64) != 7
    assert (by_token.scale[:, :, 7] > 30).all() and (by_token.scale[:, :, usual] < 1).all()
    span = keys[0, 1, 32:, 3].max() - keys[0, 1, 32:, 3].min()
    assert by_channel.scale[0, 1, 1, 3].item() == pytest.approx(span.item() / 15, rel=2e-3)
    span = values[0, 1, 9, 8:].max() - values[0, 1, 9, 8:].min()
    assert by_token.scale[0, 1, 9, 1].item() == pytest.approx(span.item() / 15, rel=2e-3)


def test_keys_and_values_come_back_in_place():
    keys = torch.arange(2 * 16 * 8).reshape(1, 2, 16, 8) / 4
    for quantize, dequantize in ((quantize_keys, dequantize_keys), (quantize_values, dequantize_values)):
        restored = dequantize(quantize(keys, 8, 8), torch.float32)
        torch.testing.assert_close(restored, keys, atol=0.25, rtol=0)  # the largest spans 56 / 4 in 255 steps


def test_recent_tokens_are_exact_and_older_ones_near(config):
    """50 tokens one by one: 32 packed, as two groups of 16, and 18 kept; each step returns all of them."""
    cache, keys, values = filled(CacheGrid(bits=8, group_size=16, residual=10), config, 50)
    layer = cache.layers[0]
    assert cache.get_seq_length() == 50 and layer.keys.shape[-2] == layer.values.shape[-2] == 18
    assert layer.packed_keys.packed.shape == (1, 2, 2, 16, 16)
    all_keys, all_values = layer.update(keys[:, :, :1], values[:, :, :1])
    assert torch.equal(all_keys[:, :, 32:50], keys[:, :, 32:])
    assert torch.equal(all_values[:, :, 32:50], values[:, :, 32:])
    for found, wanted in ((all_keys, keys), (all_values, values)):
        error = (found[:, :, :32] - wanted[:, :, :32]).abs()
        assert 0 < error.max() <= (wanted.max() - wanted.min()) / 255 / 2


@given(st.integers(0, 40), st.sampled_from([8, 16]), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_tokens_within_the_residual_are_exact(residual, group_size, steps):
    """Whatever the steps, what is packed is whole groups and only what has left the residual."""
    layer, exact = QuantizedLayer(CacheGrid(4, group_size, residual)), DynamicCache()
    for step, size in enumerate(steps):
        new = states(size, seed=2 * step), states(size, seed=2 * step + 1)
        before = layer.keys.shape[-2] if layer.is_initialized else 0
        keys, values = layer.update(*new)
        true_keys, true_values = exact.update(*new, 0)
        assert keys.shape == true_keys.shape
        assert torch.equal(keys[:, :, -before - size :], true_keys[:, :, -before - size :])
        assert torch.equal(values[:, :, -before - size :], true_values[:, :, -before - size :])
        recent = layer.keys.shape[-2]
        assert min(residual, sum(steps[: step + 1])) <= recent < residual + group_size
        assert layer.get_seq_length() == true_keys.shape[-2]


def test_steps_do_not_matter(config):
    """What is packed is packed once: 100 tokens one by one, in chunks of 7 and 40, and at once are the same bytes."""
    grid = CacheGrid(4, 16, 8)
    first, *others = (filled(grid, config, 100, steps)[0].layers[1] for steps in ((1,), (7, 40), (100,)))
    for other in others:
        assert torch.equal(first.packed_keys.packed, other.packed_keys.packed)
        assert torch.equal(first.packed_values.packed, other.packed_values.packed)
        assert torch.equal(first.packed_keys.scale, other.packed_keys.scale)
        assert torch.equal(first.values, other.values)


def test_bytes_by_hand(config):
    # 100 tokens, residual 32, groups of 32: 64 packed, 36 recent. Heads of 16 channels, so values in groups of 16.
    # A head: 64 x 16 x 2 numbers of half a byte; 2 x 16 + 64 x 1 grids of 4 bytes; 36 x 16 x 2 numbers of 4 bytes.
    by_hand = 1024 + 384 + 4608
    grid = CacheGrid(bits=4, group_size=32, residual=32)
    cache, _, _ = filled(grid, config, 100)
    assert cache.nbytes == grid.nbytes(config, 100) == 2 * 2 * by_hand  # layers x heads


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [20, 100, 1000])
def test_the_estimate_of_a_cache_is_its_bytes(bits, tokens, config):
    """With recent tokens in 16 bits, as models that are estimated have them."""
    cache = CacheGrid(bits, 32, 32).new_cache(config)
    new = states(tokens).half()
    for layer in range(config.num_hidden_layers):
        cache.update(new, new, layer)
    shape = ModelShape.from_config(config)
    assert cache.nbytes == kv_cache_bytes(shape, tokens, bits)
    assert inference_memory(shape, context=tokens, batch=3, kv_bits=bits).kv_cache_gb == pytest.approx(
        3 * cache.nbytes / 1e9
    )
    attention = next(
        one
        for one in operations(shape, PRECISIONS["float16"], tokens, kv_bits=bits)
        if one.name == "attention"
    )
    assert attention.bytes == cache.nbytes


def test_a_4_bit_cache_of_a_7b_model_by_hand():
    # 32 layers x 32 heads x 128 channels x keys and values: 262,144 numbers a token. Of 4,096 tokens the last 32 keep 2
    # bytes; 4,064 are packed: half a byte a number, and 4 bytes of scale and minimum for every 32.
    by_hand = 262_144 * (32 * 2 + 4_064 * (1 / 2 + 4 / 32))
    assert by_hand == 682_622_976
    shape = models()["Llama-2-7B"]
    assert inference_memory(shape, context=4096, kv_bits=4).kv_cache_gb == by_hand / 1e9
    assert fits_and_speed({"7B": shape}, kv_bits=4, context=4096)["kv_cache_mb"].unique() == [by_hand / 1e6]
    config = AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    assert CacheGrid(4, 32, 32).nbytes(config, 4096, 2) == by_hand


@pytest.mark.parametrize("tokens", [5, 31, 1000])
@pytest.mark.parametrize("bits", BITS)
def test_bytes_counted_are_those_of_a_real_cache(bits, tokens, layout, new_model):
    model = apply(f"quantize.kv:bits={bits},residual=24,group_size=8", new_model(layout))
    cache = marks_of(model).cache.new_cache(model.config)
    with torch.inference_mode():
        model.base_model(torch.arange(tokens)[None] % 300, past_key_values=cache, use_cache=True)
    assert cache.nbytes == marks_of(model).cache.nbytes(model.config, tokens)
    storages = {
        tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values)
    }
    if tokens > 31:  # no view of a larger tensor is kept
        assert storages == {cache.layers[0].keys.nbytes}
        assert kv_cache_mb_per_1k(variants.describe(model), 4) == cache.nbytes / 1e6


def test_a_residual_longer_than_the_text_is_the_exact_cache(layout, new_model):
    model = new_model(layout)
    marked = apply("quantize.kv:bits=2,residual=500", model)
    ids = torch.randint(2, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(final_states(marked, ids), final_states(model, ids), rtol=1e-5, atol=1e-5)


def test_chunks_through_an_exact_cache_equal_one_pass(tiny_reference, story):
    """The hook is any object that makes a cache."""

    class Exact:
        def new_cache(self, config):
            return DynamicCache(config=config)

    model, rules = copy.deepcopy(tiny_reference.model), Protocol("short", window=100)
    whole = evaluate(model, tiny_reference.tokenizer, story, rules, limit=3)
    model = marked(model, cache=Exact())
    chunked = evaluate(model, tiny_reference.tokenizer, story, rules, limit=3)
    assert chunked.nll_per_window == pytest.approx(whole.nll_per_window, rel=1e-5)


def test_chunks_see_a_rounded_past_as_decoding_does(tiny_reference, monkeypatch):
    """With chunks of one token the states are those of decoding token by token, and far from the exact ones."""
    marked = apply("quantize.kv:bits=2,group_size=8,residual=0", tiny_reference.model)
    ids = torch.randint(2, 300, (1, 60), generator=torch.Generator().manual_seed(0))
    cache = marks_of(marked).cache.new_cache(marked.config)
    with torch.inference_mode():
        steps = [marked.base_model(ids[:, [i]], past_key_values=cache).last_hidden_state for i in range(60)]
    monkeypatch.setattr(model_logits, "CHUNK", 1)
    found, exact = final_states(marked, ids), final_states(tiny_reference.model, ids)
    assert torch.equal(found, torch.cat(steps, 1))
    torch.testing.assert_close(found[:, :8], exact[:, :8], rtol=1e-5, atol=1e-5)
    assert (found[:, 8:] - exact[:, 8:]).abs().mean() > 0.01


@pytest.mark.parametrize("runtime", [Eager, Simulated])
def test_generation_reads_the_packed_cache(runtime, layout, new_model, tmp_path):
    """Twelve tokens from a saved variant are those of a loop over the same cache, and are packed as they come."""
    model = apply("quantize.kv:bits=4,group_size=8,residual=8", new_model(layout))
    variants.save(model, tmp_path / "variant", {})
    engine = runtime(tmp_path / "variant")
    assert engine.kernel.endswith(" + int4 cache")
    prompt = list(range(2, 32))
    tokens = [engine.prefill(prompt)]
    while len(tokens) < 12:
        tokens.append(engine.decode(tokens[-1]))
    assert engine.length == 30 + 11

    cache, wanted, new = marks_of(model).cache.new_cache(model.config), [], prompt
    with torch.inference_mode():
        for _ in tokens:
            logits = model(torch.tensor([new]), past_key_values=cache, use_cache=True).logits
            new = [int(logits[0, -1].argmax())]
            wanted += new
    assert tokens == wanted
    assert engine.prefill(prompt) == tokens[0] and engine.length == 30  # a fresh cache


def test_generate_of_transformers_takes_the_cache(new_model):
    model = apply("quantize.kv:bits=8,group_size=8,residual=8", new_model("llama"))
    prompt = torch.arange(2, 42)[None]
    cache = marks_of(model).cache.new_cache(model.config)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    found = model.generate(prompt, past_key_values=cache, **options)
    assert cache.get_seq_length() == 47 and found.shape == (1, 48)
    cache = marks_of(model).cache.new_cache(model.config)
    assert model.generate(prompt, past_key_values=cache, num_beams=3, **options).shape == (1, 48)


def test_sequences_of_a_batch_move_together(config):
    grid = CacheGrid(4, 16, 8)
    cache, keys, values = filled(grid, config, 40)
    cache.batch_repeat_interleave(2)
    layer = cache.layers[0]
    layer.packed_keys.packed[1] = 0
    layer.values[1] = 0
    cache.reorder_cache(torch.tensor([1, 0]))
    assert not layer.packed_keys.packed[0].any() and not layer.values[0].any()
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes == grid.nbytes(config, 40)
    again, _ = layer.update(keys[:, :, :1], values[:, :, :1])
    untouched, _ = filled(grid, config, 40)[0].layers[0].update(keys[:, :, :1], values[:, :, :1])
    assert torch.equal(again, untouched)


def test_only_recent_tokens_can_be_cropped(config):
    cache, keys, _ = filled(CacheGrid(4, 16, 8), config, 40)  # 32 packed
    cache.crop(-8)
    assert cache.get_seq_length() == 32 and not cache.is_croppable
    with pytest.raises(QuantizedCacheError, match=r"^3 tokens cannot be taken .* only the last 0"):
        cache.crop(-3)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    cache.update(keys[:, :, :5], keys[:, :, :5], 0)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize(
    "text", ["quantize.kv:bits=2,residual=7", "quantize.rtn:bits=4,group_size=32 + quantize.kv:bits=4"]
)
def test_variant_round_trip(text, new_model, tmp_path):
    model = apply(text, new_model("qwen3"))
    variants.save(model, tmp_path / "variant", {})
    loaded = variants.load(tmp_path / "variant")
    assert marks_of(loaded) == marks_of(model) == variants.read_description(tmp_path / "variant").marks
    ids = torch.arange(2, 120)[None]
    assert torch.equal(final_states(loaded, ids), final_states(model, ids))


def test_a_variant_without_quantized_cache_has_none(new_model, tmp_path):
    variants.save(new_model("llama"), tmp_path / "variant", {})
    assert marks_of(variants.load(tmp_path / "variant")).cache is None
    assert variants.read_description(tmp_path / "variant").marks.cache is None


@pytest.mark.parametrize(
    "order", ["quantize.rtn:group_size=32 + quantize.kv", "quantize.kv + quantize.rtn:group_size=32"]
)
def test_combines_with_quantized_weights(order, new_model):
    model = new_model("llama")
    both = apply(order, model)
    assert marks_of(both).cache == CacheGrid(4, 32, 32)
    assert sum(isinstance(module, PackedLinear) for module in both.modules()) == 14
    assert marks_of(model).cache is None
    rounded, ids = apply("quantize.rtn:group_size=32", model), torch.arange(2, 130)[None]
    found, alone = final_states(both, ids), final_states(rounded, ids)
    torch.testing.assert_close(found[:, :64], alone[:, :64], rtol=1e-5, atol=1e-5)
    assert (found[:, 64:] - alone[:, 64:]).abs().mean() > 0.01


def test_weights_are_those_of_the_model(tiny_reference):
    marked = apply("quantize.kv:bits=4", tiny_reference.model)
    before = tiny_reference.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in marked.state_dict().items())


def test_what_a_row_says(tiny, tmp_path, story):
    """Divergence grows with fewer bits, and the bytes in the row are those of the cache."""
    file = tmp_path / "story.txt"
    file.write_text(story.text, encoding="utf-8")
    chosen = {"model": str(tiny), "corpus": str(file), "windows": 1, "only": "quality"}
    names = ("none", "quantize.kv:bits=8", "quantize.kv:bits=2")
    rows = [vars(row) for row in lab.stream(names, **chosen)]
    none, eight, two = rows
    assert [row["kernel"] for row in rows] == [
        "float32 linear" + end for end in ("", " + int8 cache", " + int2 cache")
    ]
    assert 0 < eight["kld_mean"] < two["kld_mean"] and two["top1_agreement"] < eight["top1_agreement"] <= 1
    assert none["ppl"] != eight["ppl"] == pytest.approx(none["ppl"], rel=0.02)
    assert none["weights_mb"] == eight["weights_mb"]
    # 960 tokens packed, 40 kept, 2 layers x 2 heads x 16 channels of keys and values; grids of 4 bytes.
    beside = 40 * 16 * 2 * 4 + (960 / 32 * 16 + 960) * 4
    assert [row["kv_cache_mb_per_1k"] * 1e6 for row in rows] == pytest.approx(
        [4 * 1000 * 16 * 2 * 4, 4 * (960 * 16 * 2 + beside), 4 * (960 * 16 * 2 / 4 + beside)]
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ("bits=3", "bits=3 is none of 8, 4 and 2"),
        ("bits=16", "bits=16 is none of 8, 4 and 2"),
        ("bits=four", "bits is a whole number"),
        ("group_size=0", "group_size=0 is no multiple of 8; 32 is usual"),
        ("group_size=12", "group_size=12 is no multiple of 8"),
        ("residual=-1", "residual=-1 is negative"),
    ],
)
def test_settings_that_cannot_work(settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        parse(f"quantize.kv:{settings}")


def test_twice_is_refused(tiny_reference):
    with pytest.raises(RecipeError, match=r"quantized already: quantize.kv stands in a recipe once"):
        apply("quantize.kv:bits=8 + quantize.kv:bits=4", tiny_reference.model)


def test_groups_that_do_not_fit_a_head(new_model):
    model = new_model("gemma", head_dim=48)
    with pytest.raises(
        GroupSizeError, match=r"group_size=32 does not divide the 48 channels .* use 8, 16, 24, 48"
    ):
        apply("quantize.kv", model)
    assert marks_of(apply("quantize.kv:group_size=24", model)).cache.group_size == 24
    with pytest.raises(GroupSizeError, match="a model with a head size that 8 divides"):
        apply("quantize.kv", new_model("gemma", head_dim=12))


def test_sliding_windows_are_refused(new_model):
    with pytest.raises(
        RecipeError, match="full attention in every layer; this model has DynamicSlidingWindowLayer"
    ):
        apply("quantize.kv", new_model("mistral", sliding_window=64))
