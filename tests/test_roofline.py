"""The roofline against sums worked by hand, against properties it must have, and against published rates."""

import dataclasses

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab.devices import (
    PRECISIONS,
    Device,
    Engine,
    ModelShape,
    Precision,
    ShapeError,
    calibrate,
    catalogue,
    choose_split,
    class_engine,
    decode_tok_s,
    estimate,
    fit_engines,
    fits_and_speed,
    kv_cache_mb_per_1k,
    models,
    operations,
    published,
    published_check,
    step,
    time_to_first_token_ms,
    token_bytes,
)
from edgelab.devices.speed import likely_engine

TINY = ModelShape("by hand", "llama", 3, 8, 4, 2, 2, 16, 10, tied_embeddings=True)
BOX = Device("box", "test", 8, memory_bandwidth_gb_s=1.0, float32_gflop_s=10.0)
PLAIN = Precision("plain", 4, 8, "float32")


def by_name(work):
    return {part.name: part for part in work}


def test_a_decode_step_by_hand():
    work = by_name(operations(TINY, PLAIN, context=5))
    assert work["query"].bytes == 3 * (8 * 8 * 4 / 8 + (8 + 8) * 2) and work["query"].operations == 3 * 2 * 64
    assert work["key"].bytes == 3 * (4 * 8 * 4 / 8 + (4 + 8) * 2) and work["key"] == work["value"].__class__(
        "key", 3, work["value"].bytes, work["value"].operations
    )
    assert (
        work["down"].bytes == 3 * (8 * 16 * 4 / 8 + (8 + 16) * 2) and work["down"].operations == 3 * 2 * 128
    )
    assert work["head"].bytes == 10 * 8 + 4 * 10 and work["head"].operations == 2 * 80
    assert work["embedding"].bytes == 8
    # keys and values of 2 heads of 2 numbers, 5 tokens, 16 bits; scores and sums for 4 heads
    assert work["attention"].bytes == 3 * 2 * 2 * 2 * 5 * 2
    assert work["attention"].operations == 3 * 4 * 4 * 2 * 5


def test_a_prefill_by_hand_attends_backwards_only_and_asks_the_head_once():
    work = by_name(operations(TINY, PLAIN, context=5, tokens=5))
    assert work["up"].operations == 3 * 2 * 5 * 128
    assert work["up"].bytes == 3 * (16 * 8 * 4 / 8 + 5 * (16 + 8) * 2)
    assert work["attention"].operations == 3 * 4 * 4 * 2 * (1 + 2 + 3 + 4 + 5)
    assert work["head"].operations == 2 * 80 and work["embedding"].bytes == 5 * 8


def test_a_layer_with_a_window_attends_no_further_by_hand():
    shape = dataclasses.replace(TINY, window=2, windowed_layers=1)  # 16 bytes of a token in a layer
    work = by_name(operations(shape, PLAIN, context=5))["attention"]
    assert (work.bytes, work.operations) == (16 * (2 * 5 + 2), 4 * 4 * 2 * (2 * 5 + 2))
    work = by_name(operations(shape, PLAIN, context=5, tokens=5))["attention"]
    assert work.operations == 4 * 4 * 2 * (2 * (1 + 2 + 3 + 4 + 5) + (1 + 2 + 2 + 2 + 2))
    work = by_name(operations(shape, PLAIN, context=5, tokens=2))["attention"]
    assert work.operations == 4 * 4 * 2 * (2 * (4 + 5) + (2 + 2))


@pytest.mark.parametrize("name", list(models()))
def test_the_cache_of_a_step_is_the_one_of_the_memory_formulas(name):
    shape = models()[name]
    for bits in (16, 8, 4):
        attention = by_name(operations(shape, PRECISIONS["float16"], 1000, kv_bits=bits))["attention"]
        assert attention.bytes / 1e6 == pytest.approx(kv_cache_mb_per_1k(shape, bits))


@pytest.mark.parametrize("name", list(models()))
def test_the_operations_of_a_token_are_two_for_each_multiplied_weight(name):
    shape = models()[name]
    work = by_name(operations(shape, PRECISIONS["float32"], 1))
    products = sum(
        part.operations for key, part in work.items() if key not in ("attention", "norms and sums")
    )
    assert products == 2 * (shape.linear_parameters + shape.vocab_size * shape.hidden_size)


