"""Who computes when: one request at a time, some wait in order, and the rest are asked to come again later."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from edgelab.deployments.hybrid.server.messages import Refusal

T = TypeVar("T")
LONGEST_RETRY_S = 30
RECENT = 0.2  # weight of the last turn in the running mean of their seconds


def busy(seconds: float) -> Refusal:
    """Come again after so many seconds."""
    retry = max(1, min(LONGEST_RETRY_S, math.ceil(seconds)))
    sentence = f"The server is busy; ask again in {retry} s."
    return Refusal(429, "busy", sentence, "rate_limit_error", retry)


class Turns:
    """A queue for one session. Steps of whoever has the turn run on one thread, which the event loop waits for.

    Whoever gives up in the middle of a step leaves it to end by itself; the next step waits for it on that thread.
    """

    def __init__(self, most_waiting: int) -> None:
        self.waiting = 0
        self._most_waiting = most_waiting
        self._lock = asyncio.Lock()
        self._mean_s = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for one's turn and hold it while the context lasts. Raises Refusal, 429, where too many wait."""
        if self._lock.locked() and self.waiting >= self._most_waiting:
            raise busy(self.expected_s())
        self.waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self.waiting -= 1
        started = time.monotonic()
        try:
            yield
        finally:
            self._lock.release()
            self._mean_s += RECENT * (time.monotonic() - started - self._mean_s)

    def expected_s(self) -> float:
        """About how long a newcomer would wait."""
        return (self.waiting + 1) * self._mean_s

    async def run(self, step: Callable[..., T], *arguments: object) -> T:
        """The result of a step, for whoever has the turn."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, step, *arguments)

    def close(self) -> None:
        """Wait for the step that runs, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
