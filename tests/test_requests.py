"""Requests that a deployment answers: items by hand, edge alone, a cloud behind a link, and a cloud that is gone."""

import dataclasses
import itertools
import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edgelab import assets, recipes, tasks
from edgelab.deployments import hybrid
from edgelab.deployments.hybrid import Cascade, CloudAlone, Redact, Speculative, Split, prompts
from edgelab.deployments.hybrid.answering import Answer, Edge, start
from edgelab.deployments.hybrid.client.failures import CloudDown
from edgelab.deployments.hybrid.redacting import TOKENS
from edgelab.deployments.hybrid.split import payload_bytes
from edgelab.devices import prices as price_table
from edgelab.devices.prices import Prices, prices
from edgelab.measure import Asked, measurements
from edgelab.measure.privacy import privacy
from edgelab.measure.requests import WARM, requests, taken, times
from edgelab.recipes import RecipeError, parse
from edgelab.reference import load_tokenizer, resolve
from edgelab.storage import variants
from edgelab.tasks import Request

TEXT = (
    "Ann has a very small dog. She likes to run in the green park! He said so.\nThe old man went to the sea."
)


def test_requests_end_before_the_last_word():
    found = tasks.requests(TEXT)
    assert [one.word for one in found] == ["dog", "park", "sea"]
    assert found[0].prompt == "Ann has a very small"
    assert found[1].prompt == "Ann has a very small dog. She likes to run in the green"
    assert found[2].prompt.endswith("He said so.\nThe old man went to the")
    assert len(tasks.requests(TEXT, 2)) == 2
    long = "word " * 100 + "ends here now."
    (only,) = tasks.requests(long)
    assert len(only.prompt) <= tasks.REQUEST_CHARACTERS
    assert only.prompt.startswith("word ")


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" dog. And", True),
        ("dog", True),
        (" dogs", False),
        (" dog's", False),
        ("the dog", False),
        ("", False),
    ],
)
def test_right_begins_with_the_word(written, right):
    assert Request("Ann has a", "dog").is_right(written) is right


def test_time_bytes_shares_and_price_by_hand():
    here = Answer("a", "edge", (("edge", 0.0, 0.1),), scores={"mean": 0.0})
    there = Answer(
        "b", "cloud", (("edge", 0.0, 0.1), ("cloud", 0.1, 0.4)), scores={"mean": -1.0}, wanted_cloud=True,
        sent_bytes=600, received_bytes=400, read=70, written=6,
    )  # fmt: skip
    lost = dataclasses.replace(here, spans=(("edge", 0.0, 0.1), ("waiting", 0.1, 1.0)), wanted_cloud=True)
    found = taken([here, there, lost, here], "lte", power_w=5.0)
    assert found["request_ms_p50"] == pytest.approx(250)
    assert found["request_ms_p95"] == pytest.approx(np.percentile([100, 400, 1000, 100], 95))
    assert (found["sent_bytes_per_request"], found["received_bytes_per_request"]) == (150, 100)
    assert (found["cloud_share"], found["alone_share"]) == (0.25, 0.25)
    assert found["edge_j_per_request"] == pytest.approx(0.5)
    known = prices()
    cloud = (70 * known.cloud_input + 6 * known.cloud_output) / 1e6
    whole = cloud + 1000 / 1e9 * known.data["lte"] + 2.0 / 3.6e6 * known.electricity
    assert found["usd_per_1k_requests"] == pytest.approx(250 * whole)
    assert taken([here], "", None)["edge_j_per_request"] is None
    assert found["unanswered_share"] == 0


