"""Lines of llama-bench: real outputs in every format, a calibration worked by hand, and texts that are none."""

import json

import pytest

from edgelab.devices import (
    BenchTextError,
    ModelShape,
    fit_bench,
    gguf_bytes,
    kv_cache_bytes,
    models,
    read_bench,
    saved_bench,
    settings_of,
    what_fits,
)
from edgelab.devices.bench_lines import ARCHITECTURES
from edgelab.gguf_files.layouts import LAYOUTS

XIAOMI = saved_bench("xiaomi_14")
RADXA = saved_bench("radxa_dragon_q6a")
# tools/llama-bench/README.md of github.com/ggml-org/llama.cpp; of its CSV without a column that its lines lack
THREADS = """
| model                          |       size |     params | backend    |    threads | test       |              t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ---------: | ---------- | ---------------: |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          1 | pp 64      |      6.17 ± 0.07 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          1 | tg 16      |      4.05 ± 0.02 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          8 | pp 64      |     32.29 ± 1.21 |
| llama 7B mostly Q4_0           |   3.56 GiB |     6.74 B | CPU        |          8 | tg 16      |     16.71 ± 0.66 |
"""
DEPTH = """
| model                          |       size |     params | backend    | ngl |            test |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | --: | --------------: | -------------------: |
| qwen2 7B Q4_K - Medium         |   4.36 GiB |     7.62 B | CUDA       |  -1 |           pp512 |      7340.20 ± 23.45 |
| qwen2 7B Q4_K - Medium         |   4.36 GiB |     7.62 B | CUDA       |  -1 |    tg128 @ d512 |        116.71 ± 0.60 |

build: 8cf427ff (5163)
"""
CSV = (
    "build_commit,build_number,cpu_info,gpu_info,backends,model_filename,model_type,model_size,model_n_params,n_batch,"
    "n_ubatch,n_threads,cpu_mask,cpu_strict,poll,type_k,type_v,n_gpu_layers,n_cpu_moe,split_mode,main_gpu,"
    "no_kv_offload,flash_attn,devices,tensor_split,tensor_buft_overrides,use_mmap,use_direct_io,embeddings,"
    "no_op_offload,no_host,fit_target,fit_min_ctx,n_prompt,n_gen,n_depth,test_time,avg_ns,stddev_ns,avg_ts,"
    "stddev_ts\n"
    '"8cf427ff","5163","AMD Ryzen 7 7800X3D 8-Core Processor","NVIDIA GeForce RTX 4080","CUDA",'
    '"models/Qwen2.5-7B-Instruct-Q4_K_M.gguf","qwen2 7B Q4_K - Medium","4677120000","7615616512","2048","512","8",'
    '"0x0","0","50","f16","f16","-1","0","layer","0","0","-1","auto","0.00","none","1","0","0","0","0","0","0","512",'
    '"0","0","2025-04-24T11:57:09Z","70285660","982040","7285.676949","100.064434"\n'
    '"8cf427ff","5163","AMD Ryzen 7 7800X3D 8-Core Processor","NVIDIA GeForce RTX 4080","CUDA",'
    '"models/Qwen2.5-7B-Instruct-Q4_K_M.gguf","qwen2 7B Q4_K - Medium","4677120000","7615616512","2048","512","8",'
    '"0x0","0","50","f16","f16","-1","0","layer","0","0","-1","auto","0.00","none","1","0","0","0","0","0","0","0",'
    '"128","0","2025-04-24T11:57:10Z","1067431600","3834831","119.915244","0.430617"\n'
)
OBJECTS = [
    {
        "build_commit": "8cf427ff", "backends": "CUDA", "model_type": "qwen2 7B Q4_K - Medium",
        "model_size": 4677120000, "model_n_params": 7615616512, "n_threads": 8, "n_gpu_layers": -1,
        "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 7100.002165, "stddev_ts": 140.341520,
        "samples_ts": [6863.1, 7147.55, 7136.37, 7115.79, 7237.21],
    },
    {
        "build_commit": "8cf427ff", "backends": "CUDA", "model_type": "qwen2 7B Q4_K - Medium",
        "model_size": 4677120000, "model_n_params": 7615616512, "n_threads": 8, "n_gpu_layers": -1,
        "n_prompt": 0, "n_gen": 128, "n_depth": 0, "avg_ts": 118.881588, "stddev_ts": 1.041811,
        "samples_ts": [119.03, 120.178, 119.43, 118.307, 117.464],
    },
]  # fmt: skip


def table(*rows):
    head = "| model | size | params | backend | threads | test | t/s |\n| --- | ---: | ---: | --- | ---: | --- | ---: |"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])


