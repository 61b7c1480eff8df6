"""What holds for every way of sharing work with a cloud: an answer that is stopped, a cloud that is unplugged."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from edgelab.deployments.hybrid import Cascade, CloudAlone, Redact, Speculative, Split, remote
from edgelab.deployments.hybrid.answering import Edge, Pace, start
from edgelab.deployments.hybrid.client.breaker import CircuitBreaker
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudBusy, CloudGarbled, CloudSlow
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.speculation.acceptance import SpeculationError
from edgelab.lab import requests
from edgelab.lab.requests import Running
from edgelab.measure.requests import _each
from edgelab.recipes import parse
from edgelab.reference import load_tokenizer, resolve
from edgelab.storage import variants
from edgelab.tasks import Request, prompt_ids
from tests.conftest import SHAPE, make_model
from tests.wrong_servers import DEADLINE_S as SHORT_S
from tests.wrong_servers import GRACE_S, WRONG, Server, http, silence

REQUEST = Request("Once upon a time long there was a", "x", 12)
TO_CLOUD, TO_EDGE = 1e9, -1e9  # thresholds of a cascade
DEADLINE_S = 300.0  # nobody waits for it
WAYS = {
    "edge": parse("none").deployment,
    "cloud": CloudAlone(link="ethernet", deadline_s=DEADLINE_S),
    "cascade, cloud": Cascade(link="ethernet", deadline_s=DEADLINE_S, threshold=TO_CLOUD),
    "cascade, edge": Cascade(link="ethernet", deadline_s=DEADLINE_S, threshold=TO_EDGE),
    "speculative": Speculative(link="ethernet", deadline_s=DEADLINE_S, draft=3),
    "speculative, pipelined": Speculative(link="ethernet", deadline_s=DEADLINE_S, draft=4, pipelined=True),
    "split": Split(link="ethernet", deadline_s=DEADLINE_S, cut=1, wire="float32"),
    "redact, cloud": Redact(link="ethernet", deadline_s=DEADLINE_S),
    "redact, edge": Redact(link="ethernet", deadline_s=DEADLINE_S, policy="edge"),
}
ASKING = ("cloud", "cascade, cloud", "speculative", "speculative, pipelined", "redact, cloud", "split")


@pytest.fixture
def made(tiny, cloud_here):
    """`made(deployment)`: what answers, over the tiny model at the edge and in the cloud, which is in this process.

    edge, cloud: folders of other models.
    """
    opened = []

    def make(deployment, edge=tiny, cloud=tiny):
        source = resolve(str(edge))
        folder = variants.build(parse("none"), source, 0, lambda done, total: None)
        opened.append(start(deployment, folder, load_tokenizer(source), str(cloud), 0))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def whole(made):
    """The answer of the edge alone where nothing stops it."""
    return made(WAYS["edge"]).answer(REQUEST).text


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_ends_where_its_request_stops_it(made, whole, way):
    """Within a token, over two of them, at the first character, and nowhere."""
    service = made(WAYS[way])
    counts = []
    for stop in (whole[0], whole[3], whole[4:7], "never in it", ""):
        answer = service.answer(dataclasses.replace(REQUEST, stop=stop))
        assert answer.text == (whole.partition(stop)[0] if stop else whole), stop
        assert answer.by == ("edge" if way.endswith("edge") else "cloud")
        counts.append(answer.tokens)
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[3] == counts[4] == REQUEST.tokens


def test_a_threshold_is_chosen_on_answers_that_stop(made, whole, monkeypatch):
    service = made(Cascade(link="ethernet", accuracy=0.5))
    complete, told = service.remote.direct.complete, []

    def noted(*given, **settings):
        found = complete(*given, **settings)
        told.append(found.text)
        return found

    monkeypatch.setattr(service.remote.direct, "complete", noted)
    stops = (whole[3], whole[5], "")
    expected = [whole.partition(stop)[0] if stop else whole for stop in stops]
    others = [
        dataclasses.replace(REQUEST, stop=stop, word=word) for stop, word in zip(stops, expected, strict=True)
    ]
    service.prepare(others, lambda done, total: None)
    assert told == expected


@pytest.fixture
def running(made, tmp_path, monkeypatch):
    """`running(deployment)`: as while somebody looks on, with a lock of timings of its own."""
    monkeypatch.setattr(requests, "timing_lock", lambda: FileLock(tmp_path / "timing.lock"))
    return lambda deployment: Running(made(deployment), REQUEST.tokens, lambda text: None, lambda: False)


@pytest.mark.parametrize(("way", "by"), [(way, "nobody" if way == "split" else "edge") for way in ASKING])
def test_a_request_that_is_under_way_when_the_cloud_is_unplugged_is_answered(running, whole, way, by):
    """By the edge where it has a whole model, long before the deadline; and the next one by the cloud again."""
    found = running(WAYS[way])
    meter = found.remote.cloud.meter
    found.remote.proxies.interrupt(found.remote.proxy, requests.FOR_EVER_S)  # what is sent does not arrive
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(found.answer, REQUEST.prompt)
        while not meter.sent and not asked.done():
            time.sleep(0.01)
        found.unplug()
        answer = asked.result()
    assert (answer.by, answer.wanted_cloud, answer.text) == (by, True, whole if by == "edge" else "")
    assert "the connection was cut" in answer.said
    assert answer.seconds < DEADLINE_S
    found.plug_in()
    again = found.answer(REQUEST.prompt)
    assert (again.by, again.text, again.said) == ("cloud", whole, "")


def test_a_cloud_that_is_unplugged_between_two_rounds_is_not_asked_for_a_third(running, whole, monkeypatch):
    found, calls = running(Speculative(link="ethernet", draft=1, deadline_s=DEADLINE_S)), []
    verify = found.remote.cloud.verify

    def unplugged_behind(*given, **settings):
        calls.append(verify(*given, **settings))
        if len(calls) == 2:
            found.unplug()
        return calls[-1]

    monkeypatch.setattr(found.remote.cloud, "verify", unplugged_behind)
    answer = found.answer(REQUEST.prompt)
    assert (answer.by, answer.text, len(calls)) == ("edge", whole, 2)
    assert "the connection was cut" in answer.said


# Other tokens


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A folder with the weights of the tiny model, whose 300 tokens are bytes and merges learned from another text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=["</s>", "<s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(
        ["Once upon a time long ago there was a robot who made cups, plates and spoons out of rain."], trainer
    )
    folder = tmp_path_factory.mktemp("other") / "tiny-other"
    make_model("llama").save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def test_ids_of_one_vocabulary_are_other_words_in_the_other(tiny, other):
    """What the tests below are about."""
    mine, theirs = (load_tokenizer(resolve(str(folder))) for folder in (tiny, other))
    ids = prompt_ids(mine, REQUEST.prompt)
    assert len(mine) == len(theirs)
    assert mine.decode(ids) == REQUEST.prompt != theirs.decode(ids)


@pytest.mark.parametrize("way", ["cloud", "cascade, cloud", "redact, cloud"])
def test_a_cloud_with_other_tokens_reads_and_writes_text(made, whole, other, way):
    theirs = made(WAYS["edge"], edge=other)
    expected = theirs.answer(REQUEST)
    service = made(WAYS[way], cloud=other)
    answer = service.answer(REQUEST)
    assert (answer.by, answer.said, answer.text) == ("cloud", "", expected.text)
    assert answer.text != whole
    assert (answer.read, answer.written) == (len(theirs.ids(REQUEST.prompt)), expected.tokens)
    stopped = service.answer(dataclasses.replace(REQUEST, stop=expected.text[4:6]))
    assert (stopped.by, stopped.text) == ("cloud", expected.text.partition(expected.text[4:6])[0])


def test_a_threshold_is_chosen_on_what_a_cloud_with_other_tokens_writes(made, other, monkeypatch):
    theirs = made(WAYS["edge"], edge=other).answer(REQUEST).text
    service = made(dataclasses.replace(WAYS["cascade, cloud"], threshold=None, accuracy=0.5), cloud=other)
    complete, told = service.remote.direct.complete, []

    def noted(*given, **settings):
        told.append(complete(*given, **settings))
        return told[-1]

    monkeypatch.setattr(service.remote.direct, "complete", noted)
    service.prepare([dataclasses.replace(REQUEST, word=theirs)] * 2, lambda done, total: None)
    assert [one.text for one in told] == [theirs] * 2


def test_a_cloud_with_other_tokens_verifies_no_drafts(made, other, monkeypatch):
    closed = []
    monkeypatch.setattr(Edge, "close", lambda edge: closed.append(edge))
    with pytest.raises(
        SpeculationError, match=r"tokens that are not those of the cloud.*give both the same"
    ) as raised:
        made(WAYS["speculative"], cloud=other)
    assert len(closed) == 1
    assert "\n" not in str(raised.value)


def test_a_server_that_does_not_say_what_its_tokens_are_is_asked_in_text(made, whole, monkeypatch):
    monkeypatch.setattr(Cloud, "health", lambda cloud: {"status": "ok"})
    service, asked = made(WAYS["cloud"]), []
    complete = service.remote.cloud.complete

    def noted(prompt, *given, **settings):
        asked.append(prompt)
        return complete(prompt, *given, **settings)

    monkeypatch.setattr(service.remote.cloud, "complete", noted)
    answer = service.answer(REQUEST)
    assert asked == [REQUEST.prompt]
    assert (answer.by, answer.text, answer.tokens) == ("cloud", whole, REQUEST.tokens)
    with pytest.raises(SpeculationError):
        made(WAYS["speculative"])


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


@pytest.mark.parametrize(
    ("told", "counts"),
    [
        ({}, None),  # the edge counts
        ({"usage": USAGE}, (9, 4)),
        ({"usage": None}, None),
        ({"usage": USAGE | {"completion_tokens": 13}}, ()),
        ({"usage": USAGE | {"prompt_tokens": 10**400}}, ()),
    ],
)
def test_what_a_server_of_another_kind_counts(made, whole, monkeypatch, told, counts):
    """An answer of plain OpenAI's shape, without token ids; more tokens than were asked for are none."""
    monkeypatch.setattr(Cloud, "health", lambda cloud: {"status": "ok"})
    service = made(WAYS["cloud"])
    one = Server(http({"choices": [{"text": " a robot", "finish_reason": "stop"}], **told}))
    monkeypatch.setattr(service.remote.cloud, "url", one.url)
    answer = service.answer(REQUEST)
    one.close()
    if counts == ():
        assert (answer.by, answer.text) == ("edge", whole)
        assert "more tokens" in answer.said
        return
    edge = service.edge
    counts = counts or (len(edge.ids(REQUEST.prompt)), len(edge.ids(" a robot")))
    assert (answer.by, answer.text, answer.read, answer.written) == ("cloud", " a robot", *counts)


