"""A circuit breaker: a cloud that does not answer is left alone for a while, so that not every request waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from edgelab.deployments.hybrid.client.failures import CircuitOpen, CloudError, TooLate
from edgelab.errors import EdgeLabError

T = TypeVar("T")
State = Literal["closed", "open", "trial"]


class CircuitBreaker:
    """Closed it lets calls through; after `failures` in a row it opens, and no call goes through for `cool_down_s`.

    Then one trial does: where it works, the breaker closes, and where it fails, it is open for as long again. Calls of
    several threads may share one.
    """

    def __init__(
        self, failures: int = 3, cool_down_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if failures < 1 or not cool_down_s >= 0:
            raise EdgeLabError(
                f"failures={failures} should be at least 1, and cool_down_s={cool_down_s} at least 0."
            )
        self.failures, self.cool_down_s = failures, cool_down_s
        self._clock, self._lock = clock, threading.Lock()
        self._in_a_row = 0
        self._opened: float | None = None
        self._on_trial = False

    @property
    def state(self) -> State:
        """closed: calls go through; open: none does; trial: the next one does, or is under way."""
        with self._lock:
            return self._state()

    def _state(self) -> State:
        if self._opened is None:
            return "closed"
        return "trial" if self._on_trial or self._left_s() <= 0 else "open"

    def _left_s(self) -> float:
        return self._opened + self.cool_down_s - self._clock()

    def enter(self) -> None:
        """Before a call, which has to end in `worked`, `failed` or `dropped`.

        Raises CircuitOpen where none may go through, in the same sentence whatever is left of the cool-down.
        """
        with self._lock:
            if self._opened is None:
                return
            if self._on_trial or self._left_s() > 0:
                raise CircuitOpen(
                    f"The cloud failed at least {self.failures} times in a row and is not asked; "
                    f"{self.cool_down_s:g} s after its last failure one request tries it."
                )
            self._on_trial = True

    def worked(self) -> None:
        """The call did what it should."""
        with self._lock:
            self._in_a_row, self._opened, self._on_trial = 0, None, False

    def failed(self) -> None:
        """The call did not."""
        with self._lock:
            self._in_a_row += 1
            if self._on_trial or (self._opened is None and self._in_a_row >= self.failures):
                self._opened = self._clock()
            self._on_trial = False

    def dropped(self) -> None:
        """The call was not made after all; a trial is left to the next one."""
        with self._lock:
            self._on_trial = False

    def call(self, ask: Callable[[], T]) -> T:
        """The result of a call. An error that is no outage, as of a prompt that is too long, counts as an answer.

        TooLate counts as nothing: the cloud was not asked.
        """
        self.enter()
        try:
            result = ask()
        except TooLate:
            self.dropped()
            raise
        except CloudError as error:
            (self.failed if error.outage else self.worked)()
            raise
        except BaseException:
            self.failed()
            raise
        self.worked()
        return result
