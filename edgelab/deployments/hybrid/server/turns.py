"""Who computes when: one request at a time, some wait in order, and the rest are asked to come again later.

Waiting has a limit of its own, and what a request itself may take begins with its turn.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import Refusal

T = TypeVar("T")
LONGEST_RETRY_S = 30
RECENT = 0.2  # weight of the last turn in the running mean of their seconds


def busy(seconds: float, what: str = "The server is busy") -> Refusal:
    """Come again after so many seconds."""
    retry = max(1, min(LONGEST_RETRY_S, math.ceil(seconds)))
    return Refusal(429, "busy", f"{what}; ask again in {retry} s.", "rate_limit_error", retry)


class Turns:
    """A queue for one session. Steps of whoever has the turn run on one thread, which the event loop waits for.

    Whoever gives up in the middle of a step leaves it to end by itself; the next turn begins when it has.
    """

    def __init__(self, limits: Limits) -> None:
        self.waiting = 0
        self._limits = limits
        self._lock = asyncio.Lock()
        self._mean_s = 0.0
        self._step: Future[Any] | None = None  # the last one
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for one's turn and hold it while the context lasts.

        Raises Refusal: 429 where too many wait, or the turn does not come in time; 408 where what is done in it takes
        too long.
        """
        if self._lock.locked() and self.waiting >= self._limits.waiting:
            raise busy(self.expected_s())
        clock_now, begun = asyncio.get_running_loop().time, 0.0
        self.waiting += 1
        try:
            async with asyncio.timeout(self._limits.waiting_s) as clock, self._lock:
                await self._over()
                self.waiting -= 1
                begun = clock_now()
                clock.reschedule(begun + self._limits.request_s)
                yield
        except TimeoutError:
            if not clock.expired():
                raise
            if not begun:
                what = f"No turn came within {self._limits.waiting_s:g} s"
                raise busy(self.expected_s(), what) from None
            sentence = (
                f"The answer was not there {self._limits.request_s:g} s after its turn; ask for fewer tokens."
            )
            raise Refusal(408, "slow_request", sentence, "timeout") from None
        finally:
            if begun:
                self._mean_s += RECENT * (clock_now() - begun - self._mean_s)
            else:
                self.waiting -= 1

    def expected_s(self) -> float:
        """About how long a newcomer would wait."""
        return (self.waiting + 1) * self._mean_s

    async def run(self, step: Callable[..., T], *arguments: object) -> T:
        """The result of a step, for whoever has the turn."""
        self._step = self._thread.submit(step, *arguments)
        return await asyncio.wrap_future(self._step)

    async def _over(self) -> None:
        """Wait for a step that somebody has left."""
        if self._step is not None and not self._step.done():
            await asyncio.gather(asyncio.wrap_future(self._step), return_exceptions=True)

    def close(self) -> None:
        """Wait for the step that runs, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
