"""The one road: recipe -> variant -> row. `measure` goes it once, `compare` several times beside the baseline.

Every step that touches weights happens in a fresh process (see `bench`): the variant is built and its quality measured
in one, its latency and memory in another.
"""

from __future__ import annotations

import hashlib
import json
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
from edgelab.bench import Bench
from edgelab.errors import EdgeLabError
from edgelab.ledger import Row
from edgelab.measure import divergence, energy, latency, parity, perplexity
from edgelab.measure.isolation import Isolated, IsolatedError
from edgelab.measure.latency import Latency

__all__ = ["DEFAULT_SET", "Bench", "MeasureError", "compare", "measure", "techniques"]

DEFAULT_SET = (
    "none",
    "quantize.bf16",
    "quantize.rtn:bits=8,group_size=0",
    "quantize.rtn:bits=4,group_size=64",
    "quantize.rtn:bits=3,group_size=64",
)
NOTHING = recipes.Recipe()
Progress = Callable[[int, int], None]


class MeasureError(EdgeLabError):
    """A measurement that failed; its row is in the ledger with the reason."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how. `only`: "quality", "speed", "memory" or None for all of them.

    Raises MeasureError for what cannot be.
    """

    model: str = reference.EMBEDDED
    corpus: str = "wiki"
    protocol: str = "edgelab-512"
    windows: int = 32
    seed: int = 0
    threads: int = 2
    prompt_tokens: int = latency.PREFILL_TOKENS
    power_w: float | None = (
        None  # of the device while it decodes, for an estimate where no counter can be read
    )
    only: str | None = None
    force: bool = False
    timeout_s: float = 3600

    def __post_init__(self) -> None:
        if self.only not in (None, "quality", "speed", "memory"):
            raise MeasureError(f"only={self.only} is none of quality, speed, memory.")
        if min(self.windows, self.threads, self.prompt_tokens) < 1:
            raise MeasureError("windows, threads and prompt_tokens are whole numbers from 1 on.")
        if self.power_w is not None and not self.power_w > 0:
            raise MeasureError(
                f"power_w={self.power_w} is not positive; give the watts of the device, such as 5."
            )

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

    settings: corpus, protocol, windows, runtime, seed, threads, prompt_tokens, power_w (watts of the device
    while it decodes), only ("quality", "speed" or "memory"), force (measure again although the ledger has the row),
    timeout_s. Raises MeasureError where it failed.
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
                beside.call("warm_up", corpus=chosen.corpus, tokens=chosen.prompt_tokens)
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
    defaults = {
        "threads": psutil.cpu_count(logical=False) or 1,
        "windows": 4 if assets.fast() else Settings.windows,
    }
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = set(given) - set(Settings.__dataclass_fields__)
    if unknown:
        raise MeasureError(
            f"Unknown setting {', '.join(unknown)}; there is {', '.join(Settings.__dataclass_fields__)}."
        )
    chosen = Settings(model=model, **defaults | given)
    tokenizer = reference.load_tokenizer(reference.resolve(model))
    text = corpora.tokenize(chosen.corpus, tokenizer)
    perplexity.windows(text, perplexity.protocol(chosen.protocol), tokenizer, 1)
    return parsed, chosen


def _row(recipe: recipes.Recipe, chosen: Settings, beside: Isolated | None = None) -> Row:
    """One row, measured and recorded; with `beside`, a loaded baseline, in turns with that."""
    baseline = _baseline(chosen) if chosen.quality and recipe != NOTHING else None
    source = reference.resolve(chosen.model)
    row = Row(
        **_question(recipe, source.sha, chosen),
        family=recipe.family,
        model=source.name,
        runtime=recipe.runtime,
        **_provenance(recipe, chosen),
    )
    started = time.perf_counter()
    try:
        with ExitStack() as stack:
            scored = stack.enter_context(_bench(recipe, chosen))
            timed = None
            if chosen.process and recipe.runtime != "simulated":
                timed = stack.enter_context(_bench(recipe, chosen))
                timed.wait()  # both import at once; nothing else runs while the variant is built
            _fill(row, scored.call("build", progress=_bar(f"{recipe}: build")))
            if chosen.quality:
                _quality(row, scored, chosen, baseline)
                if recipe.runtime not in runtimes.IN_TORCH:
                    _gate(row, recipe, scored, chosen)
            scored.close()
            if timed is not None:
                _process(row, timed, beside, chosen)
    except IsolatedError as error:
        row.status, row.error = error.status, str(error)
    row.duration_s = time.perf_counter() - started
    return ledger.add(row)


def _provenance(recipe: recipes.Recipe, chosen: Settings) -> dict[str, object]:
    kind = runtimes.find(recipe.runtime)
    return ledger.provenance(chosen.threads, kind.packages, getattr(kind, "version", None))


