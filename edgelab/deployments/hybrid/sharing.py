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

from edgelab.deployments.hybrid.answering import Answer
from edgelab.deployments.hybrid.cascading import WithCloud
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudError
from edgelab.deployments.hybrid.remote import Remote, ThroughRemote
from edgelab.deployments.hybrid.speculation.drafting import Adaptive, Counts, Drafting
from edgelab.deployments.partition.stage import Stage
from edgelab.recipes import parse
from edgelab.storage import variants
from edgelab.tasks import Request, prompt_ids

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

    def shared(self, request: Request) -> Answer:
        begun = time.perf_counter()
        ids = self.edge.ids(request.prompt)

        def verified(cloud: Cloud) -> tuple[list[int], Counts]:
            ask = cloud.verifier(ids, self.settings.temperature, self.seed)

            def verify(step: int, draft: list[int], probabilities: Tensor | None) -> tuple[int, int]:
                cloud.deadline_s = self.remote.left_s(
                    self.settings.deadline_s, begun
                )  # of all rounds together
                return ask(step, draft, probabilities)

            loop = Drafting(
                self.edge.session, verify, self.draft, pipelined=self.settings.pipelined,
                temperature=self.settings.temperature, seed=self.seed, stop=[self.edge.tokenizer.eos_token_id],
            )  # fmt: skip
            return loop.write(ids, request.tokens), loop.counts

        try:
            written, counts = self.remote.ask(verified, self.settings.deadline_s, begun)
        except CloudError as error:
            return self.edge.alone(request, begun, str(error))
        self.counts.append(counts)
        whole = time.perf_counter() - begun
        computing = min(counts.prompt_s + counts.drafting_s, whole)
        return Answer(
            self.edge.text(written), "cloud", (("edge", 0.0, computing), ("cloud", computing, whole)), len(written),
            wanted_cloud=True, read=len(ids) + counts.drafted, written=counts.rounds, rounds=counts.rounds,
            drafted=counts.drafted, accepted=counts.accepted,
        )  # fmt: skip

    def account(self) -> dict[str, Any]:
        """How drafting went."""
        names = ("rounds", "drafted", "accepted", "tokens", "ahead", "thrown_away", "drafting_s", "waiting_s")
        return {name: sum(getattr(one, name) for one in self.counts) for name in names}


class Halved(ThroughRemote):
    """The first layers of one model here, the rest in the cloud; hidden states travel. Nobody answers without both."""

    badge = "packed"

    def __init__(
        self, deployment: Split, folder: Path, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
    ) -> None:
        self.settings, self.link, self.tokenizer = deployment, deployment.link, tokenizer
        recipe = parse(str(variants.read_about(folder)["recipe"]))
        self.stage = Stage.load(folder, 0, deployment.cut + 1)
        self.remote = Remote(recipe, deployment.link, model, seed, cut=deployment.cut)
        self.kernel = f"{deployment.cut} layers here, {deployment.wire} states, the rest in the cloud"

    def shared(self, request: Request) -> Answer:
        begun = time.perf_counter()
        ids = prompt_ids(self.tokenizer, request.prompt)
        name, written, spans = secrets.token_urlsafe(16), [], []
        given, position = torch.tensor(ids), 0
        try:
            while len(written) < request.tokens and written[-1:] != [self.tokenizer.eos_token_id]:
                started = time.perf_counter() - begun
                states = self.stage.read(given, position)
                here = time.perf_counter() - begun
                found = self.remote.ask(
                    lambda cloud, states=states: cloud.hidden(name, len(written), states, self.settings.wire),
                    self.settings.deadline_s,
                    begun,
                )
                spans += [("edge", started, here), ("cloud", here, time.perf_counter() - begun)]
                position += len(given)
                written.append(found.id)
                given = torch.tensor([found.id])
        except CloudError as error:
            spans.append(("waiting", spans[-1][2] if spans else 0.0, time.perf_counter() - begun))
            found = Answer("", "nobody", tuple(spans), wanted_cloud=True, said=str(error))
        else:
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            found = Answer(text, "cloud", tuple(spans), len(written), wanted_cloud=True)
            with suppress(CloudError):
                self.remote.direct.forget(name)
        self.stage.forget()
        return replace(found, read=len(ids), written=len(written))
