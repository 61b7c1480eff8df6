"""A worker: one stage in a process of its own, which reads what arrives over TCP and hands on what comes out.

Two threads beside the connections: one takes what arrives, one computes, in the order of arrival. What belongs to an
earlier plan is dropped. Nothing is sent a second time: a stage that cannot hand on says so in its log, and whoever
watches the workers plans anew.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import sleep

import torch

from edgelab.deployments.partition import wire
from edgelab.deployments.partition.stage import Stage
from edgelab.deployments.partition.wire import Kind, Message
from edgelab.measure.memory import peak_rss_mb
from edgelab.network import LOCAL

log = logging.getLogger(__name__)

REMEMBERED = 4096  # steps whose times are kept
CLOCK = struct.Struct("<d")


@dataclass(frozen=True)
class Spent:
    """One step in one stage, in seconds of this machine's monotonic clock; sent: bytes, with the header."""

    request: int
    step: int
    tokens: int
    arrived: float
    begun: float
    done: float
    sent: int


class Worker:
    """Listens from the beginning; computes once it has loaded a stage and is connected to the next one."""

    def __init__(self, threads: int = 1, core: int | None = None, host: str = LOCAL) -> None:
        if core is not None and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[(core * threads + one) % len(cores)] for one in range(threads)})
        torch.set_num_threads(threads)
        self.host, self.epoch, self.slow_down = host, 0, 1.0
        self._stage: Stage | None = None
        self._next: socket.socket | None = None
        self._wire = "float32"
        self._arrived: queue.SimpleQueue[tuple[Message, float] | None] = queue.SimpleQueue()
        self._spent: deque[Spent] = deque(maxlen=REMEMBERED)
        self._computing = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = socket.create_server((host, 0))
        for work in (self._accept, self._compute):
            threading.Thread(target=work, daemon=True).start()

    @property
    def port(self) -> int:
        return self._server.getsockname()[1]

    def address(self) -> tuple[str, int]:
        """Where this worker listens."""
        return self.host, self.port

    def process(self) -> int:
        return os.getpid()

    def profile(self, folder: str, model: str, recipe: str, threads: int) -> dict[str, object]:
        """What every part of a variant takes on this machine: the fields of Timings."""
        from edgelab.deployments.partition.profiling import measured

        with self._computing:
            return asdict(
                measured(
                    Path(folder),
                    model,
                    recipe,
                    threads=threads,
                    contexts=(32, 256),
                    prompts=(32, 128),
                    shaped=False,
                )
            )

    def load(
        self, folder: str, first: int, last: int, epoch: int, wire: str = "float32", slow_down: float = 1.0
    ) -> dict[str, float]:
        """Read the parts first to last - 1 of a variant, for a new plan; all requests begin anew.

        slow_down: how many times as long every step takes. Returns seconds, and bytes of the weights that it holds.
        """
        started = time.perf_counter()
        if (there := self._next) is not None:
            with suppress(OSError):
                there.shutdown(socket.SHUT_RDWR)  # or a step that cannot be sent would hold us up
        with self._computing:
            self._hang_up()
            self.epoch, self._wire, self.slow_down = epoch, wire, slow_down
            if self._stage is None or self._place != (folder, first, last):
                self._stage = None
                self._stage, self._place = Stage.load(Path(folder), first, last), (folder, first, last)
            self._stage.forget_all()
        return {"seconds": time.perf_counter() - started, "bytes": self._stage.held_bytes()}

    def connect(self, host: str, port: int) -> None:
        """Hand on to this address from now on."""
        with self._computing:
            self._hang_up()
            self._next = wire.connect(host, port)

    def spent(self, epoch: int) -> list[Spent]:
        """Times of the steps of a plan."""
        return list(self._spent) if epoch == self.epoch else []

    def peak_mb(self) -> float:
        """Most memory that this process has held."""
        return peak_rss_mb()

    def close(self) -> None:
        """Hang up on everybody and let go of the stage."""
        for connection in (self._server, *self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # which wakes whoever waits for it
        self._server.close()
        self._arrived.put(None)
        with self._computing:
            self._hang_up()
            self._stage = None

    def _hang_up(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next = None
        self._spent.clear()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    def _take(self, connection: socket.socket) -> None:
        """All that one connection brings."""
        self._connections.add(connection)
        with connection:
            try:
                while (message := wire.receive(connection)) is not None:
                    if message.kind is Kind.PING:
                        wire.send(connection, replace(message, payload=CLOCK.pack(time.monotonic())))
                    else:
                        self._arrived.put((message, time.monotonic()))
            except (OSError, wire.WireError) as error:
                log.warning("A connection ended: %s", error)
        self._connections.discard(connection)

    def _compute(self) -> None:
        while (found := self._arrived.get()) is not None:
            message, arrived = found
            with self._computing:
                if message.epoch != self.epoch or self._next is None:
                    continue
                begun = time.monotonic()
                answer = self._step(message)
                if self.slow_down > 1 and message.kind in (Kind.TOKENS, Kind.STATES):
                    sleep((self.slow_down - 1) * (time.monotonic() - begun))
                self._spent.append(
                    Spent(
                        message.request, message.step, message.tokens, arrived, begun, time.monotonic(),
                        wire.FRAME_BYTES + len(answer.payload),
                    )
                )  # fmt: skip
                try:
                    wire.send(self._next, answer)
                except OSError as error:
                    log.warning("The next stage is gone: %s", error)

    def _step(self, message: Message) -> Message:
        if message.kind is Kind.FORGET:
            self._stage.forget(message.request)
            return message
        if message.kind not in (Kind.TOKENS, Kind.STATES):
            return message  # a sentence on its way to the source
        try:
            if message.kind is Kind.TOKENS:
                given = torch.tensor(wire.ids_of(message.payload), dtype=torch.long)
            else:
                given = wire.decoded(message.payload, message.wire, message.tokens, self._stage.hidden_size)
            found = self._stage.read(given, message.position, message.request)
            is_last = self._stage.last == self._stage.parts
            return message.answer(found) if is_last else message.with_states(found, self._wire)
        except Exception as error:  # whatever it is, the source has to hear of it
            log.warning("Step %s of request %s: %s", message.step, message.request, error)
            return replace(message, kind=Kind.ERROR, payload=str(error).encode(), tokens=0)
