"""Closed-form sizes against transformers, against tensors that exist, and against sums worked by hand."""

import dataclasses

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from edgelab.devices import (
    Device,
    MemoryNeed,
    ModelShape,
    ShapeError,
    catalogue,
    context_table,
    fits_and_speed,
    inference_memory,
    kv_cache_bytes,
    kv_cache_mb_per_1k,
    longest_context,
    models,
    stored_bits,
    this_machine,
    training_memory,
)
from edgelab.storage.bits import pack
from edgelab.storage.kv_cache import CacheGrid
from edgelab.techniques.quantization.rtn import quantize_affine

PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Gemma-2B": 2_506_172_416,
    "Phi-2": 2_779_683_840,
    "StableLM-3B": 2_795_443_200,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-270M": 268_098_176,
    "Gemma-3-1B": 999_885_952,
    "Gemma-3-4B": 3_880_263_168,
    "Phi-3-mini": 3_821_079_552,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM2-135M": 134_515_008,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
TINY_LAYOUTS = [
    ("llama", {"num_key_value_heads": 2}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 3, "head_dim": 16}),
    ("mistral", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8}),
    ("gemma", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 16}),
    ("phi", {}),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("stablelm", {"num_key_value_heads": 6}),
    ("stablelm", {"num_key_value_heads": 2, "use_qkv_bias": True}),
    ("stablelm", {"num_key_value_heads": 6, "use_parallel_residual": True}),
]


def config_of(shape: ModelShape) -> AutoConfig:
    """The transformers configuration of a catalogue model, from its row and the defaults of its layout."""
    return AutoConfig.for_model(
        shape.model_type,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=shape.context_length,
        **({"head_dim": shape.head_dim} if shape.model_type in ("llama", "gemma", "gemma2") else {}),
        **({"sliding_window": shape.window} if shape.window else {}),
    )


