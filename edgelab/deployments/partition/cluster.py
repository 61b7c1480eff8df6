"""A plan in motion: workers started and watched, chained over their links, asked for tokens; and planned anew.

The source asks the first stage and hears from the last one, and watches every worker. Where one ends, the plan is made
again without its device, stages that moved are loaded, and the new chain reads prompts and what was written so far
before it goes on. No step is ever sent twice to a stage that may have done it.
"""

from __future__ import annotations

import itertools
import logging
import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelab.deployments.partition import wire
from edgelab.deployments.partition.observing import Slowed
from edgelab.deployments.partition.planners import PLANNERS
from edgelab.deployments.partition.problem import NoPlan, Plan, Problem, Stage, described, stages
from edgelab.deployments.partition.seats import ClusterError, Seat, Start, WorkerEnded
from edgelab.deployments.partition.wire import Kind, Message
from edgelab.deployments.partition.worker import Spent
from edgelab.network import LOCAL, Link, Proxies, Proxy

log = logging.getLogger(__name__)


@dataclass
class Request:
    """A sequence that is being written.

    ids: prompt and answer. step: of the next answer, and waiting: whether it has been asked for. epoch: of the plan
    whose stages have read all ids before those that are asked next.
    """

    number: int
    ids: list[int]
    prompt: int
    wanted: int
    step: int = 0
    logits: bool = False
    waiting: bool = False
    epoch: int = 0

    @property
    def written(self) -> list[int]:
        return self.ids[self.prompt :]


@dataclass(frozen=True)
class Recovery:
    """What it cost to go on without a device, in seconds; whole: from its end to the next token.

    detected: until its end was noticed, 0 where nobody knows when it ended.
    """

    device: str
    plan: Plan
    detected_s: float
    planning_s: float
    loading_s: float
    reading_s: float
    whole_s: float


