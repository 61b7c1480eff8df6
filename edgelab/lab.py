"""The one road: recipe -> variant -> row. `measure` goes it once, `compare` several times beside the baseline.

Every step that touches weights happens in a fresh process (`Bench`): the variant is built and its quality measured in
one, its latency and memory in another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import psutil
from tqdm.auto import tqdm

from edgelab import assets, corpora, ledger, recipes, reference, runtimes, techniques, variants
from edgelab.errors import EdgeLabError
from edgelab.ledger import Row
from edgelab.measure import divergence, isolation, latency, memory, perplexity
from edgelab.measure.isolation import Isolated, IsolatedError
from edgelab.measure.latency import Latency

__all__ = ["DEFAULT_SET", "MeasureError", "compare", "measure", "techniques"]

log = logging.getLogger(__name__)

DEFAULT_SET = (
    "none",
    "quantize.bf16",
    "quantize.rtn:bits=8,group_size=0",
    "quantize.rtn:bits=4,group_size=64",
    "quantize.rtn:bits=3,group_size=64",
)
Progress = Callable[[int, int], None]


class MeasureError(EdgeLabError):
    """A measurement that failed; its row is in the ledger with the reason."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how. `only`: "quality", "speed", "memory" or None for all of them."""

    model: str = reference.EMBEDDED
    corpus: str = "wiki"
    protocol: str = "edgelab-512"
    windows: int = 16
    seed: int = 0
    threads: int = 2
    only: str | None = None
    force: bool = False
    timeout_s: float = 3600

    @property
    def quality(self) -> bool:
        return self.only in (None, "quality")

    @property
    def latency(self) -> bool:
        return self.only in (None, "speed")

    @property
    def process(self) -> bool:
        return self.only in (None, "speed", "memory")


def measure(recipe: str, *, model: str = reference.EMBEDDED, **settings: object) -> Row:
    """Apply a recipe, pack the variant, measure it in fresh processes, record the row and return it.

    settings: corpus, protocol, windows, runtime, seed, threads, only ("quality", "speed" or "memory"), force
    (measure again although the ledger has the row), timeout_s. Raises MeasureError where it failed.
    """
    parsed, chosen = _prepare([recipe], model=model, **settings)
    row = _known(parsed[0], chosen) or _row(parsed[0], chosen)
    if row.status != "ok":
        raise MeasureError(f"{row.recipe}: {row.error}")
    return row


def compare(
    recipes: Iterable[str] = DEFAULT_SET, *, model: str = reference.EMBEDDED, **settings: object
) -> pd.DataFrame:
    """Measure recipes one after the other, the baseline's latency interleaved with each (A B A B), as a table of rows.

    A recipe that fails becomes a row with status and reason, and the comparison goes on. Settings as in `measure`.
    """
    return ledger.frame(list(stream(recipes, model=model, **settings)))


def stream(
    recipes: Iterable[str], *, model: str = reference.EMBEDDED, interleave: bool = True, **settings: object
) -> Iterator[Row]:
    """As `compare`, but each row as soon as it is measured; interleave=False times each recipe by itself."""
    parsed, chosen = _prepare(recipes, model=model, **settings)
    with ExitStack() as stack:
        beside: Isolated | None = None
        for recipe in parsed:
            interleaved = (
                interleave and chosen.latency and recipe != NOTHING and recipe.runtime != "simulated"
            )
            known = _known(recipe, chosen, interleaved)
            if known is None and interleaved and beside is None:
                beside = stack.enter_context(_bench(NOTHING, chosen))
                beside.call("build")
                beside.call("open")
                beside.call("warm_up", corpus=chosen.corpus)
            yield known or _row(recipe, chosen, beside if interleaved else None)


