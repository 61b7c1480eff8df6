"""What one cloud serves: eight clients at once, for whom it writes or who draft. Part of `benchmarks.hybrid`.

Tokens per second are counted with the reading of prompts, both ways.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import psutil
from torch import Tensor

from benchmarks.speculation import CLOUD, DRAFT, DRAFTED_TOKENS, EDGE, MODEL, Rows, asked, one_thread, opened
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.server.serving import Running, Settings, started
from edgelab.deployments.hybrid.speculation.acceptance import capacity_clients
from edgelab.deployments.hybrid.speculation.drafting import Drafting, Verifying
from edgelab.runtimes.session import Session

CLIENTS = 8


@dataclass
class Replay:
    """Drafts that an edge made once, and what became of them, to be sent again without a model.

    drafts: (draft, accepted, next) of each round. draft_s: of a drafted token.
    """

    ids: list[int]
    drafts: list[tuple[list[int], int, int]]
    draft_s: float

    @classmethod
    def recorded(cls, edge: Session, cloud: Session, ids: list[int], tokens: int) -> Replay:
        """A text of an edge and a cloud in this process."""
        verify, drafts = Verifying(cloud, ids), []

        def noted(step: int, drafted: list[int], probabilities: Tensor | None) -> tuple[int, int]:
            answer = verify(step, drafted, probabilities)
            drafts.append((list(drafted), *answer))
            return answer

        loop = Drafting(edge, noted, DRAFT)
        loop.write(ids, tokens)
        return cls(ids, drafts, loop.counts.drafting_s / loop.counts.steps)

    @property
    def tokens(self) -> int:
        return sum(accepted + 1 for _, accepted, _ in self.drafts)

    def sent(self, cloud: Cloud) -> int:
        """Send the drafts at the pace at which they were made; how many answers were other than the first time."""
        verify, others = cloud.verifier(self.ids), 0
        for step, (drafted, *answer) in enumerate(self.drafts):
            time.sleep(len(drafted) * self.draft_s)
            others += verify(step, drafted, None) != tuple(answer)
        return others


@dataclass(frozen=True)
class Load:
    """What a server did. cpu_s: in which its process computed."""

    tokens: int
    seconds: float
    cpu_s: float

    def __str__(self) -> str:
        return f"{self.tokens / self.seconds:.1f} tok/s, {self.rate:.1f} per second in which it computes"

    @property
    def rate(self) -> float:
        """Tokens per second of computing."""
        return self.tokens / self.cpu_s


def loaded(server: Running, work: Sequence[Callable[[Cloud], int]], at_once: int) -> Load:
    """Clients of a server, so many at once, with a connection each. work: of each, which returns tokens."""
    computing = psutil.Process(server.pid)

    def done(one: Callable[[Cloud], int]) -> int:
        with Cloud(server.url, server.token, deadline_s=120) as cloud:
            return one(cloud)

    before, began = computing.cpu_times(), time.perf_counter()
    with ThreadPoolExecutor(at_once) as clients:
        tokens = sum(clients.map(done, work))
    seconds, after = time.perf_counter() - began, computing.cpu_times()
    return Load(tokens, seconds, after.user + after.system - before.user - before.system)


def capacity(quick: bool = False) -> Rows:
    """Eight clients at one server: it writes for them, or they draft, and it keeps what it has read of each.

    Eight edges do not fit on two cores: clients send drafts that an edge made before, after as long as it took then.
    They are not behind a link, which would leave the server more time for others.
    """
    tokens = 12 if quick else DRAFTED_TOKENS
    with one_thread(), started(Settings(recipe=CLOUD, model=MODEL, threads=1)) as server:
        with closing(opened(EDGE)) as edge, closing(opened(CLOUD)) as cloud:
            replays = [Replay.recorded(edge, cloud, ids, tokens) for ids in asked(CLIENTS)]
        others: list[int] = []

        def drafts(replay: Replay, cloud: Cloud) -> int:
            others.append(replay.sent(cloud))
            return replay.tokens

        writing = [lambda cloud, one=one: len(cloud.complete(one.ids, tokens).ids) for one in replays]
        sending = [lambda cloud, one=one: drafts(one, cloud) for one in replays]
        loaded(server, writing[:1], 1)  # warm
        alone = loaded(server, writing, CLIENTS)
        together = loaded(server, sending, CLIENTS)
        in_turn = loaded(server, sending, 1)
    rounds = [one for replay in replays for one in replay.drafts]
    accepted = sum(one[1] for one in rounds) / len(rounds)
    yield f"{CLIENTS} clients at once, the cloud writes: altogether", str(alone), ""
    yield (
        f"{CLIENTS} clients at once, which draft {DRAFT} (replayed, {accepted + 1:.2f} tokens a round): altogether",
        f"{together}, {together.rate / alone.rate:.2f} of it",
        "above 1",
    )
    yield (
        f"{CLIENTS} clients one after the other, which draft {DRAFT}: altogether",
        f"{in_turn}, {in_turn.rate / alone.rate:.2f} of it",
        "above 1",
    )
    fit = capacity_clients(
        DRAFT, 1e3 * statistics.mean(one.draft_s for one in replays), 1e3 * in_turn.cpu_s / len(rounds)
    )
    yield (
        f"clients served as fast as one alone, of {CLIENTS}: {fit:.1f} by the formula",
        f"{together.tokens / together.seconds / (in_turn.tokens / in_turn.seconds):.1f}",
        "",
    )
    yield "replayed drafts that were answered otherwise than when they were recorded", f"{sum(others)}", "0"