# Answers that are none

CHOICE = {"text": "a", "token_ids": [5], "finish_reason": "length"}
OURS = {
    "no tokens": {"choices": [CHOICE | {"token_ids": None}]},
    "a token that is none": {"choices": [CHOICE | {"token_ids": [5, 300]}]},
    "a huge token": {"choices": [CHOICE | {"token_ids": [10**30]}]},
    "more tokens than were asked for": {"choices": [CHOICE | {"token_ids": [5] * 13}]},
    "half a character": {"choices": [CHOICE | {"text": "\ud800"}]},
    "a step of another conversation": {"step": 7, "accepted": 0, "next": 5, "top": []},
    "a next token that is none": {"step": 0, "accepted": 0, "next": 300, "top": []},
    "a huge next token": {"step": 0, "accepted": 0, "next": 10**30, "top": []},
    "half a next token": {"step": 0, "accepted": 0, "next": 2.5, "top": []},
    "more accepted than drafted": {
        "step": 0,
        "accepted": 10**9,
        "next": 5,
        "top": [{"id": 5, "logprob": -1}],
    },
}
GARBLED = WRONG | {case: (http(told), CloudGarbled) for case, told in OURS.items()}


@pytest.mark.parametrize("way", ASKING)
def test_whatever_the_cloud_answers_costs_no_request(made, whole, way, monkeypatch):
    """The edge answers, the answer says why, and the breaker counts what was no answer."""
    service = made(WAYS[way])
    service.answer(REQUEST)  # what is loaded for the first one takes its time
    if way != "split":
        monkeypatch.setattr(service.edge, "expected_s", lambda request: 0.0)
    expected = ("nobody", "") if way == "split" else ("edge", whole)
    for case, (told, kind) in GARBLED.items():
        one, service.remote.breaker = Server(told), CircuitBreaker(failures=1)
        monkeypatch.setattr(service.remote.cloud, "url", one.url)
        deadline_s = SHORT_S if kind in (CloudBusy, CloudSlow) else DEADLINE_S
        service.settings = dataclasses.replace(service.settings, deadline_s=deadline_s)
        answer = service.answer(REQUEST)
        one.close()
        assert (answer.by, answer.text, answer.wanted_cloud) == (*expected, True), case
        assert answer.said.endswith(".") and "\n" not in answer.said, case
        is_late = kind is CloudSlow and "too little to ask" in answer.said  # of a busy machine
        assert (service.remote.breaker.state == "open") == kind.outage or is_late, (case, answer.said)
        answer.said.encode()


