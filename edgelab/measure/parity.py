"""The parity gate: does an engine say what PyTorch says with the same weights? Only then is its speed worth ranking.

An engine that gives the logits of a whole text is scored on the same windows, and three numbers have to be PyTorch's:
perplexity, and KL divergence and top-1 agreement with the reference. Perplexity alone can come out right by luck: an
engine that dropped the scaling of rotary frequencies was 0.15 % off, with 0.099 nats of divergence and a quarter of
the most likely tokens changed. Engines that round activations to 8 bits are right, and on the embedded model move by
up to 0.7 %, 0.006 nats and 1.7 % of the tokens; the bounds leave that room.

An engine that only goes on writing is asked on 32 prompts: the most likely next token is the same, the
log-probabilities of the 20 most likely differ little, and the greedy continuations begin alike. Continuations are
compared up to the first token that differs, since what follows answers another prompt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOP = 32, 64, 16, 20
PPL_WITHIN = 0.01
KLD_WITHIN = 0.02  # nats
AGREEMENT_WITHIN = 0.04
FIRST_AT_LEAST = 29 / 32
APART_AT_MOST = 0.1  # nats
ALIKE_AT_LEAST = 0.7

Likely = list[tuple[int, float]]  # tokens with their log-probabilities, best first
Answer = tuple[list[int], Likely]  # the greedy continuation, and what was likely to come next


class Speaker(Protocol):
    """What the gate needs of a runtime."""

    def prefill(self, ids: list[int]) -> int: ...

    def decode(self, token: int) -> int: ...

    def top(self, ids: list[int], count: int) -> Likely: ...


@dataclass(frozen=True)
class Verdict:
    """passed: whether speeds may be ranked. detail: the numbers it rests on, in one line."""

    passed: bool
    detail: str


def prompts(ids: Tensor, count: int = PROMPTS, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """`count` prompts of `length` tokens spread evenly over a text (tokens,); in a short one they overlap."""
    last = max(len(ids) - length, 0)
    return [
        ids[start : start + length].tolist()
        for start in (last * i // max(count - 1, 1) for i in range(count))
    ]


def answers(speaker: Speaker, asked: list[list[int]]) -> Iterator[Answer]:
    """What a runtime answers to each prompt."""
    for prompt in asked:
        likely = speaker.top(prompt, TOP)
        written = [speaker.prefill(prompt)]
        while len(written) < NEW_TOKENS:
            written.append(speaker.decode(written[-1]))
        yield written, likely


def by_perplexity(engine: float, torch: float) -> Verdict:
    """Compare two perplexities of the same windows."""
    off = engine / torch - 1
    return Verdict(
        abs(off) <= PPL_WITHIN,
        f"perplexity {engine:.3f} against {torch:.3f} in PyTorch ({off:+.2%}; at most {PPL_WITHIN:.0%} apart)",
    )


def by_quality(engine: Mapping[str, Any], torch: Mapping[str, Any]) -> Verdict:
    """The first form of the gate, from the fields of two rows of the same windows.

    Divergence and agreement of both are to the reference, not to each other: two that are wrong by as much, each in
    its own way, pass. A row without them is the reference's own.
    """
    ppl = by_perplexity(engine["ppl"], torch["ppl"])
    (kld, agreed), (kld_torch, agreed_torch) = _moved(engine), _moved(torch)
    return Verdict(
        ppl.passed and abs(kld - kld_torch) <= KLD_WITHIN and abs(agreed - agreed_torch) <= AGREEMENT_WITHIN,
        f"{ppl.detail}, KL divergence from the reference {kld:.4f} against {kld_torch:.4f} (at most {KLD_WITHIN} "
        f"apart), top-1 agreement {agreed:.1%} against {agreed_torch:.1%} (at most {AGREEMENT_WITHIN:.0%} apart)",
    )


def _moved(row: Mapping[str, Any]) -> tuple[float, float]:
    """KL divergence from the reference and agreement with it."""
    return (0.0, 1.0) if row["kld_mean"] is None else (row["kld_mean"], row["top1_agreement"])


def by_answers(engine: list[Answer], torch: list[Answer]) -> Verdict:
    """The second form of the gate, from the answers to the same prompts.

    The difference of log-probabilities is the median over prompts of the mean over PyTorch's most likely tokens that
    the engine names, too; a prompt where it names none of them counts as infinitely far.
    """
    same_first = statistics.fmean(a[0][0] == b[0][0] for (_, a), (_, b) in zip(engine, torch, strict=True))
    apart = statistics.median(_apart(a, b) for (_, a), (_, b) in zip(engine, torch, strict=True))
    alike = statistics.fmean(_alike(a, b) for (a, _), (b, _) in zip(engine, torch, strict=True))
    return Verdict(
        same_first >= FIRST_AT_LEAST and apart <= APART_AT_MOST and alike >= ALIKE_AT_LEAST,
        f"{len(torch)} prompts: same next token {same_first:.0%} (at least {FIRST_AT_LEAST:.0%}), log-probabilities of "
        f"the top {TOP} {apart:.3f} nats apart (at most {APART_AT_MOST}), greedy continuations alike for {alike:.0%} "
        f"of {NEW_TOKENS} tokens (at least {ALIKE_AT_LEAST:.0%})",
    )


def _apart(engine: Likely, torch: Likely) -> float:
    named = dict(engine)
    shared = [abs(named[token] - likely) for token, likely in torch if token in named]
    return statistics.fmean(shared) if shared else math.inf


def _alike(engine: list[int], torch: list[int]) -> float:
    """Share of the tokens before the first that differs."""
    equal = next((i for i, (a, b) in enumerate(zip(engine, torch, strict=True)) if a != b), len(torch))
    return equal / len(torch)
