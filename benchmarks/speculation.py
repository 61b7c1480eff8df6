"""Speculative decoding: whether texts stay what they were, and what a token takes over links.

Edge and cloud run on this machine. Part of `benchmarks.hybrid`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor

from edgelab import corpora, network, recipes, reference, runtimes, tasks
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.counting import Meter
from edgelab.deployments.hybrid.remote import Remote
from edgelab.deployments.hybrid.speculation.acceptance import (
    break_even_round_trip_ms,
    expected_tokens,
    pipelined_ms,
    time_per_token_ms,
    travel_ms,
)
from edgelab.deployments.hybrid.speculation.drafting import Drafting, Verify, Verifying, departure
from edgelab.network import Link
from edgelab.reference import EMBEDDED
from edgelab.runtimes.session import Session
from edgelab.storage import variants

Rows = Iterator[tuple[str, str, str]]

MODEL = EMBEDDED
CLOUD = "none"  # float32
EDGE = "prune.layers:drop=13/14/15"
FAST_EDGE = "quantize.rtn:bits=4,group_size=64 + quantize.embedding:bits=8 @ llamacpp"
TEXTS, TOKENS = 32, 24  # that have to be identical
CLOSE = 1e-4  # logits that lie no further apart may change places when a text is read in other pieces
LINKS, DRAFTS = ("wifi", "lte", "3g"), (1, 2, 4, 8)
DRAFTED_TEXTS, DRAFTED_TOKENS = 4, 48
DRAFT = 4  # where one length has to do
WIDE = Link("wide", 50, 50)


def opened(recipe: str) -> Session:
    """A recipe of MODEL on its runtime, on as many threads as torch uses."""
    parsed = recipes.parse(recipe)
    folder = variants.build(parsed, reference.resolve(MODEL), 0, lambda done, total: None)
    return runtimes.load(parsed.deployment, folder)


def asked(count: int) -> list[list[int]]:
    """Beginnings of sentences of the wiki corpus, as tokens."""
    tokenizer = reference.load_tokenizer(reference.resolve(MODEL))
    return [
        tasks.prompt_ids(tokenizer, one.prompt) for one in tasks.requests(corpora.read("wiki"), limit=count)
    ]


def greedy(session: Session, ids: list[int], tokens: int) -> list[int]:
    """The likeliest tokens that follow a prompt, one by one."""
    found = [session.prefill(ids)]
    while len(found) < tokens:
        found.append(session.decode(found[-1]))
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Edge and cloud share two cores here: one for each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def against(value: float, computed: float) -> str:
    """A value, and by how much it is off from what was computed."""
    return f"{value:.1f} ({100 * (value / computed - 1):+.0f} %)"


# The same tokens


def identity(quick: bool = False) -> Rows:
    """What is drafted and verified, beside what the cloud writes alone, in this process."""
    tokens = 12 if quick else TOKENS
    with closing(opened(EDGE)) as edge, closing(opened(CLOUD)) as cloud:
        texts = [(ids, greedy(cloud, ids, tokens)) for ids in asked(2 if quick else TEXTS)]
        for draft in (1, 8) if quick else range(1, 9):
            gaps, accepted, tried = [], 0, 0
            for ids, alone in texts:
                loop = Drafting(edge, Verifying(cloud, ids), draft)
                parting = departure(cloud, ids, loop.write(ids, tokens), alone)
                gaps += [] if parting is None else [parting[1]]
                accepted, tried = accepted + loop.counts.accepted, tried + sum(loop.counts.tried)
            close = sum(gap < CLOSE for gap in gaps)
            yield (
                f"{EDGE} drafts {draft}: of {len(texts)} texts of {tokens} tokens, other than the cloud's own",
                f"{len(gaps) - close}, and {close} where its two likeliest logits are closer than {CLOSE:g} "
                f"(acceptance {accepted / tried:.2f})",
                "0",
            )


# Time per token


@dataclass
class Rounds:
    """Rounds in the middle of texts: the first one reads a prompt, and the last ones have less to draft.

    seconds: of each, away_s: of them until the answer came; up, down: bytes of HTTP. whole_s: of whole texts.
    """

    draft: int
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    away_s: list[float] = field(default_factory=list)
    up: list[int] = field(default_factory=list)
    down: list[int] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    @property
    def tokens_per_round(self) -> float:
        return statistics.mean(self.tokens)

    @property
    def ms_per_token(self) -> float:
        return 1e3 * sum(self.seconds) / sum(self.tokens)

    @property
    def verify_ms(self) -> float:
        """Until an answer came: the time to verify, where no link lies between."""
        return 1e3 * statistics.mean(self.away_s)

    @property
    def draft_ms(self) -> float:
        """Of a drafted token; not pipelined."""
        return 1e3 * (sum(self.seconds) - sum(self.away_s)) / (self.draft * len(self.seconds))

    def travel_ms(self, link: Link) -> float:
        """Of a round with as many bytes over a link."""
        return travel_ms(link, statistics.mean(self.up), statistics.mean(self.down))

    def add(
        self,
        edge: Session,
        begin: Callable[[], Verify],
        ids: list[int],
        tokens: int,
        pipelined: bool = False,
        meter: Meter | None = None,
    ) -> None:
        """Write a text. begin: a conversation with whoever verifies. meter: counts its bytes."""
        began = before = time.perf_counter()
        verify, answers = begin(), []

        def timed(step: int, drafted: list[int], probabilities: Tensor | None) -> tuple[int, int]:
            asked_at, counted = time.perf_counter(), _counted(meter)
            answer = verify(step, drafted, probabilities)
            up, down = (after - one for after, one in zip(_counted(meter), counted, strict=True))
            answers.append((time.perf_counter() - asked_at, up, down))
            return answer

        left = tokens
        for written in Drafting(edge, timed, self.draft, pipelined=pipelined).stream(ids, tokens):
            now = time.perf_counter()
            if self.draft < left < tokens:
                away, up, down = answers[-1]
                self.tokens.append(len(written))
                self.seconds.append(now - before)
                self.away_s.append(away)
                self.up.append(up)
                self.down.append(down)
            before, left = now, left - len(written)
        self.whole_s.append(time.perf_counter() - began)


def _counted(meter: Meter | None) -> tuple[int, int]:
    return (0, 0) if meter is None else (meter.sent, meter.received)


def acceptance_of(tokens_per_round: float, draft: int) -> float:
    """The acceptance that gives so many tokens a round by `expected_tokens`: formulas then go by what was measured."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, draft) < tokens_per_round else (low, middle)
    return low