def test_times_are_of_the_requests_that_were_answered():
    """Three of four are given up behind 1 ms; bytes and joules are those of all four."""
    there = Answer("b", "cloud", (("edge", 0.0, 0.1), ("cloud", 0.1, 0.4)), wanted_cloud=True, sent_bytes=600)
    gone = Answer("", "nobody", (("edge", 0.0, 0.001),), wanted_cloud=True, sent_bytes=200)
    found = taken([there, gone, gone, gone], "lte", power_w=4.0)
    assert (found["request_ms_p50"], found["request_ms_p95"]) == pytest.approx((400, 400))
    assert (found["unanswered_share"], found["cloud_share"], found["alone_share"]) == (0.75, 0.25, 0)
    assert found["sent_bytes_per_request"] == 300
    assert found["edge_j_per_request"] == pytest.approx(4.0 * 0.103 / 4)
    found = taken([gone, gone], "lte", None)
    assert found["request_ms_p50"] is found["request_ms_p95"] is None
    assert found["unanswered_share"] == 1


SURE = Answer("a", "edge", (("edge", 0.0, 0.1),), scores={"mean": -0.5, "margin": 0.25})
NO_SCORES = Answer("b", "cloud", (("cloud", 0.0, 0.4),), wanted_cloud=True)


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        ([SURE, NO_SCORES], {}),
        ([NO_SCORES, SURE], {}),
        ([SURE, dataclasses.replace(SURE, scores={"mean": -1.0})], {"mean": [-0.5, -1.0]}),
    ],
)
def test_scores_are_kept_where_every_answer_has_them(monkeypatch, answers, scores):
    """The edge stands in for the cloud where that is late, and says how sure it was, which the cloud does not."""
    items = [Request("Ann has a", "dog")] * 3  # the first third is not measured
    monkeypatch.setattr(tasks, "requests", lambda text: items)
    left = iter([SURE, *answers])
    service = SimpleNamespace(
        link="lte", prepare=lambda *_: None, answer=lambda request: next(left), account=dict
    )
    found = requests(SimpleNamespace(service=service, asked=Asked(), report=lambda *_: None))
    each = json.loads(found["served"])
    assert each["scores"] == scores
    assert each["sent"] == "".join("01"[one.by == "cloud"] for one in answers)
    assert each["answered"] == "11"


def test_times_of_each_answer():
    waited = Answer("a", "edge", (("edge", 0.0, 0.1), ("waiting", 0.1, 0.5), ("edge", 0.5, 0.7)))
    quick = Answer("b", "cloud", (("cloud", 0.0, 0.04),))
    assert times([waited, quick]) == {"ms": [700.0, 40.0], "edge_ms": [300.0, 0.0]}


def asked_about(answers, power_w):
    """What the measurement makes of questions about messages: the first is answered rightly.

    One that is asked before recognisers are loaded, or before WARM others, would take an hour.
    """
    left, done = iter(answers), []
    items = [SimpleNamespace(asks=kind) for kind in ("entity", "part", "other", "other")]
    slow = Answer("", "edge", (("edge", 0.0, 3600.0),))

    def private(item):
        is_warm = done.count("prepared") == 1 and done.count("other") == WARM
        done.append("asked" if item in items else "other")
        return SimpleNamespace(item=item, answer=next(left) if is_warm else slow, is_right=item is items[0])

    service = SimpleNamespace(
        link="lte",
        prepare=lambda others, progress: done.append("prepared"),
        items=lambda: items,
        others=lambda count: [SimpleNamespace(asks="other", place=place) for place in range(count)],
        private=private,
        leaked=lambda found: 0.25,
    )
    found = privacy(SimpleNamespace(service=service, asked=Asked(power_w=power_w), report=lambda *_: None))
    assert done == ["prepared", *["other"] * WARM, *["asked"] * len(items)]
    return found