def line(
    size="1000.00 MiB", test="tg128", rate="10.00 ± 0.50", model="mamba 1B F16", params="0.50 B", threads="4"
):
    return model, size, params, "CPU", threads, test, rate


def test_a_real_phone():
    lines = read_bench(XIAOMI)
    assert [(one.kind, one.work, one.tokens, one.tok_s, one.deviation) for one in lines] == [
        ("Q4_0", "prefill", 128, 327.75, 1.58),
        ("Q4_0", "decode", 32, 23.10, 0.34),
        ("F16", "prefill", 128, 33.68, 0.40),
        ("F16", "decode", 32, 18.78, 0.13),
    ]
    assert {one.setting for one in lines} == {"OpenCL, 99 layers on the GPU"}
    assert {one.shape.name for one in lines} == {"Llama-3.2-1B"}
    assert lines[0].size_bytes == 727.75 * 2**20 and lines[3].size_bytes == 2.30 * 2**30


def test_a_real_board_with_two_tables_and_a_model_that_is_not_in_the_catalogue():
    lines = read_bench(RADXA)
    assert [one.work for one in lines] == ["prefill", "prefill", "decode", "mixed", "prefill", "prefill"]
    assert {one.setting for one in lines} == {"CPU, 8 threads"} and {one.kind for one in lines} == {"Q4_K_M"}
    assert [one.shape and one.shape.name for one in lines] == [None] * 4 + ["Llama-3.2-3B"] * 2
    fit = fit_bench(lines)
    assert fit.read_gb_s.value == pytest.approx(636.18 * 2**20 * 15.23 / 1e9)
    assert fit.compute_gflop_s.lines == 4 and len(fit.points) == 5  # the mixed test is left out


def test_older_tables_threads_and_depth():
    lines = read_bench(THREADS)
    assert [one.tokens for one in lines] == [64, 16, 64, 16] and lines[0].model == "llama 7B Q4_0"
    assert settings_of(lines) == ["CPU, 8 threads", "CPU, 1 thread"]
    assert fit_bench(lines).setting == "CPU, 8 threads"
    slow = fit_bench(lines, "CPU, 1 thread")
    assert slow.read_gb_s.value < fit_bench(lines).read_gb_s.value and slow.read_gb_s.lines == 1
    deep = read_bench(DEPTH)
    assert [(one.tokens, one.depth) for one in deep] == [(512, 0), (128, 512)]
    assert deep[0].setting == "CUDA, all layers on the GPU"


def test_csv_json_and_jsonl_say_the_same():
    first, second = read_bench(f"~ $ llama-bench -o csv\n{CSV}~ $ ")
    assert (first.work, second.work) == ("prefill", "decode") and second.tok_s == 119.915244
    assert second.size_bytes == 4677120000 and second.shape.name == "Qwen2.5-7B"
    as_list = read_bench(json.dumps(OBJECTS, indent=2))
    as_lines = read_bench("\n".join(json.dumps(one) for one in OBJECTS))
    assert as_list == as_lines and as_list[1].tok_s == 118.881588 and as_list[1].deviation == 1.041811
    assert as_list[0].setting == first.setting == "CUDA, all layers on the GPU"
    assert read_bench(json.dumps(OBJECTS[1], indent=2)) == as_list[1:]


def test_models_are_found_by_what_llama_bench_calls_their_layout():
    """The first two as on a Jetson Nano and a laptop, README.md of github.com/kreier/llama.cpp-jetson among them."""
    read = read_bench(
        table(
            ("gemma3 1B Q4_K - Medium", "762.49 MiB", "999.89 M", "CUDA", "4", "tg128", "5.93 ± 0.01"),
            ("gemma3 4B Q4_K - Medium", "2.31 GiB", "3.88 B", "RPC", "4", "tg128", "9.70 ± 0.07"),
            ("gemma2 4B Q4_K - Medium", "2.31 GiB", "3.88 B", "RPC", "4", "tg128", "9.70 ± 0.07"),
        )
    )
    assert [one.shape and one.shape.name for one in read] == ["Gemma-3-1B", "Gemma-3-4B", None]
    names = {layout.name: kind for kind, layout in reversed(LAYOUTS.items())}
    assert names == ARCHITECTURES


def test_a_model_of_the_same_layout_and_nearly_the_same_size_is_another():
    """Phi-4-mini has 3.84 billion parameters, Phi-3-mini 3.82; the last two lines as in CSV and JSON, unrounded."""
    sizes = [
        ("2.23 GiB", "3.82 B"),
        ("2.31 GiB", "3.84 B"),
        ("2.23 GiB", "3821079648"),
        ("2.31 GiB", "3836021856"),
    ]
    read = read_bench(
        table(*(line(size, model="phi3 3B Q4_K - Medium", params=params) for size, params in sizes))
    )
    assert [one.shape and one.shape.name for one in read] == ["Phi-3-mini", None] * 2


