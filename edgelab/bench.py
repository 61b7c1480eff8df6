"""What runs in a fresh process: one variant, built, scored and timed there. `lab` asks, and writes the row.

Arguments and results are JSON. What a method returns by name are fields of the row, and sums by window beside them.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path

from edgelab import corpora, recipes, reference, runtimes, variants
from edgelab.measure import divergence, isolation, latency, memory, perplexity


class Bench:
    """One variant of a model: built, scored and run."""

    def __init__(self, recipe: str, model: str, seed: int) -> None:
        self.recipe = recipes.parse(recipe)
        self.source = reference.resolve(model)
        self.seed = seed
        self.tokenizer = reference.load_tokenizer(self.source)

    def build(self) -> dict[str, object]:
        """Make the variant unless it is cached; returns the row's fields of size and cost."""
        self.folder = variants.build(self.recipe, self.source, self.seed, isolation.report)
        about = variants.read_about(self.folder)
        size = variants.Size(**about["size"])
        record = recipes.Record(**about["record"])
        isolation.report(1, 1)
        return {
            "parameters": size.parameters,
            "weights_mb": size.total_bytes / 1e6,
            "linear_mb": size.linear_bytes / 1e6,
            "embedding_mb": size.embedding_bytes / 1e6,
            "scales_mb": size.scales_bytes / 1e6,
            "bits_per_weight": 8 * size.total_bytes / size.parameters,
            "file_mb": (self.folder / "model.safetensors").stat().st_size / 1e6,
            "kv_cache_mb_per_1k": memory.kv_cache_mb_per_1k(
                variants.load_config(self.folder),
                4 if about["dtype"] == "float32" else 2,
                variants.read_cache_grid(about),
            ),
            "apply_s": about["apply_s"],
            "calibration_tokens": record.calibration_tokens,
            "train_tokens": record.train_tokens,
            "notes": " ".join(record.notes) or None,
        }

    def quality(
        self, corpus: str, protocol: str, windows: int, states: str, record: bool
    ) -> dict[str, object]:
        """Perplexity, and divergence from the reference whose states are kept (or: keep them)."""
        runtime = runtimes.load(self.recipe.runtime, self.folder)
        rules = perplexity.protocol(protocol)
        text = corpora.tokenize(corpus, self.tokenizer)
        cut = perplexity.windows(text, rules, self.tokenizer, windows)
        total = perplexity.PerplexitySum(cut)
        with ExitStack() as stack:
            if record:
                other = stack.enter_context(divergence.recording(Path(states), cut, runtime.model))
            else:
                compared = reference.load_model(self.source)
                stack.enter_context(perplexity.prepacked(compared, perplexity.SLICE, only_head=True))
                other = divergence.DivergenceSum(Path(states), compared)
            for piece in perplexity.slices(runtime.model, cut):
                total.add(piece)
                other.add(piece)
                isolation.report(piece.window, len(cut))
        isolation.report(len(cut), len(cut))
        result = total.result(text, rules)
        found = {
            name: getattr(result, name)
            for name in ("n_tokens", "nll_sum", "ppl", "bits_per_byte", "nll_per_window", "tokens_per_window")
        }
        if not record:
            found |= {"kld_mean": other.kld_mean, "top1_agreement": other.agreement}
        return found | {"kernel": runtime.kernel, "badge": runtime.badge}

    def open(self) -> dict[str, object]:
        """Load the variant into the runtime. What the process needs without it is left out of its memory."""
        variants.skeleton(variants.load_config(self.folder))
        self.nothing_mb = memory.peak_rss_mb()
        started = time.perf_counter()
        self.runtime = runtimes.load(self.recipe.runtime, self.folder)
        load_s = time.perf_counter() - started
        return {
            "load_s": load_s,
            "compile_s": self.runtime.compile() if hasattr(self.runtime, "compile") else None,
            "kernel": self.runtime.kernel,
            "badge": self.runtime.badge,
        }

    def warm_up(self, corpus: str) -> int:
        """Warm up with the first tokens of a corpus as prompt, repeated where they are too few."""
        ids = corpora.tokenize(corpus, self.tokenizer).ids[: latency.PREFILL_TOKENS].tolist()
        prompt = (ids * math.ceil(latency.PREFILL_TOKENS / len(ids)))[: latency.PREFILL_TOKENS]
        self.timed = latency.Timed(self.runtime, prompt)
        return self.timed.warm_up()

    def prefill(self) -> float:
        return self.timed.prefill()

    def decode(self, tokens: int) -> list[float]:
        return self.timed.decode(tokens)

    def peak_rss_mb(self) -> float:
        return memory.peak_rss_mb() - self.nothing_mb
