"""The parity gate: does an engine say what PyTorch says with the same weights? Only then is its speed worth ranking.

An engine that gives the logits of a whole text is compared with PyTorch position by position, over the same windows and
the same weights in dense floats. Three numbers have to be small, each for a reason of its own:

- perplexity within 1 %: twice what rounding inputs to 8 bits costs on the embedded model (at most 0.5 %);
- KL divergence at most 0.02 nats: that rounding gives 0.002 to 0.006; an engine that dropped the scaling of rotary
  frequencies was at 0.099, with a perplexity only 0.15 % off, right by luck;
- the same most likely token at nine positions in ten: rounding changes 3 to 5 % of them, where two tokens are nearly as
  likely; that engine changed a quarter.

PyTorch runs in dense floats because its packed kernels round inputs as well, and by as much as an engine.

An engine that only goes on writing is asked on 32 prompts: the most likely next token is the same, the
log-probabilities of the 20 most likely differ little, and the greedy continuations begin alike. Continuations are
compared up to the first token that differs, since what follows answers another prompt.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from edgelab.measure.perplexity import Slice

VERSION = 2  # raise it where the same outputs get another verdict, and every engine is judged anew
WINDOWS = 8  # of the text, at most
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, TOP = 32, 64, 16, 20
PPL_WITHIN = 0.01
KLD_WITHIN = 0.02  # nats
AGREEMENT_AT_LEAST = 0.9
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


def by_logits(engine: Iterable[Slice], torch: Iterable[Slice]) -> Verdict:
    """The first form of the gate, from the logits of the same windows in slices of the same positions.

    Each is compared with the other, not with the reference: two that are as far from it, each in its own way, fail.
    """
    from edgelab.measure.divergence import kl_divergence

    tokens = agreed = 0
    more_nll = kld = 0.0  # of the engine, in nats
    for mine, theirs in zip(engine, torch, strict=True):
        likely, expected = (one.log_probs.gather(1, one.targets[:, None]) for one in (mine, theirs))
        more_nll += (expected - likely).double().sum().item()
        kld += kl_divergence(theirs.logits, mine.logits).double().sum().item()
        agreed += int((mine.most_likely == theirs.most_likely).sum())
        tokens += len(mine.targets)
    off, kld, agreement = math.expm1(more_nll / tokens), kld / tokens, agreed / tokens
    return Verdict(
        abs(off) <= PPL_WITHIN and kld <= KLD_WITHIN and agreement >= AGREEMENT_AT_LEAST,
        f"{tokens} tokens: perplexity {off:+.2%} against PyTorch (at most {PPL_WITHIN:.0%} apart), KL divergence "
        f"{kld:.4f} nats (at most {KLD_WITHIN}), same most likely token {agreement:.1%} (at least "
        f"{AGREEMENT_AT_LEAST:.0%})",
    )


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
