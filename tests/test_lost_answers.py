"""A cloud that dies, or is too late, in the middle of an answer: what is billed, who is blamed, what is said of it."""

import dataclasses
import itertools
import math

import pytest

from edgelab.deployments.hybrid import Cascade, CloudAlone, Redact, Speculative, Split, remote
from edgelab.deployments.hybrid.answering import start
from edgelab.deployments.hybrid.client.breaker import CircuitBreaker
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudDown, TooLate
from edgelab.devices.prices import prices
from edgelab.measure.requests import _each, taken
from edgelab.recipes import parse
from edgelab.reference import load_tokenizer, resolve
from edgelab.storage import variants
from edgelab.tasks import Request, prompt_ids
from tests.wrong_servers import Server, silence

REQUEST = Request("Once upon a time long there was a", "x", 12)
DEADLINE_S = 300.0  # nobody waits for it
WAYS = {
    "cloud": (CloudAlone(link="ethernet", deadline_s=DEADLINE_S), "complete"),
    "cascade": (Cascade(link="ethernet", deadline_s=DEADLINE_S, threshold=1e9), "complete"),
    "redact": (Redact(link="ethernet", deadline_s=DEADLINE_S), "complete"),
    "speculative": (Speculative(link="ethernet", deadline_s=DEADLINE_S, draft=1), "verify"),
    "split": (Split(link="ethernet", deadline_s=DEADLINE_S, cut=1), "hidden"),
}


@pytest.fixture
def made(tiny, cloud_here):
    """`made(deployment)`: what answers, over the tiny model at the edge and in a cloud in this process."""
    opened, source = [], resolve(str(tiny))

    def make(deployment):
        folder = variants.build(parse("none"), source, 0, lambda done, total: None)
        opened.append(start(deployment, folder, load_tokenizer(source), str(tiny), 0))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def prompt(tiny):
    """Tokens of the prompt."""
    return len(prompt_ids(load_tokenizer(resolve(str(tiny))), REQUEST.prompt))


def behind(monkeypatch, cloud, method, answers, then):
    """Call `then` with the place of each answer to a method of the client behind the first few, in place of asking."""
    ask, calls = getattr(cloud, method), itertools.count()
    monkeypatch.setattr(
        cloud, method, lambda *given, **more: (ask if next(calls) < answers else then)(*given, **more)
    )


def dies(*given, **more):
    raise CloudDown("It died.")


@pytest.mark.parametrize(
    ("way", "answers", "more", "written"),
    [*((way, 0, None, 0) for way in WAYS), ("speculative", 2, 2, 2), ("split", 2, 0, 2)],
)
def test_what_a_cloud_did_not_answer_is_not_billed(made, monkeypatch, prompt, way, answers, more, written):
    """Tokens count from the first answer on: the prompt and, of drafts, one token a round. more: beside the prompt."""
    deployment, method = WAYS[way]
    service = made(deployment)
    served = service.answer(REQUEST)
    assert served.by == "cloud" and served.read >= prompt
    behind(monkeypatch, service.remote.cloud, method, answers, dies)
    lost = service.answer(REQUEST)
    assert (lost.by, lost.said) == ("nobody" if way == "split" else "edge", "It died.")
    assert (lost.read, lost.written) == (0 if more is None else prompt + more, written)
    billed = prices().of(read=served.read + lost.read, written=served.written + written)
    found = taken([served, lost], service.link, None)
    assert found["usd_per_1k_requests"] == pytest.approx(1e3 * billed / 2)


@pytest.mark.parametrize(
    ("way", "spans"),
    [
        ("redact", ["edge", "waiting", "edge"]),  # it looked for personal data
        ("speculative", ["edge", "waiting", "edge"]),  # it drafted
        ("split", ["edge", "cloud"] * 2 + ["edge", "waiting"]),
    ],
)
def test_what_the_edge_computed_in_vain_is_its_work_and_no_waiting(made, monkeypatch, way, spans):
    deployment, method = WAYS[way]
    service = made(deployment)
    behind(monkeypatch, service.remote.cloud, method, 0 if way == "redact" else 2, dies)
    answer = service.answer(REQUEST)
    assert [who for who, _, _ in answer.spans] == spans
    moments = [moment for _, *both in answer.spans for moment in both]
    assert moments == sorted(moments)


@pytest.mark.parametrize("failures", [0, 1])
def test_an_edge_that_is_too_slow_to_ask_again_is_not_the_cloud_s_fault(made, monkeypatch, prompt, failures):
    """The first round is answered, and then too little is left. failures: of the cloud before it."""
    service = made(WAYS["speculative"][0])
    service.remote.breaker = breaker = CircuitBreaker(failures=1, cool_down_s=0)
    for _ in range(failures):
        breaker.failed()
    before, verify, asked = breaker.state, service.remote.cloud.verify, []

    def slow(*given, **more):
        asked.append(given)
        late.setattr(remote, "LEAST_S", math.inf)
        return verify(*given, **more)

    with monkeypatch.context() as late:
        late.setattr(service.remote.cloud, "verify", slow)
        answer = service.answer(REQUEST)
        said = {answer.said, service.answer(REQUEST).said}
    assert len(asked) == 1 and before == breaker.state == ("trial" if failures else "closed")
    assert (answer.by, answer.read, answer.written) == ("edge", prompt + 1, 1)
    assert said == {
        "What is left of 300 s for a request is too little to ask the cloud; give more as deadline_s."
    }
    assert service.answer(REQUEST).by == "cloud" and breaker.state == "closed"


def test_a_connection_that_others_use_all_the_time_is_not_the_cloud_s_fault():
    with (
        Cloud("http://127.0.0.1:1", deadline_s=0.05) as cloud,
        cloud._lock,
        pytest.raises(
            TooLate, match=r"^Others used the connection to the cloud for all of 0\.1 s\.$"
        ) as raised,
    ):
        cloud.complete("a")
    assert not raised.value.outage


def test_the_same_cause_is_said_once_however_many_requests(made, monkeypatch):
    """Each has another time left for a cloud that says nothing, until it is not asked; the set does not grow."""
    service = made(CloudAlone(link="ethernet", deadline_s=2.0))
    needs = iter((1.8, 1.85, 1.9, 1.8, 1.85))
    monkeypatch.setattr(service.edge, "expected_s", lambda request: next(needs))
    one = Server(*[silence] * 3)
    monkeypatch.setattr(service.remote.cloud, "url", one.url)
    answers = [service.answer(dataclasses.replace(REQUEST, tokens=2)) for _ in range(5)]
    one.close()
    late, left_alone = _each(answers)["said"]
    assert late == (
        "The cloud did not answer within what was left to it of 2 s for a request; give more as deadline_s, or ask "
        "for less."
    )
    assert left_alone.startswith("The cloud failed at least 3 times in a row")
