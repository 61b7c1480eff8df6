"""Answering requests: by an engine on this device alone, or by whatever a deployment makes of edge and cloud."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgelab import runtimes
from edgelab.deployments.hybrid.routing.scores import answer_scores
from edgelab.tasks import PROMPTS, Request, endings, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.recipes import Deployment
    from edgelab.runtimes.session import Session

RECENT = 20  # answers that tell how long the next one takes
SLOW = 0.95  # share of them that take no longer than is expected


@dataclass(frozen=True)
class Answer:
    """What came of a request, and what it took.

    by: who answered in the end, "edge", "cloud" or "nobody". spans: (who, begin, end), seconds behind the question.
    tokens: of the answer. scores: how sure the edge was, by name. wanted_cloud: whether it was to be asked. read,
    written: tokens that the cloud read and wrote, as far as it has answered. rounds, drafted, accepted: of speculative
    decoding. said: what went wrong on the way, empty where nothing did.
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


class Pace:
    """How fast an engine answers, from its last RECENT answers: seconds for each token of a prompt, and of an answer.

    What a step takes however short it is counts in these, so that more is expected of longer texts than they take.
    """

    def __init__(self) -> None:
        self._read_s: deque[float] = deque(maxlen=RECENT)
        self._write_s: deque[float] = deque(maxlen=RECENT)

    def observe(self, read: int, read_s: float, written: int, write_s: float) -> None:
        """An answer of `written` tokens to a prompt of `read`, and the seconds that each took."""
        self._read_s.append(read_s / max(read, 1))
        self._write_s.append(write_s / written)

    def expected_s(self, read: int, written: int) -> float:
        """Seconds for such an answer, the 95 % point of both rates; 0 where none was observed."""
        if not self._read_s:
            return 0.0
        return read * float(np.quantile(self._read_s, SLOW)) + written * float(
            np.quantile(self._write_s, SLOW)
        )


class Edge(Answering):
    """One engine on this device, which writes the likeliest tokens and says how sure it was."""

    def __init__(self, session: Session, tokenizer: PreTrainedTokenizerBase) -> None:
        self.session, self.tokenizer, self.pace = session, tokenizer, Pace()
        self.kernel, self.badge = session.kernel, session.badge

    def warm_up(self) -> None:
        """Answer three times, the first of which does not count, so that `expected_s` has something to go by."""
        for place in range(3):
            self.answer(Request(" ".join(PROMPTS), ""))
            if place == 0:
                self.pace = Pace()

    def expected_s(self, request: Request) -> float:
        """Seconds in which it answers, as its last answers tell; 0 where there are none."""
        return self.pace.expected_s(len(self.ids(request.prompt)), request.tokens)

    def ids(self, prompt: str) -> list[int]:
        """Tokens of a prompt, as a sequence begins with them."""
        return prompt_ids(self.tokenizer, prompt)

    def text(self, ids: list[int]) -> str:
        """What tokens say."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def answer(self, request: Request) -> Answer:
        """The greedy continuation of a prompt up to the end of the text, or to where the request stops it.

        Scores are of the tokens by which it is right or wrong: how sure the edge was of what it wrote after them says
        nothing about that.
        """
        started = time.perf_counter()
        ids = self.ids(request.prompt)
        token, written, logits = self.session.prefill(ids), [], []
        read_s = time.perf_counter() - started
        ends, judged = endings(self.tokenizer), 0  # tokens that decide whether the answer is right
        while True:
            logits.append(self.session.next_logits())
            written.append(token)
            stopped = token in ends or holds(self.tokenizer, written, request.stop)
            if not judged and request.is_decided(self.text(written)):
                judged = len(written)
            if stopped or len(written) == request.tokens:
                break
            token = self.session.decode(token)
        judged = judged or len(written)
        scores = answer_scores(torch.cat(logits[:judged]).numpy(), written[:judged])
        seconds = time.perf_counter() - started
        self.pace.observe(len(ids), read_s, len(written), seconds - read_s)
        spans = (("edge", 0.0, seconds),)
        text = before(self.text(written), request.stop)
        return Answer(text, "edge", spans, len(written), scores)

    def alone(self, request: Request, begun: float, said: str, worked_s: float = 0.0) -> Answer:
        """The answer for want of the cloud, which was asked in vain since `begun`, by time.perf_counter.

        worked_s: of that time, in which the edge computed.
        """
        waited = time.perf_counter() - begun
        own, worked_s = self.answer(request), min(worked_s, waited)
        spans = (
            *([("edge", 0.0, worked_s)] if worked_s else []),
            ("waiting", worked_s, waited),
            *((who, waited + begin, waited + end) for who, begin, end in own.spans),
        )
        return replace(own, spans=spans, wanted_cloud=True, said=said)

    def close(self) -> None:
        self.session.close()


def holds(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: str) -> bool:
    """Whether the text of these tokens holds what stops it; an empty stop is none."""
    return bool(stop) and stop in tokenizer.decode(ids, skip_special_tokens=True)


def before(text: str, stop: str) -> str:
    """A text up to what stops it; all of it where nothing does."""
    return text.partition(stop)[0] if stop else text


def start(
    deployment: Deployment, folder: Path, tokenizer: PreTrainedTokenizerBase, model: str, seed: int
) -> Answering:
    """What answers requests to a variant, as its deployment says. model: that edge and cloud are made of."""
    place = getattr(deployment, "service", None)
    if place is None:
        return Edge(runtimes.load(deployment, folder), tokenizer)
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)(deployment, folder, tokenizer, model, seed)