class Cluster:
    """A variant on a fleet, by a plan. Use as a context, so that no worker is left behind.

    problem: what the plan was made from, for planning anew. slow_down: by device, how many times as long a step takes
    there. shaped: links go through proxies with the bandwidth of the problem; False where they are real. pace: time of
    links runs so many times slower than the problem says.
    """

    def __init__(
        self,
        folder: Path,
        problem: Problem,
        plan: Plan,
        start: Start,
        *,
        wire: str = "float32",
        slow_down: dict[str, float] | None = None,
        shaped: bool = True,
        pace: float = 1.0,
        host: str = LOCAL,
    ) -> None:
        self.folder, self.problem, self.plan, self.wire = folder, problem, plan, wire
        self.slow_down, self.shaped, self.pace, self.host = slow_down or {}, shaped, pace, host
        self.epoch = 0
        self.recoveries: list[Recovery] = []
        self.links: dict[tuple[str, str], Proxy] = {}
        self.loaded: dict[str, dict[str, float]] = {}  # by device: seconds, and bytes it holds
        self._start = start
        self._seats: dict[str, Seat] = {}
        self._gone: set[int] = set()
        self._joined = False
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._first_event: tuple[str, Any] | None = None  # what was looked at and stays to be read
        self._requests: dict[int, Request] = {}
        self._numbers = itertools.count()
        self._ended_at: dict[str, float] = {}
        self._stack = ExitStack()
        self._server = socket.create_server((host, 0))
        self._first: socket.socket | None = None
        self._proxies = Proxies()

    def __enter__(self) -> Cluster:
        self._stack.callback(self._close)
        threading.Thread(target=self._hear, daemon=True).start()
        try:
            self._assemble()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _close(self) -> None:
        for seat in self._seats.values():
            seat.leave()
        self._seats.clear()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # which wakes the thread that accepts
        self._server.close()
        if self._first is not None:
            self._first.close()
        self._proxies.close()

    # Writing

    def stream(self, prompts: list[list[int]], tokens: int) -> Iterator[tuple[int, int]]:
        """The likeliest tokens behind each prompt, so many of each, as they come: (which prompt, token).

        All prompts are in flight at once. Raises NoPlan where a device is lost without which nothing fits.
        """
        if not all(prompts):
            raise ClusterError("A prompt has no tokens; write something first.")
        self._settle()
        mine = {}
        for place, prompt in enumerate(prompts):
            request = self._new(prompt, tokens)
            mine[request.number] = place
            self._ask(request, request.ids)
        try:
            while any(number in self._requests for number in mine):
                message = self._answer()
                request = self._requests[message.request]
                (token,) = wire.ids_of(message.payload)
                self._note(request, token)
                if len(request.written) < request.wanted:
                    self._ask(request, [token])
                else:
                    self.forget(request.number)
                yield mine[request.number], token
        finally:
            for number in mine:
                self.forget(number)

    def write(self, prompt: list[int], tokens: int) -> list[int]:
        """The likeliest tokens behind a prompt."""
        return [token for _, token in self.stream([prompt], tokens)]

    def begin(self) -> int:
        """A new request, for `read`; returns its number."""
        self._settle()
        return self._new([], 0).number

    def read(self, number: int, ids: list[int], logits: bool = False) -> bytes:
        """Go on with a request by some tokens: the likeliest next one as int32, or float32 logits (vocabulary,)."""
        request = self._requests[number]
        request.logits = logits
        request.ids = request.ids + ids
        self._ask(request, ids)
        message = self._answer()
        request.step, request.waiting = request.step + 1, False
        return message.payload

    def forget(self, number: int) -> None:
        """Let go of a request, here and in all stages."""
        if self._requests.pop(number, None) is not None:
            with suppress(OSError):
                wire.send(self._first, Message(Kind.FORGET, request=number, epoch=self.epoch))

    def use_link(self, source: str, target: str, link: Link) -> None:
        """Change a shaped link for all that is sent from now on, as a network that gets slower would.

        The plan stays; `slowed` notices. Raises ClusterError where no such link is in use.
        """
        if (source, target) not in self.links:
            used = ", ".join(" to ".join(ends) for ends in self.links) or "none"
            raise ClusterError(f"No link from {source} to {target} is shaped; in use: {used}.")
        self._proxies.use(self.links[source, target], link)

    def join(self, device: str) -> None:
        """A device is there again; the next request is planned with it."""
        self._gone.discard(self.device(device))
        self._joined = True

    def _new(self, prompt: list[int], tokens: int) -> Request:
        request = Request(next(self._numbers), list(prompt), len(prompt), tokens)
        self._requests[request.number] = request
        return request

    def _ask(self, request: Request, ids: list[int]) -> None:
        """Ask for the next token behind `ids`, the last ones of the request; stages of a new plan read all of it."""
        if request.epoch != self.epoch:
            ids = request.ids
        request.waiting, request.epoch = True, self.epoch
        message = Message(
            Kind.TOKENS, wire.ids_bytes(ids), request.number, request.step, len(request.ids) - len(ids), len(ids),
            self.epoch, self.wire, request.logits,
        )  # fmt: skip
        with suppress(OSError):  # whoever watches the first stage says so
            wire.send(self._first, message)

    def _note(self, request: Request, token: int) -> None:
        request.ids = [*request.ids, token]
        request.step, request.waiting = request.step + 1, False

    def _answer(self) -> Message:
        """The next answer that belongs to an open request; a device that ends on the way is replaced."""
        while True:
            kind, found = self._next_event()
            if kind == "gone":
                self._replace(found)
                continue
            message: Message = found
            request = self._requests.get(message.request)
            if message.epoch != self.epoch or request is None or message.step != request.step:
                continue
            if message.kind is Kind.ERROR:
                raise ClusterError(message.payload.decode())
            if message.kind in (Kind.TOKEN, Kind.LOGITS):
                return message

    def _next_event(self) -> tuple[str, Any]:
        found, self._first_event = self._first_event, None
        return found or self._events.get()

    # Workers and their chain

    def runs(self) -> dict[str, Stage]:
        """Every stage in order, by its device's name, and "again" where the head comes back to the source."""
        found: dict[str, Stage] = {}
        for run in stages(self.plan.placement):
            name = self.problem.names[run.device]
            found[f"{name} again" if name in found else name] = run
        return found

    def device(self, name: str) -> int:
        """The place of a stage's device among all."""
        return self.problem.names.index(name if name in self.problem.names else name.removesuffix(" again"))

    def _assemble(self) -> None:
        """Start, load and connect what the plan asks for."""
        self.epoch += 1
        runs = self.runs()
        for name in runs:
            if name not in self._seats:
                self._seats[name] = self._seat(name)
        waiting = {}
        for name, run in runs.items():
            slow = self.slow_down.get(self.problem.names[run.device], 1.0)
            settings = str(self.folder), run.first, run.last, self.epoch, self.wire, slow
            waiting[name] = self._seats[name].begin("load", *settings)
        self.loaded = {name: wait() for name, wait in waiting.items()}
        self._chain(runs)

    def _seat(self, name: str) -> Seat:
        place = self.device(name)
        handle = self._start(self.problem.names[place], place)
        return Seat(name, handle, lambda ended: self._events.put(("gone", ended)))

    def _chain(self, runs: dict[str, Stage]) -> None:
        """Connect every stage with the next one, and the last with the source."""
        if self._first is not None:
            self._first.close()
        self._proxies.close()
        self._proxies = Proxies()
        self.links, names = {}, list(runs)
        home = self.host, self._server.getsockname()[1]
        ends = [*(self._seats[name].address for name in names[1:]), home]
        targets = [*(run.device for run in list(runs.values())[1:]), 0]
        for (name, run), end, target in zip(runs.items(), ends, targets, strict=True):
            if self.shaped and run.device != target:
                proxy = self._proxies.open(self._link(run.device, target), *end)
                self.links[name, self.problem.names[target]] = proxy
                end = LOCAL, proxy.listening
            self._seats[name].begin("connect", *end)()
        self._first = wire.connect(*self._seats[names[0]].address)

    def _link(self, source: int, target: int) -> Link:
        """What connects two devices, at the pace of this machine."""
        names, problem = self.problem.names, self.problem
        mbps = problem.bandwidth[source, target] * 8 / 1e6 / self.pace
        back = problem.bandwidth[target, source] * 8 / 1e6 / self.pace
        return Link(
            f"{names[source]} to {names[target]}",
            down_mbps=min(back or mbps, 1e6),
            up_mbps=min(mbps, 1e6),
            round_trip_ms=2e3 * problem.delay[source, target] * self.pace,
        )

    def _hear(self) -> None:
        """All answers of all chains."""

        def take(connection: socket.socket) -> None:
            with connection, suppress(OSError, wire.WireError):
                while (message := wire.receive(connection)) is not None:
                    self._events.put(("answer", message))

        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=take, args=(connection,), daemon=True).start()

    # Faults

    def kill(self, device: str) -> None:
        """End the worker of a device at once, as a fault would."""
        self._ended_at[device] = time.monotonic()
        self._seats[device].kill()

    def _replace(self, device: str) -> None:
        """Plan without a device, load what moved, and read again what was open."""
        noticed = time.monotonic()
        ended = self._ended_at.pop(device, noticed)
        if device not in self._seats:
            return
        lost: str | None = device
        while lost is not None:
            self._seats.pop(lost).leave()
            self._gone.add(self.device(lost))
            try:
                self.plan = self.planned(self.problem_now())
            except NoPlan as error:
                raise NoPlan(f"{lost} is gone, and no plan fits without it: {error}") from None
            planned = time.monotonic()
            try:
                self._assemble()
                lost = None
            except WorkerEnded as error:
                lost = error.device
        loaded = time.monotonic()
        log.warning("%s is gone; going on with %s", device, self.describe())
        if self._ask_again():
            self._wait_for_first()
        whole = time.monotonic()
        self.recoveries.append(
            Recovery(
                device,
                self.plan,
                noticed - ended,
                planned - noticed,
                loaded - planned,
                whole - loaded,
                whole - ended,
            )
        )

    def _ask_again(self) -> int:
        """Ask the stages of a new plan for what was asked of the old one; returns how many requests that are."""
        waiting = [request for request in self._requests.values() if request.waiting]
        for request in waiting:
            self._ask(request, request.ids)
        return len(waiting)

    def _wait_for_first(self) -> None:
        """Until a new chain has answered, or something happened; what arrived stays to be read."""
        while True:
            kind, found = self._events.get()
            if kind == "gone" or found.epoch == self.epoch:
                self._first_event = kind, found
                return

    def planned(self, problem: Problem) -> Plan:
        """What the planner of the plan makes of another problem."""
        return PLANNERS[self.plan.planner](problem, self.plan.objective)

    def problem_now(self) -> Problem:
        """The problem without the devices that are gone."""
        problem = self.problem
        for device in self._gone:
            problem = problem.without(device)
        return problem

    def _settle(self) -> None:
        """Between requests: see who is gone, and use who has joined."""
        while self._first_event is not None or not self._events.empty():
            kind, found = self._next_event()
            if kind == "gone":
                self._replace(found)
        if self._joined and not self._requests:
            self._joined = False
            plan = self.planned(self.problem_now())
            if plan.placement != self.plan.placement:
                self.plan = plan
                self._assemble()

    # What it took

    def spent(self) -> dict[str, list[Spent]]:
        """Times of every step of the plan as it is now, by device in the order of its stages, on our clock."""
        found = {}
        for name in self.runs():
            offset = self._seats[name].offset
            steps = self._seats[name].begin("spent", self.epoch)()
            found[name] = [
                replace(one, **{at: getattr(one, at) - offset for at in ("arrived", "begun", "done")})
                for one in steps
            ]
        return found

    def peak_mb(self) -> dict[str, float]:
        """Most memory of each worker's process."""
        return {name: self._seats[name].begin("peak_mb")() for name in self._seats}

    def adopt(self, slowed: Slowed) -> None:
        """Go on by the plan that was proposed for a slower link; open requests are read again."""
        i, j = self.device(slowed.source), self.device(slowed.target)
        self.problem = self.problem.with_bandwidth(i, j, slowed.measured_mbps * 1e6 / 8)
        self.plan = slowed.plan
        self._assemble()
        self._ask_again()

    def describe(self) -> str:
        """The stages in one line."""
        return described(self.problem, self.plan)