def _prepare(texts: Iterable[str], model: str, runtime: str | None = None, **settings: object):
    """Check everything that can be checked before the first measurement."""
    parsed = [recipes.parse(text, runtimes.RUNTIMES) for text in texts]
    if not parsed:
        raise MeasureError("There is nothing to measure; name at least one recipe, such as 'none'.")
    if runtime is not None:
        if runtime not in runtimes.RUNTIMES:
            raise recipes.RecipeError(
                f"Unknown runtime '{runtime}'; there is {', '.join(runtimes.RUNTIMES)}."
            )
        parsed = [replace(one, runtime=runtime) for one in parsed]
    defaults = {"threads": psutil.cpu_count(logical=False) or 1, "windows": 4 if assets.fast() else 16}
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = set(given) - set(Settings.__dataclass_fields__)
    if unknown:
        raise MeasureError(
            f"Unknown setting {', '.join(unknown)}; there is {', '.join(Settings.__dataclass_fields__)}."
        )
    chosen = Settings(model=model, **defaults | given)
    if chosen.only not in (None, "quality", "speed", "memory"):
        raise MeasureError(f"only={chosen.only} is none of quality, speed, memory.")
    if chosen.windows < 1 or chosen.threads < 1:
        raise MeasureError("windows and threads are whole numbers from 1 on.")
    source = reference.resolve(model)
    text = corpora.tokenize(chosen.corpus, reference.load_tokenizer(source))
    perplexity.windows(text, perplexity.protocol(chosen.protocol), reference.load_tokenizer(source), 1)
    return parsed, chosen


NOTHING = recipes.Recipe()


def _row(recipe: recipes.Recipe, chosen: Settings, beside: Isolated | None = None) -> Row:
    """One row, measured and recorded; with `beside`, a loaded baseline, in turns with that."""
    baseline = _baseline(chosen) if chosen.quality and recipe != NOTHING else None
    source = reference.resolve(chosen.model)
    row = Row(
        str(recipe),
        recipe.family,
        source.name,
        source.sha,
        recipe.runtime,
        seed=chosen.seed,
        fast=assets.fast(),
        **ledger.provenance(chosen.threads),
    )
    if chosen.quality:
        row.protocol, row.corpus, row.windows = (
            chosen.protocol,
            corpora.identity(chosen.corpus),
            chosen.windows,
        )
    started = time.perf_counter()
    try:
        with _bench(recipe, chosen) as bench:
            _fill(row, bench.call("build", progress=_bar(f"{recipe}: build")))
            if chosen.quality:
                _quality(row, bench, chosen, baseline)
        if chosen.process and recipe.runtime != "simulated":
            with _bench(recipe, chosen) as bench:
                _process(row, bench, beside, chosen)
    except IsolatedError as error:
        row.status, row.error = error.status, str(error)
    row.duration_s = time.perf_counter() - started
    return ledger.add(row)


def _known(recipe: recipes.Recipe, chosen: Settings, interleaved: bool = False) -> Row | None:
    """The newest row that answers the same question, on this machine, with these versions; None where forced."""
    if chosen.force:
        return None
    here = ledger.provenance(chosen.threads)
    same = {key: here[key] for key in ("host", "threads", "versions")}
    if chosen.quality:
        same |= {
            "protocol": chosen.protocol,
            "corpus": corpora.identity(chosen.corpus),
            "windows": chosen.windows,
        }
    wanted = {
        "ppl": chosen.quality,
        "decode_tok_s": chosen.latency,
        "peak_rss_mb": chosen.process,
        "decode_ratio": interleaved,
    }
    if recipe.runtime == "simulated":
        wanted = {"ppl": chosen.quality}
    row = ledger.find(
        recipe=str(recipe),
        model_sha=reference.resolve(chosen.model).sha,
        seed=chosen.seed,
        fast=assets.fast(),
        status="ok",
        **same,
    )
    return (
        row if row and all(getattr(row, key) is not None for key, asked in wanted.items() if asked) else None
    )


def _baseline(chosen: Settings) -> Row:
    """The baseline's row with its windows; measured first where the ledger or its hidden states lack it."""
    states = states_file(reference.resolve(chosen.model).sha, chosen)
    quality = replace(chosen, only="quality", force=not states.exists())
    row = _known(NOTHING, quality) or _row(NOTHING, quality)
    if row.status != "ok":
        raise MeasureError(f"The baseline cannot be measured: {row.error}")
    return row


def states_file(model_sha: str, chosen: Settings) -> Path:
    """Where the reference's final hidden states of these windows are kept."""
    version = perplexity.protocol(chosen.protocol).version
    text = json.dumps([model_sha, corpora.identity(chosen.corpus), chosen.protocol, version, chosen.windows])
    return variants.states_dir() / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.npy"


