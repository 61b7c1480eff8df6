"""A cloud for as long as a deployment runs: a server in a process of its own, a shaped link to it, and a client."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

import torch

from edgelab.deployments.hybrid.answering import Answer, Answering
from edgelab.deployments.hybrid.client.breaker import CircuitBreaker
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudSlow, TooLate
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.serving import Settings, started
from edgelab.network import LOCAL, Proxies, find
from edgelab.recipes import Recipe
from edgelab.tasks import Request

T = TypeVar("T")
LEAST_S = 0.05  # of a deadline, below which the cloud is not asked any more
COOL_DOWN_S = 5.0


class Remote:
    """The cloud behind a link. cloud: a client that goes through the link; direct: one that does not, for choosing.

    proxy: the link, whose bytes are counted; interrupt it for an outage. server: with `stop`, for a cloud that is gone.
    numbers_bytes: of probabilities or hidden states that one request may hold. deadline_s: of a request, as the recipe
    has it. The server takes as many and waits as long: what it refused every time would be a row of the edge alone.
    """

    def __init__(
        self,
        recipe: Recipe,
        link: str,
        model: str,
        seed: int,
        cut: int | None = None,
        *,
        numbers_bytes: int = 0,
        deadline_s: float = 0.0,
    ) -> None:
        between = find(link)  # raises before anything is started
        self.deadline_s = deadline_s
        usual = Limits()
        limits = replace(
            usual,
            body_bytes=usual.body_bytes + numbers_bytes,
            body_s=max(usual.body_s, deadline_s),
            request_s=max(usual.request_s, deadline_s),
            waiting_s=max(usual.waiting_s, deadline_s),
        )
        self._stack = ExitStack()
        try:
            served = Settings(
                recipe=str(recipe),
                model=model,
                seed=seed,
                cut=cut,
                threads=torch.get_num_threads(),
                limits=limits,
            )
            self.server = self._stack.enter_context(started(served))
            self.proxies = Proxies()
            self._stack.callback(self.proxies.close)
            port = int(self.server.url.rsplit(":", 1)[1])
            self.proxy = self.proxies.open(between, LOCAL, port)
            self.cloud, self.direct = (
                self._stack.enter_context(Cloud(f"http://{LOCAL}:{at}", self.server.token))
                for at in (self.proxy.listening, port)
            )
        except BaseException:
            self._stack.close()
            raise
        self.breaker = CircuitBreaker(cool_down_s=COOL_DOWN_S)

    def ask(self, what: Callable[[Cloud], T], deadline_s: float, begun: float) -> T:
        """What the cloud answers before a deadline that began at `begun`, by time.perf_counter.

        Raises CloudError where it does not, or has failed several times in a row and is left alone for a while. What
        was left of a deadline differs from request to request; its sentences name the recipe's, so that they do not.
        """
        self.cloud.deadline_s = self.left_s(deadline_s, begun)
        try:
            return self.breaker.call(lambda: what(self.cloud))
        except TooLate:
            raise
        except CloudSlow:
            raise CloudSlow(
                f"The cloud did not answer within what was left to it of {self.deadline_s:g} s for a request; give "
                "more as deadline_s, or ask for less."
            ) from None

    def left_s(self, deadline_s: float, begun: float) -> float:
        """Seconds of a deadline that are left. Raises TooLate where they are too few to ask the cloud."""
        left = deadline_s - (time.perf_counter() - begun)
        if left < LEAST_S:
            raise TooLate(
                f"What is left of {self.deadline_s:g} s for a request is too little to ask the cloud; give more as "
                "deadline_s."
            )
        return left

    def close(self) -> None:
        """End the server, the link and the connections."""
        self._stack.close()


class ThroughRemote(Answering):
    """A deployment that asks a cloud. Whatever travels for a request counts, also where the cloud was asked in vain."""

    remote: Remote

    def answer(self, request: Request) -> Answer:
        """The answer to one request, with the bytes of all that was sent and received for it."""
        return self.counted(lambda: self.shared(request))

    @abstractmethod
    def shared(self, request: Request) -> Answer:
        """The answer, by the edge and the cloud; its bytes are filled in afterwards."""

    def counted(self, work: Callable[[], Answer]) -> Answer:
        """The answer that comes of some work, with the bytes that travelled meanwhile, those of failed attempts too."""
        meter = self.remote.cloud.meter
        sent, received = meter.sent, meter.received
        found = work()
        return replace(found, sent_bytes=meter.sent - sent, received_bytes=meter.received - received)

    def close(self) -> None:
        """End the cloud and the link to it."""
        self.remote.close()
