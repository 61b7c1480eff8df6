"""A deployment that answers requests while somebody looks on: started once, asked, cut off from its cloud."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from filelock import Timeout

from edgelab import corpora, tasks
from edgelab.deployments.hybrid import answering
from edgelab.lab.question import Settings, ask
from edgelab.lab.road import built
from edgelab.measure.isolation import Stopped
from edgelab.measure.requests import CORPUS
from edgelab.measure.turn import timing_lock
from edgelab.network import find
from edgelab.reference import EMBEDDED, load_tokenizer
from edgelab.storage import variants
from edgelab.tasks import Request

if TYPE_CHECKING:
    from edgelab.deployments.hybrid.answering import Answer, Answering
    from edgelab.deployments.hybrid.remote import Remote

CHOOSING = 16  # requests that a threshold is chosen on: a rough choice, made while somebody waits
LOOK_S = 0.3  # how often a wait for other timings looks whether it is called off
FOR_EVER_S = 1e6


@dataclass
class Running:
    """A deployment that answers. tokens: of an answer, at most. say, called_off: as in `running`."""

    service: Answering
    tokens: int
    say: Callable[[str], None]
    called_off: Callable[[], bool]

    @property
    def remote(self) -> Remote | None:
        """The cloud and the link to it; None where the edge is alone."""
        return getattr(self.service, "remote", None)

    @property
    def deadline_s(self) -> float | None:
        """Of a request; None where the edge is alone."""
        return None if self.remote is None else self.service.settings.deadline_s

    def answer(self, prompt: str) -> Answer:
        """The answer to one prompt, timed while nothing else is on this machine. Raises Stopped where called off.

        Where the cloud is unplugged meanwhile, the edge answers at once, and the answer says why.
        """
        if self.remote is not None:
            self.remote.cloud.mend()
        with _turn(self.called_off, self.say):
            return self.service.answer(Request(prompt, "", self.tokens))

    def unplug(self) -> None:
        """From now on nothing passes between edge and cloud. A request that is under way asks the cloud no more."""
        if self.remote is not None:
            self.remote.proxies.interrupt(self.remote.proxy, FOR_EVER_S)
            self.remote.cloud.cut()

    def plug_in(self) -> None:
        """The link is there again, for all that is sent from now on."""
        if self.remote is not None:
            self.remote.proxies.use(self.remote.proxy, find(self.service.link))

    def hang_up(self) -> None:
        """End the link for good, so that nobody waits for the cloud any longer."""
        if self.remote is not None:
            self.remote.proxies.close()


@contextmanager
def running(
    recipe: str,
    *,
    model: str = EMBEDDED,
    seed: int = 0,
    tokens: int = 16,
    say: Callable[[str], None] = lambda text: None,
    called_off: Callable[[], bool] = lambda: False,
) -> Iterator[Running]:
    """Make a recipe's variant, start its deployment, and hold edge, cloud and link while the context lasts.

    What a deployment has to choose, such as a threshold, it chooses on CHOOSING requests. say: told what is being
    done. called_off: asked between the steps, and ends them with Stopped. Raises an EdgeLabError where the deployment
    cannot run.
    """
    (question,) = ask([recipe], Settings(model=model, seed=seed), interleave=False)
    deployment = question.recipe.deployment
    say("Making the weights …")
    folder = built(question)
    _go_on(called_off)
    tokenizer = variants.load_own_tokenizer(folder) or load_tokenizer(question.source)
    say("Starting edge and cloud …")
    with _turn(called_off, say):
        service = answering.start(deployment, folder, tokenizer, model, seed)
    try:
        _go_on(called_off)
        with _turn(called_off, say):
            _choose(service, tokens, say, called_off)
        yield Running(service, tokens, say, called_off)
    finally:
        service.close()


def _choose(
    service: Answering, tokens: int, say: Callable[[str], None], called_off: Callable[[], bool]
) -> None:
    """Let a deployment choose on requests whose answers are as long as those that will be asked for."""
    others = [replace(one, tokens=tokens) for one in tasks.requests(corpora.read(CORPUS), CHOOSING)]

    def advance(done: int, total: int) -> None:
        _go_on(called_off)
        say(f"Choosing when to ask the cloud, request {done} of {total} …")

    service.prepare(others, advance)


def _go_on(called_off: Callable[[], bool]) -> None:
    if called_off():
        raise Stopped


@contextmanager
def _turn(called_off: Callable[[], bool], say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the lock of timings. Unlike a plain wait for it, this one can be called off."""
    lock = timing_lock()
    while True:
        _go_on(called_off)
        try:
            lock.acquire(timeout=LOOK_S)
            break
        except Timeout:
            say("Waiting until nothing else is timed on this machine …")
    try:
        yield
    finally:
        lock.release()