def _quality(row: Row, bench: Isolated, chosen: Settings, baseline: Row | None) -> None:
    found = bench.call(
        "quality",
        progress=_bar(f"{row.recipe}: quality"),
        corpus=chosen.corpus,
        protocol=chosen.protocol,
        windows=chosen.windows,
        states=str(states_file(row.model_sha, chosen)),
        record=baseline is None,
    )
    nll, tokens = found.pop("nll_per_window"), found.pop("tokens_per_window")
    _fill(row, found)
    row.window_nll = [one / n for one, n in zip(nll, tokens, strict=True)]
    if baseline is not None:
        sums = [one * n for one, n in zip(baseline.window_nll, tokens, strict=True)]
        delta = divergence.paired_delta(nll, sums, tokens)
        row.delta_nll = delta.mean
        row.delta_nll_low, row.delta_nll_high = (
            None if math.isnan(x) else x for x in (delta.low, delta.high)
        )


def _process(row: Row, bench: Isolated, beside: Isolated | None, chosen: Settings) -> None:
    """Load, generate, and read the clock and the peak of memory; with `beside`, in turns with the baseline."""
    bench.call("build")
    _fill(row, bench.call("open"))
    bench.call("warm_up", corpus=chosen.corpus)
    if chosen.latency:
        mine, theirs = _take_turns(bench, beside, _bar(f"{row.recipe}: speed"))
        _fill(
            row,
            {
                "prefill_tokens": latency.PREFILL_TOKENS,
                "decode_tokens": latency.DECODE_TOKENS,
                "ttft_ms_p50": mine.ttft_ms_p50,
                "prefill_tok_s": mine.prefill_tok_s,
                "tpot_ms_p50": mine.tpot_ms(50),
                "tpot_ms_p95": mine.tpot_ms(95),
                "decode_tok_s": mine.decode_tok_s,
                "iterations": len(mine.turns_ms),
            },
        )
        if beside is not None:
            row.decode_ratio, row.decode_ratio_low, row.decode_ratio_high = latency.ratio(
                mine.turns_ms, theirs.turns_ms
            )
    row.peak_rss_mb = bench.call("peak_rss_mb")


def _take_turns(bench: Isolated, beside: Isolated | None, advance: Progress) -> tuple[Latency, Latency]:
    """Time prefills, then decoding in short turns, baseline and candidate alternately."""
    mine, theirs = Latency(), Latency()
    runners = [(bench, mine)] if beside is None else [(beside, theirs), (bench, mine)]
    prefills = 3 if assets.fast() else latency.PREFILLS_MIN
    turns = latency.DECODE_TOKENS // latency.TURN_TOKENS
    for done in range(1, prefills + 1):
        for runner, times in runners:
            times.ttft_ms.append(runner.call("prefill"))
        advance(done, prefills + turns)
    while not mine.turns_ms or (mine.decode_s < latency.SECONDS_MIN and not assets.fast()):
        for runner, _ in runners if mine.turns_ms else ():
            runner.call("prefill")  # a further continuation of the same length
        for done in range(1, turns + 1):
            for runner, times in runners:
                times.turns_ms.append(runner.call("decode", tokens=latency.TURN_TOKENS))
            advance(prefills + done, prefills + turns)
    return mine, theirs


def _fill(row: Row, values: dict[str, object]) -> None:
    for name, value in values.items():
        setattr(row, name, value)


def _bench(recipe: recipes.Recipe, chosen: Settings) -> Isolated:
    return Isolated(
        "edgelab.lab:Bench",
        chosen.threads,
        chosen.timeout_s,
        recipe=str(recipe),
        model=chosen.model,
        seed=chosen.seed,
    )


def _bar(what: str) -> Progress:
    """A progress callback that draws one bar and takes it away when it is full."""
    bar = tqdm(total=1, desc=what, leave=False)

    def advance(done: int, total: int) -> None:
        if (bar.n, bar.total) != (done, total):
            bar.total, bar.n = total, done
            bar.refresh()
        if done >= total:
            bar.close()

    return advance


class Bench:
    """What runs in a fresh process: build a variant, measure its quality, run it."""

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