@pytest.mark.parametrize("way", ["cloud", "cascade, cloud", "speculative", "redact, cloud"])
def test_a_refusal_is_told_in_the_row(made, way, monkeypatch):
    """One that holds for every request opens the breaker, so that it is not sent again each time."""
    service = made(WAYS[way])
    for status, sent in ((400, 5), (401, 3), (404, 3)):
        refusal = {"error": {"message": "Not\nfor you.", "type": "a", "code": "b"}}
        one, service.remote.breaker = Server(*[http(refusal, status)] * 5), CircuitBreaker()
        monkeypatch.setattr(service.remote.cloud, "url", one.url)
        answers = [service.answer(REQUEST) for _ in range(5)]
        one.close()
        assert len(one.requests) == sent, status
        said = _each(answers)["said"]
        assert any("Not for you." in each for each in said), status
        assert any("is not asked" in each for each in said) == (sent == 3)


# Limits of the server, of which every request would be too large, or too slow


@pytest.mark.parametrize(
    "deployment",
    [
        Speculative(link="ethernet", deadline_s=DEADLINE_S, draft=16, temperature=1.0),  # 600 bytes a token
        Split(link="ethernet", deadline_s=DEADLINE_S, cut=1, wire="float32"),
    ],
)
def test_the_server_takes_the_largest_request_of_its_deployment(made, deployment, monkeypatch):
    _, *others = Limits.__init__.__defaults__
    monkeypatch.setattr(Limits.__init__, "__defaults__", (1000, *others))
    answer = made(deployment).answer(REQUEST)
    assert (answer.by, answer.said) == ("cloud", "")
    assert answer.sent_bytes > 1500