def on_meta(config: AutoConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def counted(model: torch.nn.Module) -> dict[str, int]:
    """Parameters of a real model: linear weights but the head, embedding and head, everything else."""
    counts = {"linear": 0, "embedding": 0, "other": 0}
    for name, parameter in model.named_parameters():
        if "embed_tokens.weight" in name or "lm_head.weight" in name:
            counts["embedding"] += parameter.numel()
        elif isinstance(model.get_submodule(name.rpartition(".")[0]), torch.nn.Linear) and name.endswith(
            "weight"
        ):
            counts["linear"] += parameter.numel()
        else:
            counts["other"] += parameter.numel()
    return counts


def split(shape: ModelShape) -> dict[str, int]:
    return {
        "linear": shape.linear_parameters,
        "embedding": shape.embedding_parameters,
        "other": shape.other_parameters,
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_transformers_and_the_published_total(name):
    shape = models()[name]
    model = on_meta(config_of(shape))
    assert split(shape) == counted(model)
    assert shape.parameters == PUBLISHED[name] == sum(parameter.numel() for parameter in model.parameters())


def test_every_catalogue_model_has_a_published_total_and_a_source():
    assert set(models()) == set(PUBLISHED)
    assert all(shape.source and shape.context_length for shape in models().values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_from_config_gives_the_catalogue_row(name):
    row = models()[name]
    shape = ModelShape.from_config(config_of(row), name=name)
    assert shape == ModelShape(**{**vars(row), "source": ""})


@pytest.mark.parametrize("layout, settings", TINY_LAYOUTS)
def test_from_config_counts_every_supported_layout(layout, settings):
    config = AutoConfig.for_model(layout, **TINY, **settings)
    assert split(ModelShape.from_config(config)) == counted(on_meta(config))


def test_from_config_refuses_what_it_cannot_count():
    with pytest.raises(ShapeError, match=r"'gpt2'.*supported are llama"):
        ModelShape.from_config(AutoConfig.for_model("gpt2"))
    with pytest.raises(ShapeError, match="qk_layernorm"):
        ModelShape.from_config(AutoConfig.for_model("phi", **TINY, qk_layernorm=True))


def test_a_7b_model_needs_7_to_28_gb_and_four_times_that_in_training():
    shape = models()["Llama-2-7B"]
    assert inference_memory(shape, bits=8).weights_gb == pytest.approx(6.74, abs=0.01)
    assert inference_memory(shape, bits=16).weights_gb == 6.738415616 * 2
    assert inference_memory(shape, bits=32).weights_gb == 6.738415616 * 4
    training = training_memory(shape, bits=32, context=512)
    assert training.total_gb / (6.738415616 * 4) == pytest.approx(4, rel=0.03)
    assert training_memory(shape, bits=16).total_gb == pytest.approx(training.total_gb, rel=0.03)


def test_quantized_weights_count_scales_and_zero_points():
    shape = ModelShape("by hand", "llama", 1, 8, 2, 1, 4, 16, 10, tied_embeddings=True)
    # query, output (8, 8), key, value (4, 8), gate, up (16, 8), down (8, 16), embedding (10, 8)
    assert shape.linear_parameters == 64 + 32 + 32 + 64 + 128 + 128 + 128 == 576
    assert shape.other_parameters == 3 * 8
    rows = 8 + 4 + 4 + 8 + 16 + 16 + 8  # one group per row
    per_row = 576 * 4 + 80 * 4 + (rows + 10) * (16 + 4) + 24 * 16
    assert inference_memory(shape, bits=4).weights_gb == per_row / 8e9
    groups = 2 * (8 + 4 + 4 + 8 + 16 + 16) + 4 * 8  # groups of 4 inputs
    float_embedding = 576 * 4 + groups * (16 + 4) + 80 * 32 + 24 * 16
    assert (
        inference_memory(shape, bits=4, group_size=4, embedding_bits=32).weights_gb == float_embedding / 8e9
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_kv_cache_equals_the_tensors_of_a_real_cache(kv_heads):
    config = AutoConfig.for_model("llama", **TINY, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.zeros(3, 20, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = ModelShape.from_config(config)
    need = inference_memory(shape, bits=32, context=20, batch=3, kv_bits=32)
    assert need.kv_cache_gb == held / 1e9
    assert kv_cache_mb_per_1k(shape, bits=32) == pytest.approx(held / 60 * 1000 / 1e6)


def test_grouped_query_attention_shrinks_the_cache_of_70b_eightfold():
    assert kv_cache_mb_per_1k(models()["Llama-2-70B"]) == 2 * 80 * 8 * 128 * 2 * 1000 / 1e6 == 327.68
    assert kv_cache_mb_per_1k(models()["SmolLM2-135M"]) == 23.04


@pytest.mark.parametrize(
    "optimizer, make",
    [
        ("sgd", torch.optim.SGD),
        ("momentum", lambda parameters: torch.optim.SGD(parameters, momentum=0.9)),
        ("adamw", torch.optim.AdamW),
    ],
)
def test_training_equals_the_tensors_of_a_real_optimizer(optimizer, make):
    config = AutoConfig.for_model("llama", **TINY, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    model(tokens, labels=tokens).loss.backward()
    stepped = make(model.parameters())
    stepped.step()
    moments = [
        value for state in stepped.state.values() for value in state.values() if torch.is_tensor(value)
    ]
    need = training_memory(ModelShape.from_config(config), optimizer)
    assert need.weights_gb == need.gradients_gb == sum(p.grad.nbytes for p in model.parameters()) / 1e9
    assert (
        need.optimizer_gb == sum(moment.nbytes for moment in moments if moment.ndim) / 1e9
    )  # not the step counters


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"bits": 0}, "bits is 0, but must be at least 1"),
        ({"context": -1}, "context is -1"),
        ({"batch": 0}, "batch is 0"),
        ({"group_size": -8}, "group_size is -8"),
    ],
)
def test_sizes_that_are_not_positive_are_refused(settings, sentence):
    with pytest.raises(ShapeError, match=sentence):
        inference_memory(models()["Phi-2"], **settings)


def test_training_refuses_other_precisions_and_optimizers():
    with pytest.raises(ShapeError, match="cannot be trained in 4 bits"):
        training_memory(models()["Phi-2"], bits=4)
    with pytest.raises(ShapeError, match="'lion'; there are sgd, momentum, adamw"):
        training_memory(models()["Phi-2"], optimizer="lion")


@given(
    bits=st.integers(2, 15),
    group_size=st.sampled_from([0, 32, 64, 96]),
    context=st.integers(1, 10_000),
    batch=st.integers(1, 64),
)
def test_memory_grows_with_bits_context_and_batch(bits, group_size, context, batch):
    shape = models()["SmolLM2-135M"]
    need = inference_memory(shape, bits, context, batch, group_size=group_size)
    parts = need.weights_gb + need.kv_cache_gb + need.activations_gb
    assert need.total_gb == pytest.approx(parts) and need.badge == "analytic"
    assert (
        inference_memory(shape, bits + 1, context, batch, group_size=group_size).weights_gb > need.weights_gb
    )
    assert inference_memory(shape, bits, context + 1, batch).kv_cache_gb > need.kv_cache_gb
    doubled = inference_memory(shape, bits, context, 2 * batch)
    assert doubled.kv_cache_gb == pytest.approx(2 * need.kv_cache_gb)


def test_every_figure_of_the_catalogue_has_a_source_and_no_source_is_left_over():
    devices = catalogue()
    assert len({device.name for device in devices}) == len(devices) >= 12
    for device in devices:
        assert bool(device.memory_gb) == bool(device.memory_source), device
        assert bool(device.usable_gb) == bool(device.usable_source), device
        assert 0 < device.room_gb <= device.memory_gb, device
        assert bool(device.memory_bandwidth_gb_s) == bool(device.bandwidth_source), device
        computes = [device.compute_gflop_s(kind) for kind in ("float32", "float16", "int8")]
        assert any(computes) == bool(device.compute_source), device
        assert bool(device.power_w) == bool(device.power_source), device
        assert bool(device.battery_wh) == bool(device.battery_source), device
        assert device.runs_on in ("CPU", "phone", "GPU"), device
        assert device.device_class
    assert [device.memory_gb for device in devices] == sorted(device.memory_gb for device in devices)


def test_a_device_holds_what_is_not_larger_than_its_memory():
    device = Device("box", "test", memory_gb=8)
    assert device.holds(MemoryNeed(weights_gb=5, kv_cache_gb=3))
    assert not device.holds(MemoryNeed(weights_gb=5, kv_cache_gb=3, activations_gb=0.1))
    assert not Device("unknown", "test", memory_gb=None).holds(MemoryNeed(weights_gb=0.1))


def test_what_system_and_programs_take_is_not_left_to_a_model():
    phone = next(device for device in catalogue() if "778G" in device.name)
    assert phone.memory_gb == 6 and not phone.holds(MemoryNeed(weights_gb=5.05))
    row = fits_and_speed(["Gemma-2B"], ("float16",), [phone]).iloc[0]
    assert 5 < (row["weights_mb"] + row["kv_cache_mb"]) / 1000 < 6 and not row["fits"]
    # A device of one's own without the figure: no phone of the catalogue leaves less than 60 %.
    unnamed = Device("mine", "phone", memory_gb=10)
    assert unnamed.room_gb == pytest.approx(6)
    assert dataclasses.replace(unnamed, usable_gb=8.5).room_gb == 8.5
    assert Device("box", "no such class", memory_gb=10).room_gb == 10
    shape = models()["Llama-2-7B"]  # 524,288 bytes a token
    assert longest_context(shape, 3.8, unnamed) == 2.2e9 // 524_288


def test_this_machine_reports_the_memory_of_the_operating_system():
    machine = this_machine()
    assert machine.memory_gb == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.06)
    assert 0 < machine.room_gb < machine.memory_gb


SMALL = ModelShape("small", "llama", 2, 64, 4, 2, 32, 192, 300)


@pytest.mark.parametrize("kv_bits", [16, 8, 4, 2])
@pytest.mark.parametrize("memory_gb", [0.00105, 0.0013, 0.5])
def test_longest_context_fills_the_memory(kv_bits, memory_gb):
    """Of the real cache in 16 bits, the tokens found fit, and 33 more, a group of keys and one token, do not."""
    config = AutoConfig.for_model(
        "llama", hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    tokens = longest_context(SMALL, 0.001, Device("one", "test", memory_gb), kv_bits)
    room = (memory_gb - 0.001) * 1e9

    def needed(tokens):
        if kv_bits == 16:
            return tokens * 2 * 2 * 2 * 32 * 2
        return CacheGrid(kv_bits, 32, 32).nbytes(config, tokens, 2)

    packed = (tokens - 32) // 32 * 32 + 32 if kv_bits < 16 and tokens > 32 else tokens
    assert needed(packed) <= room < needed(packed + 33)


def test_context_by_hand():
    # Llama-2-7B keeps 2 x 32 x 32 x 128 x 2 bytes a token: 524,288. Of 8 GB, 3.8 GB of weights leave 4.2 GB.
    shape, device = models()["Llama-2-7B"], Device("board", "test", 8)
    assert longest_context(shape, 3.8, device) == 4.2e9 // 524_288 == 8010
    # At 4 bits with two 16-bit numbers to 32: 5 bits a number, 163,840 bytes; the last 32 tokens keep 16 bits.
    assert longest_context(shape, 3.8, device, kv_bits=4) == 32 + (4.2e9 - 32 * 524_288) // 163_840
    assert longest_context(shape, 9, device) == longest_context(shape, 9, device, kv_bits=4) == 0
    assert longest_context(shape, 3.8, dataclasses.replace(device, memory_gb=None)) is None
    with pytest.raises(ShapeError, match="kv_bits is 0"):
        longest_context(shape, 3.8, device, kv_bits=0)


def test_a_layer_with_a_window_keeps_no_more():
    shape = models()["Gemma-3-4B"]  # 4 heads of 256: 4,096 bytes of a token in a layer, of which 5 see all
    assert kv_cache_bytes(shape, 1024) == 34 * 1024 * 4096
    assert kv_cache_bytes(shape, 32768) == (5 * 32768 + 29 * 1024) * 4096
    room = 5 * 32768 * 4096 + 29 * 1024 * 4096
    assert longest_context(shape, 3, Device("board", "test", 3 + room / 1e9 + 1e-7)) == 32768
    assert longest_context(shape, 3, Device("board", "test", 3 + 34 * 4096 * 1000 / 1e9 + 1e-7)) == 1000
    for bits in (8, 4):
        tokens = longest_context(shape, 3, Device("board", "test", 5), bits)
        assert (
            kv_cache_bytes(shape, tokens // 32 * 32, bits) <= 2e9 < kv_cache_bytes(shape, tokens + 64, bits)
        )


def test_a_window_in_every_layer_is_not_counted_on():
    """Engines keep all tokens of such a model, and a cache that did not would take any text."""
    for layout in ("mistral", "phi3"):
        shape = ModelShape.from_config(AutoConfig.for_model(layout, **TINY, pad_token_id=0, sliding_window=8))
        assert (shape.window, shape.windowed_layers) == (0, 0)
    every = dataclasses.replace(SMALL, window=8, windowed_layers=2)
    board = Device("board", "test", 1)
    assert longest_context(every, 0.1, board) == longest_context(SMALL, 0.1, board)


def test_context_table():
    table = context_table(models()["Llama-2-7B"], 3.8)
    assert list(table.columns) == ["memory_gb", "16-bit cache", "8-bit cache", "4-bit cache", "2-bit cache"]
    assert table.loc["Raspberry Pi 5", "16-bit cache"] == 3.7e9 // 524_288  # 7.5 of its 8 GB are usable
    assert table.loc["Phone, Snapdragon 778G", "2-bit cache"] == 0  # leaves 3.6 GB
    holds = table[table["4-bit cache"] > 0]
    assert len(holds) == len(table) - 1 and (holds["2-bit cache"] > holds["4-bit cache"]).all()
    unknown = Device("unknown", "test", None)
    assert list(context_table(SMALL, 0, [unknown, Device("board", "test", 1)], (16,)).index) == ["board"]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits, group_size", [(2, 32), (3, 64), (4, 192), (8, 96)])
def test_stored_bits_are_the_bytes_that_packing_stores(bits, group_size, symmetric):
    tensor = quantize_affine(torch.randn(64, 192), bits, group_size, symmetric)
    parts = [pack(tensor.integers, bits), tensor.scale]
    parts += [] if symmetric else [pack(tensor.zero_point, bits)]
    stored = 8 * sum(part.nbytes for part in parts) / tensor.integers.numel()
    assert stored_bits(bits, group_size, zero_point=not symmetric) == pytest.approx(stored)
