"""A partition that runs while somebody looks on: planned, started, asked for tokens, robbed of a device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelab import runtimes
from edgelab.lab.question import Settings, ask
from edgelab.lab.road import built
from edgelab.measure.turn import timing_lock
from edgelab.reference import EMBEDDED, load_tokenizer

if TYPE_CHECKING:
    from edgelab.deployments.partition.session import Partitioned


@dataclass
class Running:
    """A recipe on a fleet. session: what every runtime gives, its `planned` the plan, its `running()` the workers."""

    session: Partitioned
    tokenizer: Any

    def write(self, prompts: list[str], tokens: int) -> Iterator[tuple[int, str, float]]:
        """answers to prompts, all in flight: which of them, the piece of text, seconds since the start."""
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
