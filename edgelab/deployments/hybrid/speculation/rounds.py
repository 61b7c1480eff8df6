"""Rounds of speculative decoding: what they came to, and how long the next draft should be."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgelab.deployments.hybrid.speculation.acceptance import LONGEST, SpeculationError, best_draft


@dataclass
class Adaptive:
    """A draft length that follows what is seen: the one with the least expected time per token.

    Acceptance is a running estimate over rounds, each counting `memory` times as much as the one after it, with one
    token accepted and one rejected to begin with; times are those of the last rounds likewise. Liu et al. 2024
    (SmartSpec), arXiv:2406.14066, choose by expected tokens per second in the same way.
    """

    start: int = 4
    longest: int = LONGEST
    memory: float = 0.9
    accepted: float = field(default=1.0, init=False)
    tried: float = field(default=2.0, init=False)
    draft_ms: float | None = field(default=None, init=False)
    away_ms: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.longest or not 0 <= self.memory < 1:
            raise SpeculationError(
                f"start={self.start} should be 1 to longest={self.longest}, and memory={self.memory} 0 to below 1."
            )

    @property
    def acceptance(self) -> float:
        """The running estimate."""
        return self.accepted / self.tried

    def length(self, pipelined: bool = False) -> int:
        """Tokens of the next draft."""
        if self.draft_ms is None or self.away_ms is None:
            return self.start
        return best_draft(
            self.acceptance, self.draft_ms, self.away_ms, pipelined=pipelined, longest=self.longest
        )

    def observe(self, drafted: int, accepted: int, draft_ms: float, away_ms: float) -> None:
        """A round: tokens drafted and accepted, the drafter's time per token, and the time until the answer came."""
        self.accepted = self.memory * self.accepted + accepted
        self.tried = self.memory * self.tried + accepted + (accepted < drafted)
        self.draft_ms = self._mean(self.draft_ms, draft_ms)
        self.away_ms = self._mean(self.away_ms, away_ms)

    def _mean(self, before: float | None, now: float) -> float:
        return now if before is None else self.memory * before + (1 - self.memory) * now


@dataclass
class Counts:
    """What rounds came to. drafted: tokens sent to be verified; accepted: of those; tokens: written in the end.

    tried, held: for each place of a draft, rounds in which all before it were accepted, and in which it was, too.
    steps: of the drafter. ahead: those made while an answer was away; thrown_away: of those. prompt_s: reading the
    prompt; drafting_s: the drafter's steps, those made ahead too; waiting_s: the edge had nothing to do; away_s: until
    answers came.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    steps: int = 0
    ahead: int = 0
    thrown_away: int = 0
    prompt_s: float = 0.0
    drafting_s: float = 0.0
    waiting_s: float = 0.0
    away_s: float = 0.0
    tried: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        """Share accepted of the tokens whose predecessors were: the `acceptance` of the formulas."""
        return self.accepted / sum(self.tried) if sum(self.tried) else None

    @property
    def acceptance_by_place(self) -> list[float | None]:
        """The same at each place of a draft, the first one first; None where none before it was ever accepted."""
        return [held / tried if tried else None for held, tried in zip(self.held, self.tried, strict=True)]

    @property
    def tokens_per_round(self) -> float | None:
        """To compare with `expected_tokens`. The last round may have been cut off."""
        return self.tokens / self.rounds if self.rounds else None

    def count(self, drafted: int, accepted: int) -> None:
        """Enter a round."""
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        more = drafted - len(self.tried)
        self.tried += [0] * more
        self.held += [0] * more
        for place in range(min(accepted + 1, drafted)):
            self.tried[place] += 1
            self.held[place] += place < accepted
