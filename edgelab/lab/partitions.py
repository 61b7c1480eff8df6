"""A partition that runs while somebody looks on: planned, started, asked for tokens, robbed of a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from edgelab import runtimes
from edgelab.deployments.partition.simulator import chain, pipeline_tok_s
from edgelab.lab.question import Settings, ask
from edgelab.lab.road import built
from edgelab.measure.latency import Timed
from edgelab.measure.turn import timing_lock
from edgelab.network import Link
from edgelab.reference import EMBEDDED, load_tokenizer

if TYPE_CHECKING:
    from edgelab.deployments.partition.session import Partitioned

PROMPT = list(range(2, 34))  # token ids of what is read before tokens are timed


@dataclass
class Running:
    """A recipe on a fleet. session: what every runtime gives, its `planned` the plan, its `running()` the workers."""

    session: Partitioned
    tokenizer: Any

    def write(self, prompts: list[str], tokens: int) -> Iterator[tuple[int, str, float]]:
        """Greedy answers to prompts, all in flight: which of them, the piece of text, seconds so far."""
        ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        started = time.perf_counter()
        for place, token in self.session.running().stream(ids, tokens):
            before = self.tokenizer.decode(written[place])
            written[place].append(token)
            yield place, self.tokenizer.decode(written[place])[len(before) :], time.perf_counter() - started


@contextmanager
def running(recipe: str, *, model: str = EMBEDDED, seed: int = 0) -> Iterator[Running]:
    """Make a recipe's variant, plan it for its fleet, and hold its workers while the context lasts.

    Nothing else is timed on this machine meanwhile. Raises an EdgeLabError where nothing fits, or Ray is missing.
    """
    (question,) = ask([recipe], Settings(model=model, seed=seed), interleave=False)
    folder = built(question)
    with timing_lock():
        session = runtimes.load(question.recipe.deployment, folder)
        try:
            yield Running(session, load_tokenizer(question.source))
        finally:
            session.close()


def over_rates(found: Running, rates_mbps: list[float], tokens: int = 32) -> pd.DataFrame:
    """Milliseconds per token, predicted and executed, with every link of a running partition set to each rate.

    Columns name, predicted_ms and executed_ms, a row for each rate.
    """
    session, rows = found.session, []
    cluster = session.running()
    before = {ends: proxy.link for ends, proxy in cluster.links.items()}
    for mbps in rates_mbps:
        problem = session.problem
        for name, target in cluster.links:
            problem = problem.with_bandwidth(cluster.device(name), cluster.device(target), mbps * 1e6 / 8)
            round_trip_ms = cluster.links[name, target].link.round_trip_ms
            link = Link(f"{mbps:g} Mbps", mbps / session.pace, mbps / session.pace, round_trip_ms)
            cluster.use_link(name, target, link)
        timed = Timed(session, PROMPT)
        timed.prefill()
        times = timed.decode(tokens)
        predicted = 1e3 * problem.cost(session.plan.placement, "latency")
        rows.append(
            {"name": f"{mbps:g} Mbps", "predicted_ms": predicted, "executed_ms": statistics.median(times)}
        )
    for ends, link in before.items():
        cluster.use_link(*ends, link)
    return pd.DataFrame(rows)


def in_flight(found: Running, requests: list[int], tokens: int = 24) -> pd.DataFrame:
    """Tokens per second of several requests at once, by the formula of a pipeline from measured stages, and executed.

    Columns requests, formula_tok_s and executed_tok_s.
    """
    session, rows = found.session, []
    cluster = session.running()
    for count in requests:
        rate = session.in_flight_tok_s(count, tokens)
        line = chain(session.problem, session.plan.placement)
        measured = line.busy_s.copy()
        for place, steps in enumerate(cluster.spent().values()):
            stage = int(np.flatnonzero(~line.is_link)[place])
            latest = [one.done - one.begun for one in steps if one.tokens == 1][-count * (tokens - 1) :]
            spent = statistics.median(latest)
            measured[line.busy[stage]] += spent / session.pace - line.seconds[stage]
        formula = pipeline_tok_s(measured, count, delay_s=line.delay.sum())
        rows.append({"requests": count, "formula_tok_s": formula, "executed_tok_s": rate})
    return pd.DataFrame(rows)
