"""Sessions: whole windows through an engine, against what its own prefill rate predicts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from edgelab import corpora, recipes, reference, runtimes
from edgelab.measure import perplexity
from edgelab.measure.protocols import protocol
from edgelab.storage import variants

RECIPE = "quantize.rtn:bits=4,group_size=64 + quantize.embedding:bits=8"
WINDOWS = 32


def rows() -> Iterator[tuple[str, str, str]]:
    """Scoring makes the logits of every position, prefill of the last one alone: a fifth more work, and a copy."""
    torch.set_num_threads(2)
    source = reference.resolve()
    folder = variants.build(recipes.parse(RECIPE), source, 0, lambda done, total: None)
    tokenizer = reference.load_tokenizer(source)
    text, rules = corpora.tokenize("wiki", tokenizer), protocol("edgelab-512")
    cut = perplexity.windows(text, rules, tokenizer, WINDOWS)
    session = runtimes.load("llamacpp", folder)
    rates, scored_s, total = [], 0.0, perplexity.PerplexitySum(text, rules, cut)
    for window in cut:  # in turns: the machine may be slower for a while
        session.prefill(window.ids.tolist())
        rates.append(session.own_timings()["prefill_tok_s"])
        started = time.perf_counter()
        for piece in perplexity.logit_slices(session.logits, [window]):
            total.add(piece)
        scored_s += time.perf_counter() - started
    session.close()
    rate = statistics.median(rates)
    predicted_s = sum(len(window.ids) for window in cut) / rate
    yield "llama.cpp: its own prefill rate, 512 tokens, tok/s", f"{rate:.0f}", ""
    yield (
        f"llama.cpp: {WINDOWS} windows of 512 scored ({scored_s:.1f} s) ÷ predicted from that",
        f"{scored_s / predicted_s:.2f}",
        "at most 2",
    )