def test_each_operation_takes_the_longer_of_memory_and_compute_and_the_overhead_comes_once():
    engine = Engine(bandwidth_share=0.5, compute_share=0.1, overhead_s=2e-6)
    table = step(BOX, TINY, PLAIN, 5, engine=engine)
    up = by_name(operations(TINY, PLAIN, 5))["up"]
    assert table.loc["up", "ms"] == pytest.approx(1e3 * max(up.bytes / 0.5e9, up.operations / 1e9))
    assert table.loc["up", "bound"] == ("compute" if up.operations > 2 * up.bytes else "memory")
    assert table.loc["overhead", "ms"] == 2e-3
    assert decode_tok_s(BOX, TINY, PLAIN, 5, engine=engine) == pytest.approx(1e3 / table["ms"].sum())
    slow = step(Device("slow", "test", 8, 1.0, float32_gflop_s=0.001), TINY, PLAIN, 5)
    assert slow.loc["up", "bound"] == "compute" and slow.loc["up", "ms"] == pytest.approx(up.operations / 1e3)


def test_weights_take_what_the_files_take():
    # SmolLM2-135M-Instruct.Q4_1.gguf has 98,362,432 bytes with tokenizer; the float32 weights 538.06 MB
    embedded = models()["SmolLM2-135M"]
    assert PRECISIONS["float32"].weight_bytes(embedded) == 4 * embedded.parameters
    assert PRECISIONS["Q4_1"].weight_bytes(embedded) == pytest.approx(98.36e6, rel=0.02)
    # our packed int4 with an 8-bit embedding: 85.83 MB in data/reference
    assert PRECISIONS["int4 g64"].weight_bytes(embedded) == pytest.approx(85.83e6, rel=0.01)
    # llama.cpp's own report of llama-2-7b.Q4_0.gguf: 3,825,065,984 bytes
    assert PRECISIONS["Q4_0"].weight_bytes(models()["Llama-2-7B"]) == pytest.approx(3_825_065_984, rel=0.005)


@given(st.floats(2, 31), st.floats(0.01, 8), st.sampled_from(list(models())), st.integers(1, 8192))
def test_more_bits_are_never_faster(bits, more, name, context):
    few = Precision("few", bits, bits, "float32")
    many = Precision("many", bits + more, bits + more, "float32")
    shape = models()[name]
    assert decode_tok_s(BOX, shape, many, context) <= decode_tok_s(BOX, shape, few, context)


@given(st.floats(1, 2000), st.floats(1.0, 10), st.sampled_from(list(PRECISIONS)))
def test_more_bandwidth_is_never_slower_and_a_longer_context_never_faster(bandwidth, factor, name):
    shape, precision = models()["Llama-3.2-1B"], PRECISIONS[name]
    narrow = Device("narrow", "test", 8, bandwidth, float32_gflop_s=1000)
    wide = Device("wide", "test", 8, bandwidth * factor, float32_gflop_s=1000)
    assert decode_tok_s(wide, shape, precision) >= decode_tok_s(narrow, shape, precision)
    assert decode_tok_s(narrow, shape, precision, 4096) <= decode_tok_s(narrow, shape, precision, 64)


def test_compute_falls_back_to_the_next_wider_format_and_without_any_bounds_nothing():
    assert Device("a", "", 1, float32_gflop_s=1.0, float16_gflop_s=2.0).compute_gflop_s("int8") == 2.0
    assert Device("a", "", 1, float16_gflop_s=2.0).compute_gflop_s("float32") is None
    unknown = Device("a", "", 1, memory_bandwidth_gb_s=1.0)
    assert set(step(unknown, TINY, PLAIN, 5, 5)["bound"]) == {"memory"}
    assert time_to_first_token_ms(unknown, TINY, PLAIN, 5) is None
    assert time_to_first_token_ms(BOX, TINY, PLAIN, 5) == pytest.approx(
        step(BOX, TINY, PLAIN, 5, 5)["ms"].sum()
    )


