"""Perplexity evaluation beside a plain Hugging Face loop and lm-eval: tokens per second, and the same number."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn import functional

from edgelab import corpora, reference
from edgelab.measure import perplexity

ROUNDS, WINDOWS = 5, 4  # every round runs every contestant once


def plain_loop(model: torch.nn.Module, cut: list[perplexity.Window]) -> float:
    """What most scripts do: float32 logits of a whole window, shifted, through cross_entropy."""
    total = 0.0
    with torch.no_grad():
        for window in cut:
            logits = model(window.ids[None]).logits.float()
            shifted, targets = logits[:, :-1].contiguous(), window.ids[None, 1:]
            total += functional.cross_entropy(
                shifted.view(-1, shifted.shape[-1]), targets.view(-1), reduction="sum"
            ).item()
    return math.exp(total / sum(window.scored for window in cut))


def rows() -> Iterator[tuple[str, str, str]]:
    torch.set_num_threads(2)
    ours, half = reference.load(), reference.load(dtype=torch.bfloat16)
    tokenizer = ours.tokenizer
    text = corpora.tokenize("wiki", tokenizer)
    default, rolling = perplexity.PROTOCOLS["edgelab-512"], perplexity.PROTOCOLS["lm-eval-word"]
    cut = perplexity.windows(text, default, tokenizer, WINDOWS)
    passage = corpora.tokenize_text(text.characters(0, rolling.window), tokenizer, "wiki")
    harness = HFLM(pretrained=ours.model, tokenizer=tokenizer, max_length=rolling.window, batch_size=1)
    request = Instance("loglikelihood_rolling", {}, (passage.text,), 0)

    contestants: dict[str, tuple[Callable[[], float], int]] = {
        "plain": (lambda: plain_loop(ours.model, cut), WINDOWS * 511),
        "float32": (
            lambda: perplexity.evaluate(ours.model, tokenizer, text, default, WINDOWS).ppl,
            WINDOWS * 511,
        ),
        "bfloat16": (
            lambda: perplexity.evaluate(half.model, tokenizer, text, default, WINDOWS).ppl,
            WINDOWS * 511,
        ),
        "lm-eval": (lambda: -harness.loglikelihood_rolling([request], disable_tqdm=True)[0], rolling.window),
        "rolling": (
            lambda: perplexity.evaluate(ours.model, tokenizer, passage, rolling).nll_sum,
            rolling.window,
        ),
    }
    values, seconds = {}, {name: [] for name in contestants}
    for turn in range(ROUNDS + 1):  # the first one warms up
        for name, (run, _) in contestants.items():
            started = time.perf_counter()
            values[name] = run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    rate = {name: tokens / statistics.median(seconds[name]) for name, (_, tokens) in contestants.items()}

    def ratio(mine: str, theirs: str) -> str:
        each = sorted(b / a for a, b in zip(seconds[mine], seconds[theirs], strict=True))
        return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"

    yield "evaluation, plain Hugging Face loop, float32, tok/s", f"{rate['plain']:.0f}", ""
    yield "evaluation, edgelab, float32, tok/s", f"{rate['float32']:.0f}", ""
    yield "edgelab over plain loop, ratio of paired rounds", ratio("float32", "plain"), "at least 1.3"
    yield "perplexity, edgelab / plain loop - 1", f"{values['float32'] / values['plain'] - 1:.1e}", "1e-4"
    yield "evaluation, edgelab, bfloat16, tok/s", f"{rate['bfloat16']:.0f}", "reported"
    yield "lm-eval rolling, float32, tok/s", f"{rate['lm-eval']:.0f}", ""
    yield "edgelab lm-eval-word, float32, tok/s", f"{rate['rolling']:.0f}", ""
    yield "edgelab over lm-eval, ratio of paired rounds", ratio("rolling", "lm-eval"), "reported"
    yield "NLL sum, edgelab / lm-eval - 1", f"{values['rolling'] / values['lm-eval'] - 1:.1e}", "1e-4"
