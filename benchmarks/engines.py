"""Engines on the embedded model, about twenty minutes on two quiet cores: `make engines` writes results/engines.md.

The same 4-bit integers on every engine that takes them, and the own 4 bits of the others, in turns with PyTorch in
float32; what share of the bandwidth limit each reaches; our rates beside those that the engines' own tools report in
the same process.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from edgelab import corpora, devices, lab, ledger, recipes, reference, runtimes
from edgelab.ledger import Row
from edgelab.measure import bandwidth
from edgelab.measure.isolation import Isolated
from edgelab.measure.latency import Timed
from edgelab.storage import variants

INT4 = "quantize.gptq:bits=4,group_size=64 + quantize.embedding:bits=8"
RECIPES = {engine: f"{INT4} @ {engine}" for engine in ("torch", "onnxruntime", "openvino", "llamacpp")} | {
    engine: f"native.int4 @ {engine}" for engine in ("litert", "executorch")
}
INT8 = "quantize.rtn:bits=8,group_size=0,symmetric=true + quantize.embedding:bits=8"
CONTEXT = 160  # tokens in the middle of a timed stretch
EXPORT_S = {"llamacpp": 15, "onnxruntime": 30, "openvino": 15, "litert": 120, "executorch": 180}
OWN_TOOLS = ("llamacpp", "onnxruntime", "litert")
PROMPT, TOKENS, ROUNDS = 128, 64, 5
AGREE = "within 10 %"


class OwnTools:
    """One engine in a process of its own: our clock around its steps, and the engine's own figures."""

    def __init__(self, recipe: str) -> None:
        parsed = recipes.parse(recipe)
        source = reference.resolve()
        self.folder = variants.build(parsed, source, 0, lambda done, total: None)
        self.ids = corpora.tokenize("wiki", reference.load_tokenizer(source)).ids[:PROMPT].tolist()
        self.runtime = runtimes.load(parsed.runtime, self.folder)
        self.timed = Timed(self.runtime, self.ids)
        self.timed.warm_up()

    def ours(self) -> dict[str, float]:
        """Prefill and decode rates by the clock that rows are measured with."""
        first = self.timed.prefill()
        return {
            "prefill_tok_s": 1e3 * PROMPT / first,
            "decode_tok_s": 1e3 / statistics.mean(self.timed.decode(TOKENS)),
        }

    def llamacpp(self) -> dict[str, float]:
        """What llama.cpp counted during the sequence that `ours` timed last."""
        return self.runtime.own_timings()

    def onnxruntime(self) -> dict[str, float]:
        """The loop of ONNX Runtime GenAI's own benchmark: append the prompt, then generate token by token."""
        import onnxruntime_genai

        parameters = onnxruntime_genai.GeneratorParams(self.runtime.engine)
        parameters.set_search_options(do_sample=False, max_length=1024, min_length=PROMPT + TOKENS)
        generator = onnxruntime_genai.Generator(self.runtime.engine, parameters)
        started = time.perf_counter()
        generator.append_tokens(np.array([self.ids], dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter() - started
        steps = []
        for _ in range(TOKENS - 1):
            started = time.perf_counter()
            generator.generate_next_token()
            steps.append(time.perf_counter() - started)
        return {"prefill_tok_s": PROMPT / first, "decode_tok_s": 1 / statistics.mean(steps)}

    def litert(self) -> dict[str, float]:
        """The benchmark of LiteRT-LM on the bundle that a phone opens, as `litert-lm benchmark` runs it."""
        from edgelab.runtimes import litert

        place = runtimes.exported("litert", self.folder).folder
        rates = litert.benchmark(place, torch.get_num_threads(), PROMPT, TOKENS)
        return dict(zip(("prefill_tok_s", "decode_tok_s"), rates, strict=True))


def agreement(engine: str) -> Iterator[tuple[str, str, str]]:
    """Median over rounds of our rate ÷ the engine's own, for prefill and decoding."""
    with Isolated("benchmarks.engines:OwnTools", threads=2, recipe=RECIPES[engine]) as tools:
        rounds = [(tools.call("ours"), tools.call(engine)) for _ in range(ROUNDS)]
    for name in ("prefill_tok_s", "decode_tok_s"):
        ratio = statistics.median(ours[name] / theirs[name] for ours, theirs in rounds)
        own = statistics.median(theirs[name] for _, theirs in rounds)
        yield f"{engine}: our {name} ÷ its own ({own:.0f})", f"{ratio:.3f}", AGREE


def speeds() -> Iterator[tuple[str, str, str]]:
    """Export, loading, decoding and share of the bandwidth limit of 4 bits on every engine.

    The limit counts the bytes that a token reads: all weights but ExecuTorch's embedding, beside which its head lies.
    """
    others = [f"{weights} @ {engine}" for engine in devices.STORED_AS for weights in (INT8, "none")]
    reads = [bandwidth.read_gb_s() for _ in range(3)]
    rows = list(lab.stream(["none", *RECIPES.values(), *others], only="speed", force=True))
    read = max(*reads, *(bandwidth.read_gb_s() for _ in range(3)))
    yield "memory read, GB/s", f"{read:.1f}", ""
    if failed := next((row for row in rows if row.status != "ok"), None):
        raise RuntimeError(f"{failed.recipe}: {failed.error}")
    yield from roofline(rows, read)
    shape = devices.models()["SmolLM2-135M"]
    unread = {"executorch": shape.vocab_size * shape.hidden_size / 1e6}  # MB of int8
    for engine, row in zip(RECIPES, rows[1:], strict=False):
        low, high = row.decode_ratio_low, row.decode_ratio_high
        best = engine == "onnxruntime"
        yield (
            f"{engine}: decoding ÷ PyTorch eager float32 ({row.decode_tok_s:.0f} tok/s)",
            f"{row.decode_ratio:.2f} [{low:.2f}, {high:.2f}]",
            "at least 4.5" if best else "",
        )
        share = row.decode_tok_s * (row.weights_mb - unread.get(engine, 0)) / 1e3 / read
        yield f"{engine}: share of the bandwidth limit", f"{share:.2f}", "at least 0.30" if best else ""
        if engine in EXPORT_S:
            yield (
                f"{engine}: export and load, s",
                f"{row.export_s + row.load_s:.1f}",
                f"under {EXPORT_S[engine]}",
            )


def roofline(rows: list[Row], read: float) -> Iterator[tuple[str, str, str]]:
    """Rates of 8-bit and float weights, predicted from that of 4 bits on the same engine, ÷ the measured ones."""
    shape = devices.models()["SmolLM2-135M"]
    by_recipe = {row.recipe: (row.decode_ratio or 1) * rows[0].decode_tok_s for row in rows}
    measured = {
        engine: {
            precision: by_recipe[str(recipes.parse(f"{weights} @ {engine}"))]
            for precision, weights in zip(stored, (INT4, INT8, "none"), strict=True)
        }
        for engine, stored in devices.STORED_AS.items()
    }
    fit = devices.fit_engines(shape, measured, read, CONTEXT)
    yield "split of the time beyond the limit, chosen on these rates", f"{fit.split:g}", ""
    for row in (
        fit.check.groupby("engine", sort=False).tail(-1).itertuples()
    ):  # without the rate it was set by
        ratio = f"{row.predicted / row.measured:.2f}"
        yield (
            f"{row.engine}: predicted ÷ measured, {row.weights} ({row.measured:.0f} tok/s)",
            ratio,
            "0.75 to 1.25",
        )


def main() -> None:
    torch.set_num_threads(2)
    rows = [*speeds(), *(line for engine in OWN_TOOLS for line in agreement(engine))]
    machine = ledger.provenance(threads=2)
    lines = [
        f"# Engines, {datetime.date.today()}",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, {machine['ram_gb']} GB. `{INT4}`, and `native.int4` on "
        "litert and executorch.",
        "",
        "| what | value | bound |",
        "| --- | --- | --- |",
        *(f"| {what} | {value} | {bound} |" for what, value, bound in rows),
    ]
    place = Path("results/engines.md")
    place.parent.mkdir(exist_ok=True)
    place.write_text("\n".join(lines) + "\n")
    print(place.read_text())


if __name__ == "__main__":
    main()
