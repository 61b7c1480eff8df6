"""Requests under a policy: what it lets out, and whether the answer is right all the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgelab import assets
from edgelab.deployments.hybrid.answering import Answer
from edgelab.deployments.hybrid.cascading import AllInCloud
from edgelab.deployments.hybrid.client.failures import CloudError
from edgelab.deployments.hybrid.privacy import Redacted, leakage, outgoing
from edgelab.deployments.hybrid.prompts import Prompt, is_right, load
from edgelab.tasks import Request

if TYPE_CHECKING:
    from edgelab.deployments.hybrid import Redact

PROMPTS, PROMPTS_FAST = 180, 9  # of the held-out ones, evenly over their templates
TOKENS = 40  # of an answer, at most; the longest entity that is asked for, an IPv6 address, has 36


@dataclass(frozen=True)
class Private:
    """A prompt, its answer with what was redacted put back, and the text that left the device, None where none did."""

    item: Prompt
    answer: Answer
    sent: str | None

    @property
    def is_right(self) -> bool:
        """Whether the answer holds what was asked for."""
        return is_right(self.answer.text, self.item)


class Redacting(AllInCloud):
    """A cloud that is asked as a policy allows, and the edge for everything else."""

    settings: Redact

    def items(self) -> list[Prompt]:
        """The prompts that are measured: held out, and evenly over their templates."""
        return _evenly(load("held_out"), PROMPTS_FAST if assets.fast() else PROMPTS)

    def others(self, count: int) -> list[Prompt]:
        """So many prompts that are never measured: of the training split, evenly over their templates."""
        return _evenly(load("train"), count)

    def prepare(self, others: Sequence[Request], progress: Callable[[int, int], None]) -> None:
        """Load the recognisers, which takes seconds, before an answer is timed."""
        self._allowed("")
        super().prepare(others, progress)

    def shared(self, request: Request) -> Answer:
        """The answer to any prompt, the whole of which is under the policy."""
        begun = time.perf_counter()
        return self._answered(request, self._allowed(request.prompt), lambda text: text, begun)

    def private(self, item: Prompt) -> Private:
        """Ask about a message. The message is under the policy, and the question about it goes with it as it is."""
        begun = time.perf_counter()
        allowed = self._allowed(item.text)
        request = Request(item.asked(), "", TOKENS, stop="\n")  # only the first line counts
        answer = self.counted(lambda: self._answered(request, allowed, item.asked, begun))
        return Private(item, answer, None if allowed is None else allowed.text)  # sent, answered or not

    def _answered(
        self, request: Request, allowed: Redacted | None, around: Callable[[str], str], begun: float
    ) -> Answer:
        """The cloud's answer to a prompt with the text that may leave, or the edge's own where none may.

        begun: when the edge began to look for personal data, which is its work, so that its time counts.
        """
        looked = time.perf_counter() - begun
        if allowed is None:
            own = self.edge.answer(request)
            spans = tuple((who, looked + first, looked + last) for who, first, last in own.spans)
            return replace(own, spans=(("edge", 0.0, looked), *spans))
        try:
            found = self.ask(
                replace(request, prompt=around(allowed.text)),
                begun,
                (("edge", 0.0, looked),),
                self.cloud_s(request),
            )
        except CloudError as error:
            return self.edge.alone(request, begun, str(error), looked)
        return replace(found, text=allowed.restore(found.text))

    @staticmethod
    def leaked(found: list[Private]) -> float | None:
        """Entities that left the device ÷ entities present; None where there are none."""
        return leakage([one.sent for one in found], [one.item.entities for one in found])

    def _allowed(self, text: str) -> Redacted | None:
        return None if self.settings.policy == "edge" else outgoing(text, self.settings.policy)


def _evenly(found: list[Prompt], count: int) -> list[Prompt]:
    return found[:: max(len(found) // count, 1)][:count]
