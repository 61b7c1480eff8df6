"""Ways of sharing work over saved rows, and a deployment that is asked live, cut off from its cloud, and stopped."""

import json
import re
import subprocess
import sys
import time

import psutil
import pytest
from filelock import FileLock

from edgelab import assets, ledger
from edgelab.deployments.hybrid.answering import Answer
from edgelab.lab import requests
from edgelab.ledger import Row
from edgelab.rows import NotMeasured
from edgelab.widgets.hybrid import answer_words, cloud_trip, live_request

SECONDS = 180  # more than anything here takes, on a busy machine
REAL = assets.home() / "assets"  # before a test has a home of its own
EDGE = "prune.layers:drop=13/14/15"
SCORES = {"margin": [0.9, 0.1, 0.5, 0.3], "mean": [-0.1, -0.2, -0.3, -0.4]}


def of_requests(runtime, right, sent, ms, edge_ms, weights=EDGE, **more):
    """A row of four requests."""
    link = more.pop("link", "wifi")
    each = {
        "scores": more.pop("scores", {}),
        "sent": sent,
        "ms": ms,
        "edge_ms": edge_ms,
        **more.pop("each", {}),
    }
    fields = {
        "sent_bytes_per_request": 1000.0, "received_bytes_per_request": 500.0, "usd_per_1k_requests": 0.02,
        "edge_j_per_request": 0.0, **more,
    }  # fmt: skip
    if "1" not in sent:
        fields |= {
            "sent_bytes_per_request": 0.0,
            "received_bytes_per_request": 0.0,
            "usd_per_1k_requests": 0.001,
        }
        fields["edge_j_per_request"] = 0.7
    return Row(
        f"{weights} @ {runtime}", runtime=runtime, link=link, requests=right.count("1") / 4, requests_items=4,
        requests_right=right, served=json.dumps(each), host="here", threads=1, **fields,
    )  # fmt: skip


def drafted(draft):
    runtime = f"speculative:cloud=(none),link=wifi,draft={draft}"
    return of_requests(runtime, "1100", "1111", [10.0 * draft] * 4, [5.0] * 4, each={"rounds": 14})


def policy(name, leaked, right, ms, share):
    runtime = f"redact:cloud=(none),link=wifi,policy={name}"
    return Row(
        f"{EDGE} @ {runtime}", runtime=runtime, leaked_share=leaked, private_right=right, private_ms_p50=ms,
        private_cloud_share=share, host="here", threads=1,
    )  # fmt: skip


@pytest.fixture
def rows():
    own = [100.0, 200.0, 100.0, 300.0]
    return [
        of_requests("cascade:cloud=(none),link=wifi,share=0.0", "1001", "0000", own, own, scores=SCORES),
        of_requests("cloud:cloud=(none),link=wifi", "1100", "1111", [50.0, 80.0, 60.0, 70.0], [0.0] * 4),
        of_requests("cascade:cloud=(none),link=wifi", "1101", "0100", [100.0, 285.0, 100.0, 300.0], own,
                    scores=SCORES),
        *map(drafted, (2, 12, 4)),
        of_requests("split:link=wifi,cut=5", "1110", "1111", [400.0] * 4, [100.0] * 4, weights="none"),
        policy("edge", 0.0, 0.25, 90.0, 0.0),
        policy("redact", 0.1, 0.5, 150.0, 1.0),
        policy("cloud", 1.0, 0.75, 140.0, 1.0),
    ]  # fmt: skip


def walk(box):
    yield box
    for child in getattr(box, "children", ()):
        yield from walk(child)


def control(box, description):
    (found,) = [one for one in walk(box) if getattr(one, "description", "") == description]
    return found


def cells(box):
    """The table as text: its lines by their heads."""
    lines = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", box.children[-2].value)
    return {head: re.findall(r"<t[dh][^>]*>(?:<b>)?(.*?)(?:</b>)?</t[dh]>", rest) for head, rest in lines}


