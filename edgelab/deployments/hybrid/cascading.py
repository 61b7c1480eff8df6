"""Edge first, cloud in doubt; or the cloud at once, which is what a cascade has to be compared with.

The threshold of a cascade is chosen on requests that are not measured. When the cloud does not answer within what is
left of the deadline, the edge's own answer counts; when it fails several times in a row, it is not asked for a while.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelab import runtimes
from edgelab.deployments.hybrid.answering import Answer, Edge
from edgelab.deployments.hybrid.client.failures import CloudError
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
from edgelab.tasks import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.deployments.hybrid import Cascade, CloudAlone, Shared


class WithCloud(ThroughRemote):
    """An engine at the edge, a cloud, and the link between them."""

    def __init__(
        self, deployment: Shared, folder: Path, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
    ) -> None:
        self.settings, self.link, self.seed = deployment, deployment.link, seed
        self.edge = Edge(runtimes.load(deployment.edge, folder), tokenizer)
        try:
            self.remote = Remote(deployment.cloud, deployment.link, model, seed)
        except BaseException:
            self.edge.close()
            raise
        self.kernel = f"{self.edge.kernel}; {deployment.cloud} in the cloud"

    def ask(self, request: Request, begun: float, earlier: tuple[tuple[str, float, float], ...]) -> Answer:
        """The cloud's answer. Raises CloudError."""
        asked = time.perf_counter() - begun
        ids = self.edge.ids(request.prompt)
        found = self.remote.ask(
            lambda cloud: cloud.complete(ids, request.tokens, stop=[request.stop] if request.stop else None),
            self.settings.deadline_s,
            begun,
        )
        return Answer(
            found.text,
            "cloud",
            (*earlier, ("cloud", asked, time.perf_counter() - begun)),
            tokens=len(found.ids),
            wanted_cloud=True,
            read=len(ids),
            written=len(found.ids),
        )

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
            return self.ask(request, begun, ())
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
            self.router = learn_router(features([one.scores for one in answers]), right)
        score = np.array([self._score(one.scores) for one in answers])
        self.calibration = calibrate(score, right)
        if self.threshold is not None:
            return
        if self.settings.accuracy:
            asked = (self.remote.direct.complete(self.edge.ids(one.prompt), one.tokens) for one in others)
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
            found = self.ask(request, begun, own.spans)
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
