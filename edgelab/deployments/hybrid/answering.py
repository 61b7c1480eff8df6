"""Answering requests: by an engine on this device alone, or by whatever a deployment makes of edge and cloud."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgelab import runtimes
from edgelab.deployments.hybrid.routing.scores import answer_scores
from edgelab.tasks import Request, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.recipes import Deployment
    from edgelab.runtimes.session import Session


@dataclass(frozen=True)
class Answer:
    """What came of a request, and what it took.

    by: who answered in the end, "edge", "cloud" or "nobody". spans: (who, begin, end), seconds behind the question.
    tokens: of the answer. scores: how sure the edge was, by name. wanted_cloud: whether it was to be asked. read,
    written: tokens that the cloud read and wrote. rounds, drafted, accepted: of speculative decoding. said: what went
    wrong on the way, empty where nothing did.
    """

    text: str
    by: str
    spans: tuple[tuple[str, float, float], ...]
    tokens: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    wanted_cloud: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0
    read: int = 0
    written: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    said: str = ""

    @property
    def seconds(self) -> float:
        """From the question to the whole answer."""
        return max(end for _, _, end in self.spans)

    @property
    def edge_s(self) -> float:
        """In which the edge computed."""
        return sum(end - begin for who, begin, end in self.spans if who == "edge")


class Answering(ABC):
    """A deployment that answers requests. link: name of what lies between edge and cloud, empty where nothing does."""

    kernel: str
    badge = "runtime"
    link = ""

    @abstractmethod
    def answer(self, request: Request) -> Answer:
        """The answer to one request, within the deadline where there is one."""

    def prepare(self, others: Sequence[Request], progress: Callable[[int, int], None]) -> None:
        """Choose what has to be chosen, on requests that are not measured; nothing has to be unless a kind says so."""
        progress(len(others), len(others))

    def account(self) -> dict[str, Any]:
        """What a reader of the row has to know beside the answers, in values of JSON."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


class Edge(Answering):
    """One engine on this device, which writes the likeliest tokens and says how sure it was."""

    def __init__(self, session: Session, tokenizer: PreTrainedTokenizerBase) -> None:
        self.session, self.tokenizer = session, tokenizer
        self.kernel, self.badge = session.kernel, session.badge

    def ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt, as a sequence begins with them."""
        return prompt_ids(self.tokenizer, prompt)

    def text(self, ids: list[int]) -> str:
        """What tokens say."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, request: Request) -> Answer:
        """The greedy continuation of a prompt up to the end of the text, or to where the request stops it."""
        started = time.perf_counter()
        token, written, logits = self.session.prefill(self.ids(request.prompt)), [], []
        while True:
            logits.append(self.session.next_logits())
            written.append(token)
            stopped = token == self.tokenizer.eos_token_id or (
                request.stop and request.stop in self.text(written)
            )
            if stopped or len(written) == request.tokens:
                break
            token = self.session.decode(token)
        scores = answer_scores(torch.cat(logits).numpy(), written)
        spans = (("edge", 0.0, time.perf_counter() - started),)
        text = self.text(written)
        text = text.partition(request.stop)[0] if request.stop else text
        return Answer(text, "edge", spans, len(written), scores)

    def alone(self, request: Request, begun: float, said: str) -> Answer:
        """The answer for want of the cloud, which was asked in vain since `begun`, by time.perf_counter."""
        waited = time.perf_counter() - begun
        own = self.answer(request)
        spans = (
            ("waiting", 0.0, waited),
            *((who, waited + begin, waited + end) for who, begin, end in own.spans),
        )
        return replace(own, spans=spans, wanted_cloud=True, said=said)

    def close(self) -> None:
        self.session.close()


def start(
    deployment: Deployment, folder: Path, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
) -> Answering:
    """What answers requests to a variant, as its deployment says. model: that edge and cloud are made of."""
    place = getattr(deployment, "service", None)
    if place is None:
        return Edge(runtimes.load(deployment, folder), tokenizer)
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)(deployment, folder, tokenizer, model, seed)
