"""What runs in a fresh process: one variant, built, scored and timed there. `lab` asks, and writes the row.

Arguments and results are JSON. What a method returns by name are fields of the row, and sums by window beside them.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from pathlib import Path

from edgelab import corpora, recipes, reference, runtimes, variants
from edgelab.measure import divergence, energy, isolation, latency, memory, parity, perplexity


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
        export = runtimes.exported(self.recipe.runtime, self.folder)
        isolation.report(1, 1)
        if export is None:
            bytes_ = {
                "weights_mb": size.total_bytes / 1e6,
                "linear_mb": size.linear_bytes / 1e6,
                "embedding_mb": size.embedding_bytes / 1e6,
                "scales_mb": size.scales_bytes / 1e6,
                "file_mb": (self.folder / "model.safetensors").stat().st_size / 1e6,
            }
        else:
            bytes_ = {"weights_mb": export.weights_bytes / 1e6, "file_mb": export.file_bytes / 1e6}
        return bytes_ | {
            "parameters": size.parameters,
            "bits_per_weight": 8e6 * bytes_["weights_mb"] / size.parameters,
            "kv_cache_mb_per_1k": memory.kv_cache_mb_per_1k(
                variants.load_config(self.folder), self._cache_bytes(about), variants.read_cache_grid(about)
            ),
            "apply_s": about["apply_s"],
            "export_s": export and export.seconds,
            "calibration_tokens": record.calibration_tokens,
            "train_tokens": record.train_tokens,
            "notes": " ".join(record.notes) or None,
        }

    def _cache_bytes(self, about: dict) -> float:
        """Bytes of one key or value as the runtime keeps it."""
        if self.recipe.runtime in runtimes.IN_TORCH:
            return 4 if about["dtype"] == "float32" else 2
        return runtimes.find(self.recipe.runtime).cache_bits / 8

    def quality(
        self, corpus: str, protocol: str, windows: int, states: str, record: bool
    ) -> dict[str, object]:
        """Perplexity, and divergence from the reference whose states are kept (or: keep them).

        Of an engine that gives no logits only its names.
        """
        runtime = runtimes.load(self.recipe.runtime, self.folder)
        if not runtime.gives_logits:
            return {"kernel": runtime.kernel, "badge": runtime.badge}
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
            in_torch = runtime.model is not None
            pieces = (
                perplexity.slices(runtime.model, cut)
                if in_torch
                else perplexity.logit_slices(runtime.logits, cut)
            )
            for piece in pieces:
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

    def answers(self, corpus: str) -> list[parity.Answer]:
        """What the runtime answers to the prompts of the parity gate, from the beginnings of a corpus on."""
        runtime = runtimes.load(self.recipe.runtime, self.folder)
        asked = parity.prompts(corpora.tokenize(corpus, self.tokenizer).ids)
        found = []
        for answer in parity.answers(runtime, asked):
            found.append(answer)
            isolation.report(len(found), len(asked))
        return found

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

    def warm_up(self, corpus: str, tokens: int) -> int:
        """Warm up with the first tokens of a corpus as prompt, repeated where they are too few."""
        ids = corpora.tokenize(corpus, self.tokenizer).ids[:tokens].tolist()
        prompt = (ids * math.ceil(tokens / len(ids)))[:tokens]
        self.timed = latency.Timed(self.runtime, prompt)
        self.metered: list[tuple[energy.Meter, int]] = []
        return self.timed.warm_up()

    def prefill(self) -> float:
        return self.timed.prefill()

    def decode(self, tokens: int) -> list[float]:
        with energy.metered() as meter:
            times = self.timed.decode(tokens)
        self.metered.append((meter, tokens))
        return times

    def energy(self, power_w: float | None) -> dict[str, object]:
        """Joules per decoded token so far and their basis: RAPL where it can be read, else from the device's power."""
        tokens = sum(count for _, count in self.metered)
        read = [meter.joules for meter, _ in self.metered]
        whole = energy.Meter(
            seconds=sum(meter.seconds for meter, _ in self.metered),
            joules=None if None in read or not read else sum(read),
        )
        joules, basis = whole.per_token(tokens, power_w) if tokens else (None, None)
        return {"energy_j_per_token": joules, "energy_basis": basis}

    def peak_rss_mb(self) -> float:
        return memory.peak_rss_mb() - self.nothing_mb
