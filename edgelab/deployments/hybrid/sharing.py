"""Work on one answer that edge and cloud share: drafted here and verified there, or its first layers here."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgelab.deployments.hybrid.answering import Answer, before, holds
from edgelab.deployments.hybrid.cascading import WithCloud
from edgelab.deployments.hybrid.client.answers import known
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudError
from edgelab.deployments.hybrid.remote import Remote, ThroughRemote
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.speculation.acceptance import LONGEST, SpeculationError
from edgelab.deployments.hybrid.speculation.drafting import Adaptive, Counts, Drafting
from edgelab.deployments.partition.stage import Stage
from edgelab.recipes import parse
from edgelab.storage import variants
from edgelab.tasks import Request, endings, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.deployments.hybrid import Speculative, Split


class Drafted(WithCloud):
    """The edge drafts and the cloud verifies: the text is the cloud's own. The edge writes alone where that fails."""

    settings: Speculative

    def __init__(self, deployment: Speculative, *given: Any) -> None:
        super().__init__(deployment, *given)
        self.draft = Adaptive(start=deployment.draft) if deployment.adaptive else deployment.draft
        self.counts: list[Counts] = []

    def numbers_bytes(self) -> int:
        """Probabilities in float16 for each token of the longest draft, where it is sampled."""
        return 2 * LONGEST * self.edge.session.vocabulary if self.settings.temperature else 0

    def check(self) -> None:
        """Raises SpeculationError where the cloud cannot verify tokens of the edge, for it has others."""
        if not self.same_tokens:
            raise SpeculationError(
                "The edge drafts in tokens that are not those of the cloud, which cannot verify them; give both the "
                "same vocabulary, or share the work by @ cloud, @ cascade or @ redact, which send text."
            )

    def shared(self, request: Request) -> Answer:
        begun = time.perf_counter()
        ids, deadline_s = self.edge.ids(request.prompt), self.cloud_s(request)
        ask = self.remote.cloud.verifier(ids, self.settings.temperature, self.seed)

        def verify(step: int, draft: list[int], probabilities: Tensor | None) -> tuple[int, int]:
            self.remote.cloud.deadline_s = self.remote.left_s(deadline_s, begun)  # of all rounds together
            accepted, token = ask(step, draft, probabilities)
            known([token], self.edge.session.vocabulary)
            return accepted, token

        loop = Drafting(
            self.edge.session, verify, self.draft, pipelined=self.settings.pipelined,
            temperature=self.settings.temperature, seed=self.seed, stop=endings(self.edge.tokenizer),
            ends=lambda written: holds(self.edge.tokenizer, written, request.stop),
        )  # fmt: skip
        counts = loop.counts
        try:
            written = self.remote.ask(lambda cloud: loop.write(ids, request.tokens), deadline_s, begun)
        except CloudError as error:
            found = self.edge.alone(request, begun, str(error), counts.prompt_s + counts.drafting_s)
            return replace(found, read=_read(ids, counts), written=counts.rounds)
        self.counts.append(counts)
        whole = time.perf_counter() - begun
        computing = min(counts.prompt_s + counts.drafting_s, whole)
        text = before(self.edge.text(written), request.stop)
        return Answer(
            text, "cloud", (("edge", 0.0, computing), ("cloud", computing, whole)), len(written),
            wanted_cloud=True, read=_read(ids, counts), written=counts.rounds, rounds=counts.rounds,
            drafted=counts.drafted, accepted=counts.accepted,
        )  # fmt: skip

    def account(self) -> dict[str, Any]:
        """How drafting went."""
        names = ("rounds", "drafted", "accepted", "tokens", "ahead", "thrown_away", "drafting_s", "waiting_s")
        return {name: sum(getattr(one, name) for one in self.counts) for name in names}


def _read(prompt: list[int], counts: Counts) -> int:
    """Tokens that the cloud read: the prompt with the first round, and the drafts; nothing before it has answered."""
    return len(prompt) + counts.drafted if counts.rounds else 0


class Halved(ThroughRemote):
    """The first layers of one model here, the rest in the cloud; hidden states travel. Nobody answers without both."""

    badge = "packed"

    def __init__(
        self, deployment: Split, folder: Path, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
    ) -> None:
        self.settings, self.link, self.tokenizer = deployment, deployment.link, tokenizer
        recipe = parse(str(variants.read_about(folder)["recipe"]))
        config = variants.load_config(folder).get_text_config()
        deployment.check_model(config)
        self.stage = Stage.load(folder, 0, deployment.cut + 1)
        self.vocabulary = config.vocab_size
        self.remote = Remote(
            recipe, deployment.link, model, seed, cut=deployment.cut, deadline_s=deployment.deadline_s,
            numbers_bytes=4 * Limits().prompt_tokens * config.hidden_size,  # a prompt's states in float32
        )  # fmt: skip
        self.kernel = f"{deployment.cut} layers here, {deployment.wire} states, the rest in the cloud"

    def shared(self, request: Request) -> Answer:
        begun = time.perf_counter()
        ids = prompt_ids(self.tokenizer, request.prompt)
        name, written, spans = secrets.token_urlsafe(16), [], []
        given, position = torch.tensor(ids), 0
        self.stage.forget()
        try:
            while len(written) < request.tokens and not self._is_end(written, request):
                started = time.perf_counter() - begun
                states = self.stage.read(given, position)
                here = time.perf_counter() - begun
                spans.append(("edge", started, here))
                token = self.remote.ask(
                    lambda cloud, states=states: self._next(cloud, name, len(written), states),
                    self.settings.deadline_s,
                    begun,
                )
                spans.append(("cloud", here, time.perf_counter() - begun))
                position += len(given)
                written.append(token)
                given = torch.tensor([token])
        except CloudError as error:
            spans.append(("waiting", spans[-1][2] if spans else 0.0, time.perf_counter() - begun))
            found = Answer("", "nobody", tuple(spans), wanted_cloud=True, said=str(error))
        else:
            text = before(self.tokenizer.decode(written, skip_special_tokens=True), request.stop)
            found = Answer(text, "cloud", tuple(spans), len(written), wanted_cloud=True)
            with suppress(CloudError):
                self.remote.direct.forget(name)
        return replace(found, read=len(ids) if written else 0, written=len(written))  # what it has answered

    def _next(self, cloud: Cloud, name: str, step: int, states: Tensor) -> int:
        """The token behind these states. Raises CloudError."""
        found = cloud.hidden(name, step, states, self.settings.wire)
        return known([found.id], self.vocabulary)[0]

    def _is_end(self, written: list[int], request: Request) -> bool:
        ended = bool(written) and written[-1] in endings(self.tokenizer)
        return ended or holds(self.tokenizer, written, request.stop)