@dataclass
class Stream:
    """Texts that the cloud streams. ms_per_token: behind the first; whole_s: of whole texts."""

    ms_per_token: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    def add(self, cloud: Cloud, ids: list[int], tokens: int) -> None:
        began = time.perf_counter()
        ends = [time.perf_counter() for piece in cloud.stream(ids, tokens) for _ in piece.ids or ()]
        self.whole_s.append(time.perf_counter() - began)
        self.ms_per_token.append(1e3 * (ends[-1] - ends[0]) / (len(ends) - 1))


def drafting(quick: bool = False) -> Rows:
    """Drafted here and verified over links, against the formula and against what needs no drafts at the edge."""
    count, tokens = (1, 24) if quick else (DRAFTED_TEXTS, DRAFTED_TOKENS)
    drafts = (1, DRAFT) if quick else DRAFTS
    with (
        one_thread(),
        closing(Remote(recipes.parse(CLOUD), LINKS[0], MODEL, 0)) as remote,
        closing(opened(EDGE)) as edge,
        closing(opened(CLOUD)) as cloud,
    ):
        texts = _unending(cloud, count, tokens)
        here, direct = ({draft: Rounds(draft) for draft in drafts} for _ in range(2))
        away = {
            (link, draft, ahead): Rounds(draft)
            for link, draft, ahead in product(LINKS, drafts, (False, True))
        }
        streams: dict[str, Stream] = defaultdict(Stream)
        for ids in texts:  # in turns: the machine may be slower for a while
            for draft in drafts:
                here[draft].add(edge, lambda ids=ids: Verifying(cloud, ids), ids, tokens)
                direct[draft].add(
                    edge, lambda ids=ids: remote.direct.verifier(ids), ids, tokens, meter=remote.direct.meter
                )
            for link in LINKS:
                remote.proxies.use(remote.proxy, network.find(link))
                streams[link].add(remote.cloud, ids, tokens)
                for draft, ahead in product(drafts, (False, True)):
                    away[link, draft, ahead].add(
                        edge, lambda ids=ids: remote.cloud.verifier(ids), ids, tokens, ahead
                    )
        yield from _times(here, direct, away, streams)
        yield from _break_even(remote, EDGE, edge, texts, tokens)
        with closing(opened(FAST_EDGE)) as fast:
            yield from _break_even(remote, FAST_EDGE, fast, texts, tokens)


def _unending(cloud: Session, count: int, tokens: int) -> list[list[int]]:
    """Prompts behind which the cloud's text does not end before so many tokens: a stream would end there."""
    end, found = reference.load_tokenizer(reference.resolve(MODEL)).eos_token_id, []
    for ids in asked(10 * count):
        found += [ids] if end not in greedy(cloud, ids, tokens) else []
        if len(found) == count:
            break
    return found