@pytest.mark.parametrize(
    ("deadline_s", "body_s", "request_s"), [(300.0, 300, 300), (30.0, 30, 60), (1.0, 10, 60)]
)
@pytest.mark.parametrize("way", [CloudAlone, Split])
def test_the_server_waits_as_long_as_its_deployment(made, monkeypatch, way, deadline_s, body_s, request_s):
    started, served = remote.started, []

    def noted(settings):
        served.append(settings.limits)
        return started(settings)

    monkeypatch.setattr(remote, "started", noted)
    made(way(link="ethernet", deadline_s=deadline_s, **({"cut": 1} if way is Split else {})))
    assert [(one.body_s, one.request_s, one.waiting_s) for one in served] == [(body_s, request_s, request_s)]


# Deadlines


def test_pace_by_hand():
    """Twenty answers of 1 s for ten tokens read and 4 s for two written, then twenty of 2 and 4 s."""
    pace = Pace()
    assert pace.expected_s(10, 2) == 0
    for _ in range(20):
        pace.observe(10, 1.0, 2, 4.0)
    assert pace.expected_s(10, 2) == pytest.approx(5)
    assert pace.expected_s(30, 1) == pytest.approx(3 + 2)
    pace.observe(
        10, 2.0, 2, 4.0
    )  # one of twenty is slower: on the way from the 19th to the 20th by a twentieth
    assert pace.expected_s(10, 2) == pytest.approx(1.05 + 4)
    for _ in range(19):
        pace.observe(10, 2.0, 2, 4.0)
    assert pace.expected_s(10, 2) == pytest.approx(6)


def test_an_edge_that_shares_its_work_knows_its_pace_before_it_is_asked(made):
    for way in ("cloud", "cascade, cloud", "speculative", "redact, cloud"):
        assert made(WAYS[way]).edge.expected_s(REQUEST) > 0


@pytest.mark.parametrize(
    ("way", "needs_s", "share_s"),
    [
        ("cloud", 1.5, 0.5),
        ("speculative", 1.5, 0.5),
        ("speculative, pipelined", 1.5, 0.5),
        ("redact, cloud", 1.5, 0.5),
        ("cascade, cloud", 1.5, 2.0),  # its edge has answered already
        ("cloud", 50.0, 0.2),
    ],
)
def test_the_edge_keeps_the_time_that_it_needs(made, whole, way, needs_s, share_s, monkeypatch):
    """Of a deadline of two seconds, from a cloud that says nothing."""
    service = made(WAYS[way])
    service.answer(REQUEST)
    service.settings = dataclasses.replace(service.settings, deadline_s=2.0)
    one, cloud = Server(silence), service.remote.cloud
    monkeypatch.setattr(service.edge, "expected_s", lambda request: needs_s)
    monkeypatch.setattr(cloud, "url", one.url)
    answer = service.answer(REQUEST)
    one.close()
    assert (answer.by, answer.text) == ("edge", whole)
    assert 0 < cloud.deadline_s <= share_s
    waited = sum(end - begin for who, begin, end in answer.spans if who == "waiting")
    assert waited < share_s + GRACE_S