def test_a_window_bounds_the_cache_that_a_step_reads_and_that_has_to_fit():
    """5 layers of Gemma-3-4B keep all tokens, 29 those of a window and of a piece of the prefill, of 4,096 bytes."""
    far = ("gemma3 4B Q4_K - Medium", "2.31 GiB", "3.88 B", "CPU", "4", "tg128 @ d32704", "2.00 ± 0.00")
    [found] = read_bench(table(far))
    cache = (5 * 32768 + 29 * (1024 + 512)) * 4096
    assert found.bytes_per_step == pytest.approx(2.31 * 2**30 + cache)
    [row] = what_fits(fit_bench([found]), 4, {"m": found.shape}, ["Q4_K_M"], 32768).to_dict("records")
    assert row["kv_cache_mb"] == pytest.approx(cache / 1e6) and row["context_length"] == 131072
    assert row["fits"] and row["decode_tok_s"] == pytest.approx(2, rel=0.01)


def test_a_table_copied_from_a_page_has_tabs():
    copied = "model\tsize\tparams\tbackend\tthreads\tmmap\ttest\tt/s\n"
    copied += "llama ?B Q4_0_4_8\t70.81 MiB\t116.93 M\tCPU\t6\t0\ttg128\t750.33 ± 11.71\n"
    [found] = read_bench(copied)
    assert found.kind == "Q4_0" and found.parameters == pytest.approx(116.93e6) and found.shape is None


def test_a_calibration_by_hand_of_models_that_are_not_known():
    # 1,000 MiB at 10 tokens/s are 10.486 GB/s, 2,000 MiB at 6 are 12.583; a deviation of 0.5 is 5 % of the first
    lines = read_bench(
        table(line(), line("2000.00 MiB", rate="6.00 ± 0.00"), line(test="pp512", rate="100.00 ± 2.00"))
    )
    fit = fit_bench(lines)
    assert fit.read_gb_s.value == pytest.approx((10.48576 + 12.582912) / 2) and fit.read_gb_s.lines == 2
    assert fit.read_gb_s.low == pytest.approx(10.48576 * 0.95) and fit.read_gb_s.high == pytest.approx(
        12.582912
    )
    # two operations for each of 0.5 billion parameters and 512 tokens, in 5.12 s
    assert fit.compute_gflop_s.value == pytest.approx(2 * 0.5 * 512 / 5.12)
    assert fit.compute_gflop_s.low == pytest.approx(98) and fit.compute_gflop_s.high == pytest.approx(102)
    assert fit.engine(25.6).bandwidth_share == pytest.approx(fit.read_gb_s.value / 25.6)
    decode = fit.points[fit.points["test"] == "tg128"]
    assert decode["tokens"].tolist() == [1, 1] and decode["gb_s"].tolist() == pytest.approx(
        [10.48576, 12.582912]
    )
    assert (decode["gflop_s"] / decode["flop_per_byte"]).tolist() == pytest.approx(decode["gb_s"].tolist())


def test_a_model_of_the_catalogue_reads_its_cache_and_one_row_of_its_inputs():
    [found] = read_bench(table(("llama 7B Q4_0", "3.56 GiB", "6.74 B", "CPU", "4", "tg128", "5.00 ± 0.00")))
    shape = models()["Llama-2-7B"]
    unread = 32000 * 4096 // 32 * 18
    expected = 3.56 * 2**30 - unread + kv_cache_bytes(shape, 64)
    assert found.shape == shape and found.bytes_per_step == pytest.approx(expected)


def test_each_kind_of_file_is_predicted_by_its_own_lines():
    fit = fit_bench(read_bench(XIAOMI))
    assert fit.read_of("Q4_0").value < 20 < 40 < fit.read_of("F16").value
    assert fit.read_of("Q8_0") == fit.read_gb_s and fit.read_of("Q4_0").lines == 1
    rows = what_fits(
        fit, 7.2, {"m": models()["Llama-3.2-1B"]}, ["F16", "Q8_0", "Q4_0"], context=16, prompt=128
    )
    rates = rows.set_index("kind")
    # what was measured comes out again: tg32 and pp128
    assert rates.loc["Q4_0", "decode_tok_s"] == pytest.approx(23.10, rel=0.01)
    assert rates.loc["F16", "decode_tok_s"] == pytest.approx(18.78, rel=0.01)
    assert rates.loc["Q4_0", "ttft_ms"] == pytest.approx(128 / 327.75 * 1000, rel=0.01)
    assert rates.loc["F16", "ttft_ms"] == pytest.approx(128 / 33.68 * 1000, rel=0.01)
    assert "other kinds" in rates.loc["Q8_0", "basis"] and "1 line of Q4_0" in rates.loc["Q4_0", "basis"]


