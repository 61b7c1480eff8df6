"""Latency: time to first token of a prompt, and time per output token over a forced continuation.

A session is anything with `prefill(ids) -> token` and `decode(token) -> token`. Prefill and decoding are timed apart:
at least ten prefills, then continuations of fixed length, decoded in short turns. A comparison gives baseline and
candidate their turns alternately (A B A B), so that both see the same noise, and takes the ratio turn by turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from edgelab import assets
from edgelab.measure import Asked, Runner, measurement
from edgelab.measure.intervals import mean_interval

PREFILL_TOKENS, DECODE_TOKENS, TURN_TOKENS = 128, 64, 4
WARM_UP_MIN, WARM_UP_MAX = 3, 8
PREFILLS_MIN, SECONDS_MIN = 10, 2.0
Advance = Callable[[int, int], None]


class Session(Protocol):
    """What latency needs of a loaded model."""

    def prefill(self, ids: list[int]) -> int: ...

    def decode(self, token: int) -> int: ...


@measurement(
    "latency",
    part="speed",
    needs="turns",
    fields=(
        "ttft_ms_p50",
        "prefill_tok_s",
        "prefill_tokens",
        "decode_tokens",
        "tpot_ms_p50",
        "tpot_ms_p95",
        "decode_tok_s",
        "iterations",
        "prefill_ratio",
        "decode_ratio",
        "decode_ratio_low",
        "decode_ratio_high",
    ),
)
def latency(mine: Runner, theirs: Runner | None, asked: Asked, advance: Advance) -> dict[str, Any]:
    """Time to first token and per output token; with a baseline, in turns with it, the ratios too."""
    times, beside = take_turns(mine, theirs, asked.prompt_tokens, advance)
    found = {
        "prefill_tokens": asked.prompt_tokens,
        "decode_tokens": DECODE_TOKENS,
        "ttft_ms_p50": times.ttft_ms_p50,
        "prefill_tok_s": times.prefill_tok_s,
        "tpot_ms_p50": times.tpot_ms(50),
        "tpot_ms_p95": times.tpot_ms(95),
        "decode_tok_s": times.decode_tok_s,
        "iterations": len(times.turns_ms),
    }
    if theirs is not None:
        prefill, *_ = ratio(*([[ms] for ms in one.ttft_ms] for one in (times, beside)))
        decode = ratio(times.turns_ms, beside.turns_ms)
        names = ("decode_ratio", "decode_ratio_low", "decode_ratio_high")
        found |= {"prefill_ratio": prefill, **dict(zip(names, decode, strict=True))}
    return found


def take_turns(
    mine: Runner, theirs: Runner | None, prompt_tokens: int, advance: Advance
) -> tuple[Latency, Latency]:
    """Time prefills, then decoding in short turns, baseline and candidate alternately. FAST times less."""
    both = [(Latency(prompt_tokens=prompt_tokens), one) for one in (theirs, mine) if one is not None]
    prefills = 3 if assets.fast() else PREFILLS_MIN
    turns = DECODE_TOKENS // TURN_TOKENS
    for done in range(1, prefills + 1):
        for times, runner in both:
            times.ttft_ms.append(runner.prefill())
        advance(done, prefills + turns)
    candidate = both[-1][0]
    while not candidate.turns_ms or (candidate.decode_s < SECONDS_MIN and not assets.fast()):
        for _, runner in both if candidate.turns_ms else ():
            runner.prefill()  # a further continuation of the same length
        for done in range(1, turns + 1):
            for times, runner in both:
                times.turns_ms.append(runner.decode(TURN_TOKENS))
            advance(prefills + done, prefills + turns)
    return candidate, both[0][0]


@dataclass
class Latency:
    """Times of one session in ms: to the first token of each prompt, and of each token, turn by turn."""

    ttft_ms: list[float] = field(default_factory=list)
    turns_ms: list[list[float]] = field(default_factory=list)
    prompt_tokens: int = PREFILL_TOKENS

    @property
    def decode_s(self) -> float:
        """Seconds spent decoding."""
        return sum(map(sum, self.turns_ms)) / 1e3

    @property
    def ttft_ms_p50(self) -> float:
        return statistics.median(self.ttft_ms)

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second at the median time to first token."""
        return 1e3 * self.prompt_tokens / self.ttft_ms_p50

    def tpot_ms(self, percentile: float) -> float:
        """Percentile of the time per output token over all tokens."""
        return float(np.percentile([ms for turn in self.turns_ms for ms in turn], percentile))

    @property
    def decode_tok_s(self) -> float:
        """Output tokens per second at the median time per token."""
        return 1e3 / self.tpot_ms(50)


class Timed:
    """A session with a prompt, timed."""

    def __init__(self, session: Session, prompt: list[int]) -> None:
        self.session, self.prompt = session, prompt
        self.ms_per_s = 1e3 / getattr(session, "pace", 1.0)

    def prefill(self) -> float:
        """Time to first token in ms; a new sequence starts."""
        started = time.perf_counter()
        self.token = self.session.prefill(self.prompt)
        return self.ms_per_s * (time.perf_counter() - started)

    def decode(self, tokens: int) -> list[float]:
        """Time in ms of each of the next tokens of the sequence; an end-of-text token does not stop it."""
        marks = [time.perf_counter()]
        for _ in range(tokens):
            self.token = self.session.decode(self.token)
            marks.append(time.perf_counter())
        return [self.ms_per_s * (after - before) for before, after in pairwise(marks)]

    def warm_up(self) -> int:
        """Short runs until the last three agree within 10 % (at least 3, at most 8); returns how many."""
        times: list[float] = []
        while len(times) < WARM_UP_MAX:
            self.prefill()
            times.append(statistics.median(self.decode(TURN_TOKENS)))
            last = times[-WARM_UP_MIN:]
            if len(last) == WARM_UP_MIN and max(last) <= 1.1 * min(last):
                break
        return len(times)


def ratio(candidate: list[list[float]], baseline: list[list[float]]) -> tuple[float, float, float]:
    """Rate of the candidate over that of the baseline: geometric mean of the turns with its 95 % interval.

    candidate, baseline: times in ms of turns that ran one after the other (A B A B). Student's t on the logarithms.
    """
    found = mean_interval([math.log(sum(b) / sum(a)) for a, b in zip(candidate, baseline, strict=True)])
    return math.exp(found.mean), math.exp(found.low), math.exp(found.high)