def _times(
    here: dict[int, Rounds],
    direct: dict[int, Rounds],
    away: dict[tuple[str, int, bool], Rounds],
    streams: dict[str, Stream],
) -> Rows:
    for draft, found in direct.items():
        yield (
            f"{EDGE} drafts {draft} a round: ms to draft a token, and to verify a draft",
            f"{found.draft_ms:.1f}, {found.verify_ms:.1f} ({found.tokens_per_round:.2f} tokens a round)",
            "",
        )
    for (link, draft, ahead), found in away.items():
        plain, takes = direct[draft], pipelined_ms if ahead else time_per_token_ms
        computed = takes(
            acceptance_of(found.tokens_per_round, draft),
            draft,
            plain.draft_ms,
            plain.verify_ms,
            plain.travel_ms(network.find(link)),
        )
        yield (
            f"drafted {draft} a round{', pipelined' if ahead else ''}, verified over {link}: ms per token, "
            f"computed {computed:.1f}",
            f"{against(found.ms_per_token, computed)}; {_whole(found)}",
            "within 20 %",
        )
    for link, found in streams.items():
        yield (
            f"streamed from the cloud over {link}: ms per token behind the first",
            f"{statistics.mean(found.ms_per_token):.1f}; {_whole(found)}",
            "",
        )
    for draft, found in here.items():
        yield (
            f"drafted {draft} a round in the cloud itself, without its link: ms per token",
            f"{found.ms_per_token:.1f}; {_whole(found)}",
            "",
        )


def _whole(found: Rounds | Stream) -> str:
    return f"{statistics.mean(found.whole_s):.1f} s a text"


def crossing(round_trips: Sequence[float], drafted: Sequence[float], streamed: Sequence[float]) -> float:
    """The round trip at which drafting takes as long as a stream, by a straight line through times at several.

    Negative where a line meets it there, infinite or NaN where both times grow alike.
    """
    slope, start = np.polyfit(round_trips, np.subtract(drafted, streamed), 1)
    return -start / slope if slope else math.nan


def _break_even(remote: Remote, recipe: str, edge: Session, texts: list[list[int]], tokens: int) -> Rows:
    """The round trip up to which drafting beats a stream, computed from times without a link, and over made ones."""
    plain = _drafted(remote.direct, edge, texts, tokens)
    target_ms = statistics.mean(_streamed(remote.direct, texts, tokens).ms_per_token)
    computed = break_even_round_trip_ms(
        acceptance_of(plain.tokens_per_round, DRAFT),
        DRAFT,
        plain.draft_ms,
        plain.verify_ms,
        target_ms,
        plain.travel_ms(WIDE),
    )
    tried = [computed / 2, 1.5 * computed] if computed > 0 else [0.0, 50.0]
    drafted, streamed = [], []
    for round_trip in tried:
        remote.proxies.use(remote.proxy, Link("made", WIDE.down_mbps, WIDE.up_mbps, round_trip))
        drafted.append(_drafted(remote.cloud, edge, texts, tokens).ms_per_token)
        streamed.append(statistics.mean(_streamed(remote.cloud, texts, tokens).ms_per_token))
    measured = crossing(tried, drafted, streamed)
    shown = "; ".join(
        f"{one:.1f} against {other:.1f} ms per token at {trip:.0f} ms"
        for one, other, trip in zip(drafted, streamed, tried, strict=True)
    )
    yield (
        f"{recipe} drafts {DRAFT} ({plain.draft_ms:.1f} ms each, verified in {plain.verify_ms:.1f} ms, "
        f"{plain.tokens_per_round:.2f} tokens a round): round trip up to which that beats a stream, ms, "
        f"computed {_trip(computed)}",
        f"{_trip(measured)}: {shown}",
        "",
    )


def _trip(round_trip: float) -> str:
    return f"{round_trip:.1f}" if round_trip > 0 else f"never ({round_trip:.1f})"


def _drafted(cloud: Cloud, edge: Session, texts: list[list[int]], tokens: int) -> Rounds:
    found = Rounds(DRAFT)
    for ids in texts:
        found.add(edge, lambda ids=ids: cloud.verifier(ids), ids, tokens, meter=cloud.meter)
    return found


def _streamed(cloud: Cloud, texts: list[list[int]], tokens: int) -> Stream:
    found = Stream()
    for ids in texts:
        found.add(cloud, ids, tokens)
    return found