def test_a_threshold_moves_along_the_curve(rows):
    box = cloud_trip(ledger.frame(rows))
    slider = control(box, "Threshold")
    slider.value = 0.4
    found = cells(box)
    assert found[""] == ["edge only", "cascade", "cloud only"]
    assert found["Right answers"] == ["50.0%", "50.0%", "50.0%"]
    assert found["Answered by the cloud"] == ["0%", "50%", "100%"]
    assert found["Time, median (ms)"] == ["150", "190", "65"]
    assert found["Sent to the cloud (bytes)"] == ["0", "500", "1,000"]
    assert found["1,000 requests (USD)"] == ["0.0010", "0.0110", "0.0200"]
    assert found["Energy at the edge (J)"] == ["0.70", "0.70", "0.00"]
    assert found["Personal data that leaves"] == ["0%", "–", "100%"]
    assert found["Times"] == ["measured", "from both rows", "measured"]
    assert "50% of the requests have a score below 0.400 and go to the cloud" in box.children[-2].value
    before = box.children[-1].value
    slider.value = 0.2
    assert cells(box)["Right answers"][1] == "75.0%" and "25 % go to the cloud" in box.children[-1].value
    assert box.children[-1].value != before
    slider.value = slider.min
    assert cells(box)["Answered by the cloud"][1] == "0%"
    slider.value = slider.max
    assert cells(box)["Answered by the cloud"][1] == "100%"


