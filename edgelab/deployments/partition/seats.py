"""A worker on its device: started, told what to do, and watched until it ends.

It is watched over a connection of its own: one that ends says at once that the worker has, one that does not answer
within STALLED_S that it hangs, or that its machine has gone.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import numpy as np

from edgelab.deployments.partition import wire
from edgelab.deployments.partition.wire import Kind, Message
from edgelab.deployments.partition.worker import CLOCK
from edgelab.errors import EdgeLabError

STALLED_S = 10.0  # without an answer: longer than any stall of a busy machine, shorter than patience
ASKED_S = 0.25  # between two questions whether a worker is there


class ClusterError(EdgeLabError):
    """Something that a running plan cannot do."""


class WorkerEnded(ClusterError):
    """A worker that ended while it was told something."""

    def __init__(self, device: str, reason: object) -> None:
        super().__init__(f"The worker of {device} ended: {str(reason).strip().splitlines()[0][:200]}")
        self.device = device


class Handle(Protocol):
    """A worker somewhere: its methods by name, several calls at a time."""

    def begin(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Start a call; what is returned waits for it."""

    def kill(self) -> None:
        """End it at once."""


Start = Callable[[str, int], Handle]  # name of the device, and its place among all


class Seat:
    """A device with its worker. ended: called with the name when it ends by itself. offset: of its clock to ours, in s.

    name: of the seat, that of its device where that has one stage.
    """

    def __init__(self, name: str, handle: Handle, ended: Callable[[str], None]) -> None:
        self.name, self._handle, self._ended = name, handle, ended
        self.offset, self._leaving = 0.0, False
        try:
            self.address: tuple[str, int] = self.begin("address")()
            self._watched = wire.connect(*self.address)
        except BaseException:
            handle.kill()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Start a call. What is returned waits for it, and raises WorkerEnded where the worker has."""
        return partial(self._found, self._handle.begin(method, *arguments))

    def _found(self, wait: Callable[[], Any]) -> Any:
        try:
            return wait()
        except EdgeLabError:
            raise
        except Exception as error:  # engines of actors have errors of their own
            raise WorkerEnded(self.name, error) from error

    def kill(self) -> None:
        """End the worker as a fault would: it is noticed."""
        self._handle.kill()

    def leave(self) -> None:
        """End the worker, and watch it no longer."""
        self._leaving = True
        with suppress(OSError):
            self._watched.shutdown(socket.SHUT_RDWR)
        self._handle.kill()

    def _watch(self) -> None:
        """Ask the worker for its clock until it does not answer."""
        closest = np.inf
        with self._watched, suppress(OSError, wire.WireError):
            while not self._leaving:
                self._watched.settimeout(STALLED_S)
                asked = time.monotonic()
                wire.send(self._watched, Message(Kind.PING))
                answer = wire.receive(self._watched)
                if answer is None:
                    break
                took = time.monotonic() - asked
                if took < closest:
                    closest, self.offset = took, CLOCK.unpack(answer.payload)[0] - asked - took / 2
                if not self._stays(ASKED_S):
                    break
        if not self._leaving:
            self._ended(self.name)

    def _stays(self, seconds: float) -> bool:
        """Wait; False as soon as the connection has ended."""
        self._watched.settimeout(seconds)
        with suppress(TimeoutError):
            return self._watched.recv(1, socket.MSG_PEEK) != b""
        return True