@pytest.mark.parametrize("context, tokens, bits", [(0, 1, 16), (5, 6, 16), (5, 0, 16), (5, 1, 0)])
def test_steps_that_cannot_be_are_refused(context, tokens, bits):
    with pytest.raises(ShapeError, match="A step of"):
        operations(TINY, PLAIN, context, tokens, bits)


def test_a_device_without_bandwidth_and_an_unknown_class_are_refused():
    with pytest.raises(ShapeError, match="bandwidth of nothing is not known"):
        step(Device("nothing", "", 8), TINY, PLAIN, 5)
    with pytest.raises(ShapeError, match="'TPU'; there are CPU, phone and GPU"):
        class_engine("TPU")


@pytest.mark.parametrize("split", [0.0, 0.4, 1.0])
def test_calibration_gives_the_rate_it_was_made_from(split):
    shape, precision = models()["SmolLM2-135M"], PRECISIONS["Q4_1"]
    engine = calibrate(shape, precision, 97.0, 26.0, split)
    machine = Device("here", "", 24, memory_bandwidth_gb_s=26.0)
    assert decode_tok_s(machine, shape, precision, engine=engine) == pytest.approx(97.0)
    assert (engine.overhead_s > 0) == (split > 0)
    if split == 1:
        assert engine.bandwidth_share == pytest.approx(1)
        limit_s = token_bytes(shape, precision) / 26e9
        assert engine.overhead_s == pytest.approx(1 / 97 - limit_s)


@pytest.mark.parametrize("true_split", [0.0, 0.5, 1.0])
def test_the_split_that_made_the_rates_is_found_again(true_split):
    shape = models()["SmolLM2-135M"]
    made = calibrate(shape, PRECISIONS["Q4_1"], 97.0, 26.0, true_split)
    machine = Device("here", "", 24, memory_bandwidth_gb_s=26.0)
    names = ("Q4_1", "Q8_0", "float32")
    rates = [
        (PRECISIONS[name], decode_tok_s(machine, shape, PRECISIONS[name], engine=made)) for name in names
    ]
    assert choose_split(shape, [rates], 26.0) == true_split


def test_a_fit_predicts_the_other_rates_of_the_engine_that_made_them():
    shape, names = models()["SmolLM2-135M"], ("Q4_1", "Q8_0", "float32")
    machine = Device("here", "", 24, memory_bandwidth_gb_s=26.0)
    made = {"fast": 97.0, "slow": 31.0}
    measured = {}
    for name, rate in made.items():
        engine = calibrate(shape, PRECISIONS["Q4_1"], rate, 26.0, split=0.5)
        forms = [PRECISIONS[each] for each in names]
        measured[name] = {form: decode_tok_s(machine, shape, form, engine=engine) for form in forms}
    measured["slow"][PRECISIONS["float32"]] *= 1.01
    fit = fit_engines(shape, measured, 26.0)
    assert fit.split == 0.5 and set(fit.engines) == set(made)
    assert fit.check["error"].tolist() == pytest.approx([0, 0, 0, 0, 0, 1 / 1.01 - 1])
    alone = fit_engines(shape, {"fast": {PRECISIONS["Q4_1"]: 97.0}}, 26.0)
    assert alone.check["predicted"].tolist() == pytest.approx([97.0])
    nothing = fit_engines(shape, {"missing": {}}, 26.0)
    assert nothing.check.empty and not nothing.engines


def test_an_engine_that_reads_all_the_memory_gives_is_an_upper_bound_and_says_so():
    bound = "an upper bound for larger models"
    shape, plain = models()["SmolLM2-135M"], PRECISIONS["Q4_1"]
    assert calibrate(shape, plain, 97.0, 26.0, 1.0).basis.endswith(f"SmolLM2-135M in Q4_1, {bound}")
    assert bound not in calibrate(shape, plain, 97.0, 26.0, 0.75).basis


def test_calibration_refuses_rates_and_splits_out_of_range():
    with pytest.raises(ShapeError, match="cannot be calibrated on"):
        calibrate(TINY, PLAIN, 0.0, 1.0)
    with pytest.raises(ShapeError, match="between 0 and 1"):
        calibrate(TINY, PLAIN, 1.0, 1.0, split=1.5)