def test_what_a_question_about_a_message_takes_by_hand():
    """Counted as requests are: two are answered at the edge in 100 ms, two in the cloud behind 50 ms of looking."""
    here = Answer("a", "edge", (("edge", 0.0, 0.1),), scores={"mean": 0.0})
    there = Answer(
        "b", "cloud", (("edge", 0.0, 0.05), ("cloud", 0.05, 0.3)), wanted_cloud=True, sent_bytes=900,
        received_bytes=300, read=120, written=20,
    )  # fmt: skip
    answers = [here, there, there, here]
    found = asked_about(answers, 4.0)
    assert (found["leaked_share"], found["private_right"], found["private_cloud_share"]) == (0.25, 0.25, 0.5)
    assert found["private_ms_p50"] == pytest.approx(200)
    assert found["private_ms_p95"] == pytest.approx(300)
    assert (found["private_sent_bytes"], found["private_received_bytes"]) == (450, 150)
    assert found["private_edge_j"] == pytest.approx(4.0 * 0.075)
    known = prices()
    cloud = 2 * (120 * known.cloud_input + 20 * known.cloud_output) / 1e6
    whole = cloud + 2400 / 1e9 * known.data["lte"] + 1.2 / 3.6e6 * known.electricity
    assert found["private_usd_per_1k"] == pytest.approx(250 * whole)
    said = json.loads(found["private"])
    assert said["right_by_kind"] == {"entity": 1, "part": 0, "other": 0} and said["items"] == 4
    assert said["ms"] == [100, 300, 300, 100] and said["edge_ms"] == [100, 50, 50, 100]
    assert set(found) == set(measurements()["privacy"].fields)
    without = asked_about(answers, None)
    assert without["private_edge_j"] is None
    assert 0 < found["private_usd_per_1k"] - without["private_usd_per_1k"] < 1e-3  # electricity