def test_what_fits_by_hand():
    small = ModelShape("small", "llama", 2, 64, 4, 2, 32, 192, 300, tied_embeddings=True)
    fit = fit_bench(read_bench(table(line(), line(test="pp512", rate="100.00 ± 2.00"))))
    cache = 2 * 2 * 2 * 32 * 100 * 2
    need = gguf_bytes(small, "F16") + cache
    [row] = what_fits(fit, need / 1e9, {"small": small}, ["F16"], context=100).to_dict("records")
    weights = 2 * small.linear_parameters + 2 * 300 * 64 + 4 * 64 * 5
    assert row["fits"] and row["decode_tok_s"] == pytest.approx(10.48576e9 / (weights + cache))
    assert row["slow_tok_s"] == pytest.approx(0.95 * row["decode_tok_s"]) and row["badge"] == "analytic"
    [row] = what_fits(fit, (need - 1) / 1e9, {"small": small}, ["F16"], context=100).to_dict("records")
    assert not row["fits"] and row["decode_tok_s"] is None and row["ttft_ms"] is None


def test_without_prefill_the_first_token_is_not_known():
    fit = fit_bench(read_bench(table(line())))
    assert fit.compute_gflop_s is None and fit.compute_of("F16") is None
    assert what_fits(fit, 100, kinds=["Q4_0"])["ttft_ms"].isna().all()


def test_every_model_of_the_catalogue_is_answered():
    answer = what_fits(fit_bench(read_bench(XIAOMI)), 7.2)
    assert len(answer) == 3 * len(models()) and set(answer["badge"]) == {"analytic"}
    fits = answer[answer["fits"]]
    assert (fits["slow_tok_s"] <= fits["decode_tok_s"]).all() and (
        fits["decode_tok_s"] <= fits["fast_tok_s"]
    ).all()
    assert not answer.set_index(["model", "kind"]).loc[("Llama-2-70B", "Q4_K_M"), "fits"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "The text is empty; run `llama-bench"),
        ("llama_print_timings: load time = 25853 ms", "No line of llama-bench is in this text"),
        (
            "| PP | TG | B | T_PP s |\n| --- | --- | --- | --- |\n| 512 | 32 | 1 | 0.3 |",
            "No line of llama-bench",
        ),
        (table(line(rate="fast")), "line 3, column t/s: 'fast' is no number; llama-bench writes 636.18 MiB"),
        (table(line(rate="0.00 ± 0.00")), "line 3, column t/s: 0.00 is no rate"),
        (table(line(size="1000 MB")), "line 3, column size: '1000 MB' is no number"),
        (table(line(params="")), "line 3: there is no params (model_n_params)"),
        (table(line(test="ttft")), "line 3, column test: 'ttft' is no test"),
        (table(line(test="pp0")), "line 3: the test has no tokens"),
        ("| model | size | params | t/s |\n| a | 1 MiB | 1 M | 3 |", "line 1: the table has no column test"),
        ('[{"model_type": "llama 1B F16",', "The JSON makes no sense at line 1"),
        (CSV.replace('"128",', ""), "line 3: its cells are not as many as the columns"),
        ("[1, 2]", "Test 1 of the JSON is no object"),
        ('[{"model_type": "llama 1B F16"}]', "test 1: there is no size (model_size)"),
    ],
)
def test_a_text_that_is_none_of_llama_bench_is_refused_with_a_sentence(text, sentence):
    with pytest.raises(BenchTextError) as caught:
        read_bench(text)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_lines_that_cannot_calibrate_are_refused():
    lines = read_bench(table(line(test="pp512")))
    with pytest.raises(BenchTextError, match="No line is a test of decoding"):
        fit_bench(lines)
    lines = read_bench(table(line(), line(test="pp512", threads="2")))
    with pytest.raises(
        BenchTextError, match="No line decodes on 'CPU, 2 threads'; the lines ran on: CPU, 4 threads"
    ):
        fit_bench(lines, "CPU, 2 threads")
    with pytest.raises(BenchTextError, match="there are radxa_dragon_q6a, xiaomi_14"):
        saved_bench("nokia_3310")
    with pytest.raises(BenchTextError, match="A room of 0 GB holds nothing"):
        what_fits(fit_bench(lines), 0)