def test_published_rates_of_raspberry_pi_5_and_jetson_are_predicted_within_35_percent():
    check = published_check()
    for board, least in (("Raspberry Pi 5", 7), ("Jetson Orin Nano", 12)):
        rows = check[check["device"].str.startswith(board)]
        assert len(rows) >= least
        assert rows["error"].abs().max() <= 0.35, rows[["device", "model", "error"]]
    assert (check["error"].abs() <= 0.35).mean() >= 0.9
    # an old core without an int8 dot product stays far below its bandwidth, and the table must show it
    assert check[check["device"] == "Raspberry Pi 4"]["error"].min() > 0.35


def test_no_rate_of_a_board_is_used_to_predict_it():
    nano = class_engine("GPU", "Jetson Orin Nano")
    assert nano == class_engine("GPU", "Jetson Orin Nano Super") != class_engine("GPU")
    shares = published_check().set_index("device")["share"]
    assert shares["Jetson Orin Nano"].iloc[0] == nano.bandwidth_share
    assert all(0.3 < class_engine(name).bandwidth_share < 0.9 for name in ("CPU", "phone", "GPU"))


def test_every_published_rate_names_its_source_and_a_known_device():
    names = {device.name for device in catalogue()}
    for row in published():
        assert row.source and row.device in names and row.decode_tok_s > 0
        assert bool(row.model) != bool(row.model_gb), row
        assert not row.precision or row.precision in PRECISIONS
        assert (row.prefill_tok_s is None) == (row.prompt_tokens is None)


def test_the_seed_example_on_a_phone_with_a_snapdragon_778g():
    phone = [device for device in catalogue() if "778G" in device.name]
    table = fits_and_speed(["Gemma-2B", "Phi-2", "StableLM-3B"], devices=phone)
    assert set(table["badge"]) == {"analytic"} and len(table) == 9
    small = table[table["precision"] == "Q4_0"]
    assert small["fits"].all() and small["decode_tok_s"].between(4, 12).all()
    large = table[(table["precision"] == "float16") & (table["model"] == "Phi-2")].iloc[0]
    assert not large["fits"] and pd.isna(large["decode_tok_s"])
    assert table["energy_j_per_token"].isna().all()  # no source gives the phone's power


def test_a_board_is_predicted_by_its_own_rates_and_any_other_by_its_class():
    old, phone = (
        next(one for one in catalogue() if one.name == name)
        for name in ("Raspberry Pi 4", "Phone, Snapdragon 778G")
    )
    row = estimate(old, models()["Llama-3.2-3B"], PRECISIONS["Q4_K_M"], context=128)
    assert row["decode_tok_s"] == pytest.approx(1.6) and row["basis"] == "from its own published rate"
    own = estimate(phone, models()["Gemma-2B"], PRECISIONS["Q4_K_M"], context=128)
    assert own["decode_tok_s"] == pytest.approx(10)  # of its two rates the one below 8 bits
    fast = next(one for one in catalogue() if one.name == "GeForce RTX 4090")
    assert likely_engine(fast).basis == "from the median of its 3 published rates"
    assert likely_engine(dataclasses.replace(old, name="mine")) == class_engine("CPU")
    assert likely_engine(old).compute_share == class_engine("CPU").compute_share


def test_energy_and_battery_follow_from_the_rate():
    device = Device("box", "test", 8, 10.0, runs_on="CPU", power_w=5.0, battery_wh=10.0)
    row = estimate(device, models()["Llama-3.2-1B"], PRECISIONS["Q4_0"], engine=Engine())
    assert row["energy_j_per_token"] == pytest.approx(5 / row["decode_tok_s"])
    assert row["tokens_per_charge"] == pytest.approx(36_000 / row["energy_j_per_token"])
    assert row["energy_basis"].startswith("estimated: 5 W x ")


def test_every_model_has_a_row_in_every_precision_on_every_device():
    table = fits_and_speed()
    assert len(table) == len(models()) * 3 * len(catalogue())
    assert table["decode_tok_s"].notna().equals(table["fits"] & ~table["device"].str.startswith("Pixel"))