def test_prices_are_per_million_tokens_gigabyte_and_kilowatt_hour():
    made = Prices(1.0, 3.0, 0.2, {"lte": 2.0})
    assert made.of(read=1_000_000, written=500_000) == pytest.approx(2.5)
    assert made.of(n_bytes=10**9, link="lte") == 2.0
    assert made.of(n_bytes=10**9, link="wifi") == 0.0
    assert made.of(joules=3.6e6) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("none @ cascade:share=1.5", "share=1.5 is outside 0 to 1"),
        ("none @ cascade:threshold=1,accuracy=0.5", "give one"),
        ("none @ speculative:draft=0", "should be 1 to 16 tokens"),
        ("none @ split:cut=-1", "should be at least 0"),
        ("none @ cloud:deadline_s=0", "should be above 0"),
        ("none @ cloud:cloud=(none @ cascade:cloud=(none))", "runs on one device"),
    ],
)
def test_deployments_that_cannot_be(text, said):
    with pytest.raises(RecipeError, match=said):
        parse(text)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with copies of the prices and messages, which is read in place of data/."""
    shutil.copy(assets.data_dir() / "prices.csv", tmp_path)
    (tmp_path / "privacy").mkdir()
    shutil.copy(assets.data_dir() / "privacy" / "prompts.jsonl", tmp_path / "privacy")
    for module in (hybrid, price_table):
        monkeypatch.setattr(module, "data_dir", lambda: tmp_path)
    return tmp_path


PRICED, PRIVATE = (CloudAlone(), Cascade(), Speculative(), Split()), Redact()


def test_other_prices_ask_again_what_has_a_price(data):
    file = data / "prices.csv"
    before = [one.reads() for one in (*PRICED, PRIVATE)]
    said = file.read_text()
    file.write_text(said.replace("as listed by", "as told by"))  # a source is no price
    assert [one.reads() for one in (*PRICED, PRIVATE)] == before
    file.write_text(said.replace("cloud_output,0.22", "cloud_output,0.44"))
    assert all(one.reads() != known for one, known in zip((*PRICED, PRIVATE), before, strict=True))
    assert recipes.reads(PRICED[0]) != before[0]  # as a question asks


def test_other_messages_ask_again_what_is_asked_about_them(data):
    file = data / "privacy" / "prompts.jsonl"
    before = [one.reads() for one in (*PRICED, PRIVATE)]
    file.write_text(file.read_text().partition("\n")[2])
    assert [one.reads() for one in PRICED] == before[:-1]
    assert PRIVATE.reads() != before[-1]


@pytest.mark.embedded
def test_an_answer_has_room_for_the_longest_entity():
    tokenizer = load_tokenizer(resolve("embedded"))
    lengths = [
        len(tokenizer.encode(f" {item.answer}", add_special_tokens=False))
        for item in prompts.load("held_out")
    ]
    assert max(lengths) + 4 <= TOKENS


@pytest.fixture
def apart(tiny):
    """`apart(deployment, seed)`: what answers, over the tiny model at the edge and in a cloud with its own process."""
    opened = []

    def make(deployment, seed=0):
        source = resolve(str(tiny))
        folder = variants.build(parse("none"), source, 0, lambda done, total: None)
        opened.append(start(deployment, folder, load_tokenizer(source), str(tiny), seed))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture
def made(cloud_here, apart):
    """The same with the cloud in this process."""
    return apart


REQUESTS = [
    Request(f"Once upon a time {word} there was a", "x", 8) for word in ("long", "ago", "here", "now")
]


def test_the_cloud_says_what_the_edge_says_where_both_have_the_same_weights(made):
    """Whichever way: all in the cloud, drafted and verified, or the second half of the layers there."""
    alone = made(parse("none").deployment)
    assert isinstance(alone, Edge)
    texts = [alone.answer(one).text for one in REQUESTS]
    for deployment in (
        CloudAlone(link="ethernet"),
        Speculative(link="ethernet", draft=3),
        Split(link="ethernet", cut=1, wire="float32"),
    ):
        service = made(deployment)
        answers = [service.answer(one) for one in REQUESTS]
        assert [one.text for one in answers] == texts, deployment
        assert all(one.by == "cloud" and one.sent_bytes > 0 and one.received_bytes > 0 for one in answers)
        assert all(one.seconds >= one.edge_s for one in answers)
        passed = service.remote.proxy.traffic
        assert passed.up == sum(one.sent_bytes for one in answers)


@pytest.mark.parametrize("deployment", [parse("none").deployment, CloudAlone(link="ethernet")])
def test_an_answer_ends_where_its_request_stops_it(made, deployment):
    service = made(deployment)
    whole = service.answer(REQUESTS[0])
    stop = whole.text[3]
    ended = service.answer(dataclasses.replace(REQUESTS[0], stop=stop))
    assert ended.text == whole.text.partition(stop)[0]
    assert ended.tokens < whole.tokens


@pytest.mark.parametrize("wire", ["float16", "int8", "int4"])
def test_states_travel_in_fewer_bytes(made, wire):
    service = made(Split(link="ethernet", cut=1, wire=wire))
    answer = service.answer(REQUESTS[0])
    assert answer.by == "cloud"
    assert answer.tokens == REQUESTS[0].tokens
    states = answer.read + answer.tokens - 1
    assert answer.sent_bytes > states * payload_bytes(64, wire)
    assert answer.sent_bytes < states * payload_bytes(64, wire) + 600 * answer.tokens  # the heads of messages


def test_a_cascade_sends_the_share_that_it_was_asked_for_where_scores_are_lowest(made):
    service = made(Cascade(link="ethernet", share=0.5, score="mean"))
    service.prepare(REQUESTS, lambda done, total: None)
    answers = [service.answer(one) for one in REQUESTS]
    sent = [one.by == "cloud" for one in answers]
    scores = [one.scores["mean"] for one in answers]
    assert sum(sent) == 2
    assert max(score for score, gone in zip(scores, sent, strict=True) if gone) <= min(
        score for score, gone in zip(scores, sent, strict=True) if not gone
    )
    account = json.loads(json.dumps(service.account()))
    assert account["score"] == "mean"
    assert account["threshold"] == service.threshold


@pytest.mark.parametrize("deployment", [CloudAlone, Speculative, Cascade])
def test_a_cloud_that_is_gone_costs_no_request_its_answer(apart, deployment):
    settings = {"threshold": 1e9} if deployment is Cascade else {}
    service = apart(deployment(link="ethernet", deadline_s=5, **settings))
    first = service.answer(REQUESTS[0])
    service.remote.server.process.kill()
    later = [service.answer(one) for one in REQUESTS * 2]
    texts = [service.edge.answer(one).text for one in REQUESTS * 2]
    assert first.by == "cloud"
    assert [one.text for one in later] == texts
    assert all(one.by == "edge" and one.wanted_cloud and one.said for one in later)
    assert "is not asked" in later[-1].said  # the breaker is open


def test_what_a_policy_lets_out(made, monkeypatch):
    """Nothing, what is harmless, placeholders, or everything; the edge answers the rest."""
    monkeypatch.setenv("EDGELAB_FAST", "1")
    service, leaked, cloud = made(Redact(link="ethernet")), {}, {}
    for policy in ("edge", "local", "redact", "cloud"):
        service.settings = dataclasses.replace(service.settings, policy=policy)
        items = service.items()
        found = [service.private(item) for item in items]
        leaked[policy] = service.leaked(found)
        cloud[policy] = [one.answer.by == "cloud" for one in found]
        assert all(one.sent is None for one in found) == (policy == "edge")
    holds = [bool(item.entities) for item in items]
    assert any(holds) and not all(holds)
    assert leaked == {"edge": 0, "local": 0, "redact": 0, "cloud": 1}
    assert not any(cloud["edge"])
    assert cloud["local"] == [not one for one in holds]
    assert all(cloud["redact"]) and all(cloud["cloud"])


def test_a_policy_is_measured_with_what_it_takes(made, monkeypatch):
    """The bytes of the proxy over all questions, and joules only of seconds in which the edge computed."""
    monkeypatch.setenv("EDGELAB_FAST", "1")
    service, answers = made(Redact(link="ethernet")), []
    ask = service.private

    def asked(item):
        answers.append(ask(item).answer)
        return SimpleNamespace(item=item, answer=answers[-1], sent=None, is_right=False)

    monkeypatch.setattr(service, "private", asked)
    found = privacy(SimpleNamespace(service=service, asked=Asked(power_w=5.0), report=lambda *_: None))
    each, passed = json.loads(found["private"]), service.remote.proxy.traffic
    others = answers[:WARM]
    assert len(each["ms"]) == len(each["edge_ms"]) == each["items"] == len(service.items())
    for passing, name in ((passed.up, "sent_bytes"), (passed.down, "received_bytes")):
        before = sum(getattr(one, name) for one in others)
        assert found[f"private_{name}"] * each["items"] == pytest.approx(passing - before)
        assert before > 0
    assert 0 < found["private_ms_p50"] <= found["private_ms_p95"]
    assert found["private_edge_j"] == pytest.approx(5e-3 * np.mean(each["edge_ms"]), abs=1e-3)
    assert found["private_usd_per_1k"] > 0


def test_a_policy_holds_for_any_prompt(made, monkeypatch):
    """The whole prompt is under it, and what was redacted is put back into the answer."""
    service, asked = made(Redact(link="ethernet")), []
    complete = service.remote.cloud.complete

    def answered(ids, *given, **settings):
        asked.append(service.edge.text(ids))
        return dataclasses.replace(complete(ids, *given, **settings), text=" to [EMAIL_1], not [EMAIL_2]")

    monkeypatch.setattr(service.remote.cloud, "complete", answered)
    plain, private = "Once upon a time", "Write it to ada@example.com today, or"
    placed, back = "Write it to [EMAIL_1] today, or", " to ada@example.com, not [EMAIL_2]"
    for policy, sent, text in (
        ("edge", [], None),
        ("local", [plain], None),
        ("redact", [plain, placed], back),
        ("cloud", [plain, private], " to [EMAIL_1], not [EMAIL_2]"),
    ):
        service.settings = dataclasses.replace(service.settings, policy=policy)
        asked.clear()
        answers = [service.answer(Request(prompt, "", 4)) for prompt in (plain, private)]
        assert asked == sent
        assert [one.by for one in answers].count("cloud") == len(sent)
        assert [one.sent_bytes > 0 for one in answers] == [plain in sent, text is not None]
        if text is None:
            assert answers[1].text == service.edge.answer(Request(private, "", 4)).text
        else:
            assert answers[1].text == text
        assert answers[1].edge_s > 0  # it looked


def losing(monkeypatch, cloud, method, working):
    """Let the answers to a method of the client be lost, all but the first few."""
    ask, calls = getattr(cloud, method), itertools.count()

    def lost(*given, **settings):
        found = ask(*given, **settings)
        if next(calls) >= working:
            raise CloudDown("The answer was lost.")
        return found

    monkeypatch.setattr(cloud, method, lost)


@pytest.mark.parametrize(
    ("deployment", "method", "working"),
    [
        (CloudAlone(link="ethernet"), "complete", 0),
        (Cascade(link="ethernet", threshold=1e9), "complete", 0),
        (Speculative(link="ethernet", draft=1), "verify", 2),
        (Split(link="ethernet", cut=1), "hidden", 2),
    ],
)
def test_what_travelled_in_vain_counts(made, monkeypatch, deployment, method, working):
    service = made(deployment)
    losing(monkeypatch, service.remote.cloud, method, working)
    answer = service.answer(REQUESTS[0])
    assert answer.by == ("nobody" if method == "hidden" else "edge")
    assert answer.said == "The answer was lost."
    assert answer.sent_bytes == service.remote.proxy.traffic.up > 0
    assert answer.received_bytes == service.remote.proxy.traffic.down > 0


def test_what_travelled_for_a_message_counts_answered_or_not(made, monkeypatch):
    service = made(Redact(link="ethernet", policy="cloud"))
    item, passed = service.items()[0], service.remote.proxy.traffic
    found = service.private(item).answer
    assert (found.by, found.sent_bytes, found.received_bytes) == ("cloud", passed.up, passed.down)
    losing(monkeypatch, service.remote.cloud, "complete", 0)
    lost = service.private(item).answer
    assert lost.by == "edge"
    assert found.sent_bytes + lost.sent_bytes == passed.up > found.sent_bytes
    assert found.received_bytes + lost.received_bytes == passed.down > found.received_bytes


def test_a_seed_fixes_what_is_sampled(made):
    one, other = (made(Speculative(link="ethernet", draft=3, temperature=1.0), seed) for seed in (1, 2))
    request = dataclasses.replace(REQUESTS[0], tokens=16)
    first, again, different = (service.answer(request) for service in (one, one, other))
    assert {first.by, again.by, different.by} == {"cloud"}
    assert first.text == again.text != different.text


def test_a_deadline_is_that_of_all_rounds_together(made, monkeypatch):
    """Each round takes less than the deadline, and all of them more: the edge writes alone."""
    service = made(Speculative(link="ethernet", draft=1, deadline_s=1.0))
    ask = service.remote.cloud.verify

    def slowly(*given, **settings):
        time.sleep(0.4)
        return ask(*given, **settings)

    monkeypatch.setattr(service.remote.cloud, "verify", slowly)
    answer = service.answer(dataclasses.replace(REQUESTS[0], tokens=30))
    assert (answer.by, answer.wanted_cloud) == ("edge", True)
    assert "too little to ask the cloud" in answer.said


def test_half_a_model_answers_nothing_without_the_other_half(apart):
    service = apart(Split(link="ethernet", cut=1))
    assert service.answer(REQUESTS[0]).by == "cloud"
    service.remote.server.process.kill()
    answer = service.answer(REQUESTS[0])
    assert (answer.by, answer.text) == ("nobody", "")
    assert answer.said
    assert (answer.read, answer.written) == (0, 0)  # nobody is billed for what no cloud read


def test_the_same_deployment_is_the_same_text():
    text = "none @ cascade:cloud=(quantize.rtn:bits=4 @ llamacpp),link=wifi,share=0.1"
    again = recipes.parse(str(recipes.parse(text)))
    assert str(again) == str(recipes.parse(text))
    assert again.deployment.cloud.runtime == "llamacpp"
