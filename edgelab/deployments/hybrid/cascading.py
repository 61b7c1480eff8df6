"""Edge first, cloud in doubt; or the cloud at once, which is what a cascade has to be compared with.

The threshold of a cascade is chosen on requests that are not measured. When the cloud does not answer within what is
left of the deadline, the edge's own answer counts; when it fails several times in a row, it is not asked for a while.

Token ids travel where edge and cloud have the same tokens, and text where they have not, or where the server does not
say which it has: ids of another vocabulary would be other words.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelab import runtimes
from edgelab.deployments.hybrid.answering import Answer, Edge, before
from edgelab.deployments.hybrid.client.answers import Completion, known
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudError, CloudGarbled
from edgelab.deployments.hybrid.remote import Remote, ThroughRemote
from edgelab.deployments.hybrid.routing.curves import threshold_for_accuracy, threshold_for_share
from edgelab.deployments.hybrid.routing.scores import (
    SCORES,
    Calibration,
    Router,
    calibrate,
    features,
    learn_router,
)
from edgelab.tasks import Request, vocabulary_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.deployments.hybrid import Cascade, CloudAlone, Shared

LEAST_SHARE = 0.1  # of a deadline, which the cloud has however slow the edge is
MOST_READ = 16  # tokens for each byte of a text, and as many around it: far more than any tokenizer makes


class WithCloud(ThroughRemote):
    """An engine at the edge, a cloud, and the link between them. same_tokens: whether ids mean the same to both."""

    def __init__(
        self, deployment: Shared, folder: Path, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
    ) -> None:
        self.settings, self.link, self.seed = deployment, deployment.link, seed
        self.edge = Edge(runtimes.load(deployment.edge, folder), tokenizer)
        with ExitStack() as stack:
            stack.callback(self.edge.close)
            self.remote = Remote(
                deployment.cloud, deployment.link, model, seed,
                numbers_bytes=self.numbers_bytes(), deadline_s=deployment.deadline_s,
            )  # fmt: skip
            stack.callback(self.remote.close)
            self.same_tokens = self.remote.direct.vocabulary() == vocabulary_fingerprint(tokenizer)
            self.check()
            self.edge.warm_up()
            stack.pop_all()
        self.kernel = f"{self.edge.kernel}; {deployment.cloud} in the cloud"

    def numbers_bytes(self) -> int:
        """Bytes of the numbers that one request to the cloud may hold; text and token ids are none."""
        return 0

    def check(self) -> None:
        """Raises an EdgeLabError where this edge and this cloud cannot work together; text does between any two."""

    def cloud_s(self, request: Request) -> float:
        """Seconds from the question on in which the cloud has to have answered, for the edge to answer in time if not.

        The deadline less what the edge is expected to need alone, and at least LEAST_SHARE of it: an edge that is too
        slow for the deadline answers late.
        """
        whole = self.settings.deadline_s
        return max(whole - self.edge.expected_s(request), LEAST_SHARE * whole)

    def ask(
        self, request: Request, begun: float, earlier: tuple[tuple[str, float, float], ...], deadline_s: float
    ) -> Answer:
        """The cloud's answer, within so many seconds of `begun`. Raises CloudError."""
        asked = time.perf_counter() - begun
        found = self.remote.ask(lambda cloud: self._complete(cloud, request), deadline_s, begun)
        return Answer(
            before(found.text, request.stop),
            "cloud",
            (*earlier, ("cloud", asked, time.perf_counter() - begun)),
            tokens=found.written,
            wanted_cloud=True,
            read=found.read,
            written=found.written,
        )

    def _complete(self, cloud: Cloud, request: Request) -> Completion:
        """What the cloud writes, by ids or by text, and how many tokens it read and wrote; as the edge counts them
        where the cloud does not say. Raises CloudError.
        """
        ids, text = self.edge.ids(request.prompt), request.prompt
        found = cloud.complete(
            ids if self.same_tokens else text, request.tokens, stop=[request.stop] if request.stop else None
        )
        if self.same_tokens:
            if found.ids is None:
                raise CloudGarbled("The cloud's answer lacks its tokens.")
            read, written = len(ids), len(known(found.ids, self.edge.session.vocabulary))
        else:
            read, written = found.read, found.written if found.ids is None else len(found.ids)
        if (written or 0) > request.tokens or (read or 0) > MOST_READ * (1 + len(text.encode())):
            raise CloudGarbled("The cloud counts more tokens than it was asked to read or to write.")
        if read is None:
            read = len(ids)
        if written is None:
            written = len(self.edge.tokenizer(found.text, add_special_tokens=False)["input_ids"])
        return replace(found, read=read, written=written)

    def close(self) -> None:
        """Stop the cloud and the link, and give back the edge."""
        super().close()
        self.edge.close()


