"""Requests with personal data in them: what a policy lets out, and whether the answer is right all the same."""

from __future__ import annotations

import time
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
        found = load("held_out")
        count = PROMPTS_FAST if assets.fast() else PROMPTS
        return found[:: max(len(found) // count, 1)][:count]

    def private(self, item: Prompt) -> Private:
        """Ask about a message. Finding personal data is work of the edge, and its time counts."""
        begun = time.perf_counter()
        allowed = self._allowed(item.text)
        looked = time.perf_counter() - begun
        whole = Request(item.asked(), "", TOKENS, stop="\n")  # only the first line counts
        if allowed is None:
            own = self.edge.answer(whole)
            spans = tuple((who, looked + first, looked + last) for who, first, last in own.spans)
            return Private(item, replace(own, spans=(("edge", 0.0, looked), *spans)), None)

        def asked() -> Answer:
            try:
                found = self.ask(
                    replace(whole, prompt=item.asked(allowed.text)), begun, (("edge", 0.0, looked),)
                )
            except CloudError as error:
                return self.edge.alone(whole, begun, str(error))
            return replace(found, text=allowed.restore(found.text))

        return Private(item, self.counted(asked), allowed.text)  # it may have arrived without an answer

    @staticmethod
    def leaked(found: list[Private]) -> float | None:
        """Entities that left the device ÷ entities present; None where there are none."""
        return leakage([one.sent for one in found], [one.item.entities for one in found])

    def _allowed(self, text: str) -> Redacted | None:
        return None if self.settings.policy == "edge" else outgoing(text, self.settings.policy)
