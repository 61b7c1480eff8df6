"""A deployment that is asked live, cut off from its cloud, and stopped."""

import re

import psutil
import pytest
from filelock import FileLock

from edgelab import assets
from edgelab.deployments.hybrid.answering import Answer
from edgelab.lab import requests
from edgelab.widgets.live_request import answer_words, live_request
from tests.controls import control, until

REAL = assets.home() / "assets"  # before a test has a home of its own


def by(box):
    return re.search(r'data-by="(\w+)"', box.children[3].value)[1]


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """The lock of timings, for this test alone: nothing is timed here."""
    found = FileLock(tmp_path / "timing.lock")
    monkeypatch.setattr(requests, "timing_lock", lambda: FileLock(found.lock_file))
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A home with the embedded texts, whose weights the first test that asks for them makes."""
    found = tmp_path_factory.mktemp("home")
    (found / "assets").symlink_to(REAL)
    return found


@pytest.fixture
def live(tiny, kept, lock, monkeypatch):
    """`live(recipe, ...)`: the widget over the tiny model; closed when the test is over."""
    monkeypatch.setenv("EDGELAB_HOME", str(kept))
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
    box = live("none @ cloud:cloud=(none),link=ethernet,deadline_s=4")
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


def test_a_stop_in_an_outage_does_not_wait_for_the_deadline(live, cloud_here):
    box = live("none @ cloud:cloud=(none),link=ethernet,deadline_s=10000")
    ask, stop, cut = control(box, "Ask"), control(box, "Stop"), control(box, "Unplug the cloud")
    cut.value = True  # before anything runs
    ask.click()
    until(lambda: box.children[2].value.startswith("Answering"))
    stop.click()
    until(lambda: not ask.disabled)
    assert box.children[2].value.startswith("Stopped.") and not box.children[3].value


def test_a_cascade_chooses_its_threshold_first(live, cloud_here):
    said, recipe = [], "none @ cascade:cloud=(none),link=ethernet,share=1.0"
    box = live(recipe)
    box.children[2].observe(lambda change: said.append(change["new"]), "value")
    control(box, "Ask").click()
    until(lambda: not control(box, "Ask").disabled)
    assert by(box) == "cloud" and "margin" in box.children[3].value
    assert "Choosing when to ask the cloud, request 16 of 16 …" in said


def test_a_policy_holds_for_whatever_is_asked(live, cloud_here):
    pytest.importorskip("presidio_analyzer")
    box = live("none @ redact:cloud=(none),link=ethernet,policy=local")
    for prompt, who in (("Call 212-555-0142 and", "edge"), ("He called and", "cloud")):
        control(box, "Prompt").value = prompt
        control(box, "Ask").click()
        until(lambda: not control(box, "Ask").disabled)
        assert by(box) == who and prompt in box.children[3].value
        assert ("bytes sent" in box.children[3].value) == (who == "cloud")


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