class AllInCloud(WithCloud):
    """Every request goes to the cloud; the edge answers where that fails."""

    settings: CloudAlone

    def shared(self, request: Request) -> Answer:
        begun = time.perf_counter()
        try:
            return self.ask(request, begun, (), self.cloud_s(request))
        except CloudError as error:
            return self.edge.alone(request, begun, str(error))


class Cascaded(WithCloud):
    """The edge answers every request, and the cloud answers again where the edge's score is below a threshold."""

    settings: Cascade

    def __init__(self, deployment: Cascade, *given: Any) -> None:
        super().__init__(deployment, *given)
        self.threshold = deployment.threshold
        self.router: Router | None = None
        self.calibration: Calibration | None = None

    def prepare(self, others: Sequence[Request], progress: Callable[[int, int], None]) -> None:
        """Learn the router, calibrate, and choose the threshold, on requests that are not measured."""
        answers = []
        for place, request in enumerate(others, 1):
            answers.append(self.edge.answer(request))
            progress(place, len(others))
        right = np.array([one.is_right(own.text) for one, own in zip(others, answers, strict=True)])
        if self.settings.score == "router":
            # It is too sure of the requests that it learned from, so that others calibrate it.
            self.router = learn_router(features([one.scores for one in answers[::2]]), right[::2])
            others, answers, right = others[1::2], answers[1::2], right[1::2]
        score = np.array([self._score(one.scores) for one in answers])
        self.calibration = calibrate(score, right)
        if self.threshold is not None:
            return
        if self.settings.accuracy:
            asked = (self._complete(self.remote.direct, one) for one in others)
            theirs = np.array([one.is_right(found.text) for one, found in zip(others, asked, strict=True)])
            self.threshold = threshold_for_accuracy(right, theirs, score, self.settings.accuracy)
        else:
            self.threshold = threshold_for_share(score, self.settings.share)

    def _score(self, scores: dict[str, float]) -> float:
        if self.router is not None:
            return float(self.router(features([scores]))[0])
        return scores[self.settings.score]

    def shared(self, request: Request) -> Answer:
        begun = time.perf_counter()
        own = self.edge.answer(request)
        if self._score(own.scores) >= self.threshold:
            return own
        try:
            found = self.ask(request, begun, own.spans, self.settings.deadline_s)  # the edge has answered
        except CloudError as error:
            waiting = ("waiting", own.seconds, time.perf_counter() - begun)
            return replace(own, spans=(*own.spans, waiting), wanted_cloud=True, said=str(error))
        return replace(found, scores=own.scores)

    def account(self) -> dict[str, Any]:
        """The threshold, as text where all requests go one way, what was learned, and what scores mean."""
        is_finite = math.isfinite(self.threshold)
        found: dict[str, Any] = {
            "score": self.settings.score,
            "threshold": self.threshold if is_finite else str(self.threshold),
        }
        if self.router is not None:
            weights = zip(SCORES, self.router.weights.tolist(), strict=True)
            found["router"] = dict(weights) | {"offset": self.router.offset}
        if self.calibration is not None:
            found["calibration"] = {
                "score": self.calibration.score.tolist(),
                "probability": self.calibration.probability.tolist(),
            }
        return found