def test_another_score_has_a_slider_of_its_own(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Doubt by").value = "mean"
    slider = control(box, "Threshold")
    assert slider.min <= -0.4 <= slider.value <= -0.1 < slider.max
    slider.value = -0.25
    assert cells(box)["Right answers"][1] == "25.0%"  # the last two are sent, and the cloud gets both wrong


def test_another_link_is_predicted_and_says_so(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Threshold").value = 0.4
    assert control(box, "Link").value == "wifi"  # the one that was measured
    control(box, "Link").value = "lte"
    found = cells(box)
    assert found["Times"] == ["measured", "from both rows, link predicted", "predicted"]
    assert found["Time, median (ms)"] == ["150", "224", "133"]  # 68.3 ms more for what is sent
    control(box, "Way").value = "drafting"
    assert cells(box)["Times"][1] == "predicted"
    two = of_requests("cloud:cloud=(none),link=lte", "1100", "1111", [200.0] * 4, [0.0] * 4, link="lte")
    box = cloud_trip(ledger.frame([*rows, two]))
    control(box, "Link").value = "lte"
    assert cells(box)["Times"] == ["measured", "from both rows", "measured"]
    assert cells(box)["Time, median (ms)"][2] == "200"


def test_drafts_splits_and_ends_have_their_rows(rows):
    box = cloud_trip(ledger.frame(rows))
    way, which = control(box, "Way"), control(box, "Which")
    assert way.options == ("edge only", "cloud only", "cascade", "drafting", "split", "redact")
    assert which.layout.display == "none"
    way.value = "drafting"
    assert which.options == ("2 tokens", "4 tokens", "12 tokens") and which.layout.display is None
    assert control(box, "Threshold").layout.display == "none"
    which.value = "12 tokens"
    assert cells(box)["Time, median (ms)"] == ["150", "120", "65"]
    way.value = "split"
    assert which.options == ("baseline behind layer 5, float16 states",)
    assert cells(box)["Right answers"][1] == "75.0%"
    assert "from which a prompt can be read" in box.children[-2].value
    way.value = "cloud only"
    assert cells(box)[""] == ["edge only", "cloud only"]
    assert 'data-share="1.000000"' in box.children[-2].value


def test_policies_are_beside_theirs_and_not_predicted(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Way").value = "redact"
    control(box, "Which").value = "redact"
    found = cells(box)
    assert found[""] == ["edge only", "policy redact", "cloud only"]
    assert found["Personal data that leaves"] == ["0%", "10%", "100%"]
    assert found["Right answers"] == ["25.0%", "50.0%", "75.0%"]
    assert found["Time, median (ms)"] == ["90", "150", "140"] and "Time, 95 % (ms)" not in found
    assert control(box, "Which").options == ("redact",)  # the others are beside it
    control(box, "Link").value = "lte"
    assert cells(box)["Time, median (ms)"] == ["90", "–", "–"]
    assert cells(box)["Times"] == ["measured", "measured over wifi only", "measured over wifi only"]
    assert box.children[-1].value == ""


def test_the_edge_that_most_was_measured_with_comes_first(rows):
    other = of_requests(
        "torch", "1111", "0000", [10.0] * 4, [10.0] * 4, weights="none", scores=SCORES, link=None
    )
    box = cloud_trip(ledger.frame([other, *rows]))
    edge = control(box, "Edge")
    assert (edge.value, edge.layout.display) == (EDGE, None) and control(
        box, "Cloud"
    ).layout.display == "none"
    assert cells(box)["Right answers"][0] == "50.0%"
    edge.value = "none"
    assert cells(box)["Right answers"][0] == "100.0%"
    assert control(box, "Way").options == ("edge only", "cloud only", "cascade", "split")


def test_ways_without_rows_are_not_offered(rows):
    box = cloud_trip(ledger.frame(rows[:2]))
    assert control(box, "Way").options == ("edge only", "cloud only", "cascade")
    assert "Personal data that leaves" not in cells(box)


@pytest.mark.parametrize(("kept", "said"), [(slice(1, 2), "the edge alone"), (slice(0, 1), "the cloud alone"),
                                            (slice(0, 0), "the edge alone")])  # fmt: skip
def test_what_has_to_be_measured_first(rows, kept, said):
    with pytest.raises(NotMeasured, match=f"has {said}: measure"):
        cloud_trip(ledger.frame(rows[kept]))


def test_rows_of_other_requests_are_one_sentence(rows):
    short = of_requests("cloud:cloud=(none),link=wifi", "110", "111", [50.0, 80.0, 60.0], [0.0] * 3)
    box = cloud_trip(ledger.frame([rows[0], short]))
    assert "should be of the same items" in box.children[-2].value and box.children[-1].value == ""


def test_times_of_two_machines_make_no_sum(rows):
    rows[1].host = "elsewhere"
    with pytest.raises(NotMeasured, match="the cloud alone"):
        cloud_trip(ledger.frame(rows))


def test_saved_rows_are_shown_without_torch(rows, tmp_path):
    ledger.frame(rows).to_pickle(tmp_path / "rows.pickle")
    code = (
        "import sys, pandas\nfrom edgelab.widgets.hybrid import cloud_trip, live_request\n"
        "cloud_trip(pandas.read_pickle('rows.pickle'))\nlive_request()\n"
        "found = {'torch', 'transformers', 'datasets'} & sys.modules.keys()\nsys.exit(str(found) if found else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# Live


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


def by(box):
    return re.search(r'data-by="(\w+)"', box.children[3].value)[1]


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of timings, for this test alone: nothing is timed here."""
    found = FileLock(tmp_path / "timing.lock")
    monkeypatch.setattr(requests, "timing_lock", lambda: FileLock(found.lock_file))
    return found


@pytest.fixture
def live(tiny, home, lock):
    """`live(recipe, ...)`: the widget over the tiny model, with the embedded texts; closed when the test is over."""
    home.mkdir(exist_ok=True)
    (home / "assets").symlink_to(REAL)
    made = []

    def make(recipe, **settings):
        made.append(live_request(recipe, tokens=4, model=str(tiny), **settings))
        return made[-1]

    yield make
    for box in made:
        box.close()
        until(lambda box=box: control(box, "Stop").disabled and not control(box, "Ask").disabled)


def test_it_answers_is_cut_off_plugged_in_and_stopped(live):
    before = set(psutil.Process().children(recursive=True))
    box = live("none @ cloud:cloud=(none),link=ethernet,deadline_s=8")
    ask, stop, cut = control(box, "Ask"), control(box, "Stop"), control(box, "Unplug the cloud")
    said = box.children[2]
    assert stop.disabled and not box.children[4].value
    ask.click()
    assert ask.disabled and not stop.disabled and said.value
    until(lambda: not ask.disabled)
    assert said.value.startswith("Ready"), said.value
    assert by(box) == "cloud" and "1: cloud" in box.children[4].value
    cut.value = True
    assert cut.description == "Plug the cloud in"
    ask.click()
    until(lambda: not ask.disabled)
    assert by(box) == "edge" and "did not answer within" in box.children[3].value
    assert "1: cloud, 2: edge" in box.children[4].value
    cut.value = False
    ask.click()
    until(lambda: not ask.disabled)
    assert by(box) == "cloud" and "1: cloud, 2: edge, 3: cloud" in box.children[4].value
    box.close()
    until(lambda: said.value.startswith("Stopped."))
    assert not ask.disabled and stop.disabled
    left = set(psutil.Process().children(recursive=True)) - before
    assert not [one for one in left if "serving" in " ".join(one.cmdline())]


def test_a_stop_in_an_outage_does_not_wait_for_the_deadline(live):
    box = live("none @ cloud:cloud=(none),link=ethernet,deadline_s=10000")
    ask, stop, cut = control(box, "Ask"), control(box, "Stop"), control(box, "Unplug the cloud")
    cut.value = True  # before anything runs
    ask.click()
    until(lambda: box.children[2].value.startswith("Answering"))
    stop.click()
    until(lambda: not ask.disabled)
    assert box.children[2].value.startswith("Stopped.") and not box.children[3].value


def test_a_cascade_chooses_its_threshold_first(live):
    said, recipe = [], "none @ cascade:cloud=(none),link=ethernet,share=1.0"
    box = live(recipe)
    box.children[2].observe(lambda change: said.append(change["new"]), "value")
    control(box, "Ask").click()
    until(lambda: not control(box, "Ask").disabled)
    assert by(box) == "cloud" and "margin" in box.children[3].value
    assert "Choosing when to ask the cloud, request 16 of 16 …" in said


def test_it_waits_while_something_else_is_timed_and_can_be_stopped_then(live, lock):
    box = live("none")
    with lock:
        control(box, "Ask").click()
        until(lambda: box.children[2].value.startswith("Waiting until nothing else is timed"))
        control(box, "Stop").click()
        until(lambda: not control(box, "Ask").disabled)
    assert box.children[2].value.startswith("Stopped.") and not box.children[3].value


def test_an_edge_alone_has_no_cloud_to_unplug_and_ends_when_nobody_asks(live):
    box = live("none", idle_s=1)
    ask = control(box, "Ask")
    control(box, "Unplug the cloud").value = True
    ask.click()
    until(lambda: box.children[2].value.startswith("Nothing was asked for 1 s."))
    assert by(box) == "edge" and not ask.disabled


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("none @ cascade:link=moon", "No link is called"),
        ("none @ redact", "messages with personal data in them"),
        ("none @ cloud:deadline_s=0", "should be above 0"),
    ],
)
def test_what_cannot_run_is_one_sentence(live, recipe, said):
    box = live(recipe)
    ask = control(box, "Ask")
    ask.click()
    until(lambda: not ask.disabled)
    assert said in box.children[2].value and control(box, "Stop").disabled
    control(box, "Stop").click()  # nothing runs: nothing happens


def test_an_empty_prompt_starts_nothing():
    box = live_request()
    control(box, "Prompt").value = " "
    control(box, "Ask").click()
    assert not control(box, "Ask").disabled and box.children[2].value == ""


def test_words_say_who_and_escape_what_was_written():
    spans = (("edge", 0.0, 0.1), ("waiting", 0.1, 1.0))
    lost = Answer(" <b>", "edge", spans, scores={"margin": 0.5}, wanted_cloud=True, said="It is gone.")
    found = answer_words("a & b", lost)
    assert "a &amp; b<b> &lt;b&gt;</b>" in found and "for want of the cloud in 1,000 ms" in found
    assert "margin 0.50" in found and "It is gone." in found and 'data-ms="1000.0"' in found