def _question(recipe: recipes.Recipe, model_sha: str, chosen: Settings) -> dict[str, object]:
    """The fields of a row that say what was asked: rows that differ in none of them answer the same."""
    fields = {"recipe": str(recipe), "model_sha": model_sha, "seed": chosen.seed, "fast": assets.fast()}
    if chosen.quality:
        corpus = corpora.identity(chosen.corpus)
        fields |= {"protocol": chosen.protocol, "corpus": corpus, "windows": chosen.windows}
    if chosen.latency and recipe.runtime != "simulated":
        fields |= {"prefill_tokens": chosen.prompt_tokens}
    return fields


def _known(recipe: recipes.Recipe, chosen: Settings, interleaved: bool = False) -> Row | None:
    """The newest row that answers the same question, on this machine, with these versions; None where forced."""
    if chosen.force:
        return None
    here = _provenance(recipe, chosen)
    same = {name: here[name] for name in ("host", "threads", "versions")}
    question = _question(recipe, reference.resolve(chosen.model).sha, chosen)
    row = ledger.find(**question, **same, status="ok")
    scored = recipe.runtime in runtimes.IN_TORCH
    wanted = {"ppl" if scored else "parity": chosen.quality}
    if recipe.runtime != "simulated":
        wanted |= {"decode_tok_s": chosen.latency, "peak_rss_mb": chosen.process, "decode_ratio": interleaved}
    whole = row and all(getattr(row, name) is not None for name, asked in wanted.items() if asked)
    if whole and chosen.latency and chosen.power_w:
        whole = energy.is_of(row.energy_basis, chosen.power_w)
    return row if whole else None


def _baseline(chosen: Settings) -> Row:
    """The baseline's row with its windows; measured first where the ledger or its hidden states lack it."""
    states = states_file(reference.resolve(chosen.model).sha, chosen)
    # Nothing is drawn for the baseline: one row answers for every seed.
    quality = replace(chosen, only="quality", seed=Settings.seed, force=not states.exists())
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
    nll, tokens = found.pop("nll_per_window", None), found.pop("tokens_per_window", None)
    _fill(row, found)
    if nll is None:  # an engine that gives no logits
        return
    row.window_nll = [one / n for one, n in zip(nll, tokens, strict=True)]
    if baseline is not None:
        sums = [one * n for one, n in zip(baseline.window_nll, tokens, strict=True)]
        delta = divergence.paired_delta(nll, sums, tokens)
        row.delta_nll = delta.mean
        row.delta_nll_low, row.delta_nll_high = (
            None if math.isnan(x) else x for x in (delta.low, delta.high)
        )


def _gate(row: Row, recipe: recipes.Recipe, bench: Isolated, chosen: Settings) -> None:
    """Compare an engine with PyTorch on the same weights; an engine's own quantizer has no such twin."""
    if recipe.family == "native":
        row.parity, row.parity_detail = (
            "own weights",
            "rounded by the engine itself: compare its quality, not its kernel",
        )
        return
    twin = replace(recipe, runtime=recipes.DEFAULT_RUNTIME)
    if row.ppl is not None:
        quality = replace(chosen, only="quality", force=False)
        theirs = _known(twin, quality) or _row(twin, quality)
        if theirs.status != "ok":
            row.parity, row.parity_detail = "failed", f"PyTorch could not be asked: {theirs.error}"
            return
        verdict = parity.by_perplexity(row.ppl, theirs.ppl)
    else:
        asked = {"corpus": chosen.corpus, "progress": _bar(f"{recipe}: parity")}
        with _bench(twin, chosen) as other:
            other.call("build")
            theirs = other.call("answers", **asked)
        verdict = parity.by_answers(bench.call("answers", **asked), theirs)
    row.parity, row.parity_detail = "passed" if verdict.passed else "failed", verdict.detail


def _process(row: Row, bench: Isolated, beside: Isolated | None, chosen: Settings) -> None:
    """Load, generate, and read the clock and the peak of memory; with `beside`, in turns with the baseline."""
    bench.call("build")
    _fill(row, bench.call("open"))
    bench.call("warm_up", corpus=chosen.corpus, tokens=chosen.prompt_tokens)
    if chosen.latency:
        mine, theirs = _take_turns(bench, beside, chosen.prompt_tokens, _bar(f"{row.recipe}: speed"))
        _fill(
            row,
            {
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
            row.prefill_ratio, *_ = latency.ratio(*([[ms] for ms in one.ttft_ms] for one in (mine, theirs)))
            row.decode_ratio, row.decode_ratio_low, row.decode_ratio_high = latency.ratio(
                mine.turns_ms, theirs.turns_ms
            )
        _fill(row, bench.call("energy", power_w=chosen.power_w))
    row.peak_rss_mb = bench.call("peak_rss_mb")


def _take_turns(
    bench: Isolated, beside: Isolated | None, prompt_tokens: int, advance: Progress
) -> tuple[Latency, Latency]:
    """Time prefills, then decoding in short turns, baseline and candidate alternately."""
    mine, theirs = (Latency(prompt_tokens=prompt_tokens) for _ in range(2))
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
        "edgelab.bench:Bench",
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
