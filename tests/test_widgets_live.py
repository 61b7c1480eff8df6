"""Measuring live without a browser: progress, estimates, stopping, and what can be pressed meanwhile."""

import threading
import time
from pathlib import Path

import ipywidgets
import psutil
import pytest

from edgelab import lab, ledger
from edgelab.lab.plan import Step
from edgelab.ledger import Row
from edgelab.measure.isolation import Isolated, IsolatedError, Stop, Stopped
from edgelab.widgets.live import Live, _Told, about

RTN4 = "quantize.rtn:bits=4,group_size=32"
SECONDS = 60  # more than anything here takes, on a busy machine


def until(true):
    deadline = time.monotonic() + SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


@pytest.fixture
def control():
    return ipywidgets.Dropdown(options=["a", "b"])


@pytest.fixture
def corpus(tmp_path) -> str:
    file = tmp_path / "story.txt"
    file.write_text(
        "".join(f"Page {page}: the keeper counted {page * 7919 % 97} ships.\n" for page in range(300))
    )
    return str(file)


@pytest.fixture
def live(tiny, control, corpus):
    """Of a tiny model, and the lists of rows that it handed over."""
    got = []
    settings = {"model": str(tiny), "corpus": corpus, "only": "quality", "windows": 2, "threads": 1}
    made = Live(lambda: ["none", RTN4], got.append, [control], **settings)
    made.got = got
    return made


# Measuring


def test_rows_are_measured_kept_and_handed_over(live, control):
    live.start.click()
    assert live.start.disabled and control.disabled and not live.stop.disabled
    assert live.bar.layout.visibility == "visible"
    live.start.click()  # does nothing
    until(lambda: not live.start.disabled)
    assert not control.disabled and live.stop.disabled and live.bar.layout.visibility == "hidden"
    (rows,) = live.got
    assert [row.recipe for row in rows] == ["none", RTN4] == [row.recipe for row in ledger.own()]
    assert all(row.ppl for row in rows) and live.said.value == ""


def test_the_callback_returns_at_once(live, monkeypatch):
    going = threading.Event()
    monkeypatch.setattr(lab, "planned", lambda *_, **__: going.wait(SECONDS) and [])
    live.start.click()
    assert live.said.value == "Planning …"
    going.set()
    until(lambda: not live.start.disabled)


def test_what_fails_is_one_sentence_and_the_next_press_works(live, monkeypatch):
    def planned(*_, **__):
        raise lab.MeasureError("none: <no> memory.")

    monkeypatch.setattr(lab, "planned", planned)
    live.start.click()
    until(lambda: not live.start.disabled)
    assert live.said.value == "none: &lt;no&gt; memory." and live.got == [[]]
    monkeypatch.undo()
    live.start.click()
    until(lambda: not live.start.disabled)
    assert len(live.got[1]) == 2


def test_a_row_that_fails_says_why_and_is_not_handed_over(live, monkeypatch):
    def follow(steps, show):
        yield steps[0], Row("none", ppl=20.0)
        yield steps[1], Row(RTN4, status="oom", error="The process was killed.")

    monkeypatch.setattr(lab, "planned", lambda *_, **__: [Step(None, place=place) for place in range(2)])
    monkeypatch.setattr(lab, "follow", follow)
    live.start.click()
    until(lambda: not live.start.disabled)
    assert live.said.value == f"{RTN4}: The process was killed."
    assert [row.recipe for row in live.got[0]] == ["none"]


# Stopping


def test_a_stop_kills_the_process_and_raises_in_its_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sleeper.py").write_text(
        "import time\nclass Sleeper:\n    def sleep(self):\n        time.sleep(1000)\n"
    )
    stop, seen = Stop(), {}

    def wait():
        with stop:
            try:
                with Isolated("sleeper:Sleeper", threads=1) as process:
                    process.wait()
                    seen["pid"] = process.pid
                    process.call("sleep")
            except Stopped as error:
                seen["raised"] = error

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: "pid" in seen)
    assert psutil.pid_exists(seen["pid"])
    stop()
    thread.join(SECONDS)
    assert isinstance(seen["raised"], Stopped) and not psutil.pid_exists(seen["pid"])
    stop()  # too late to stop anything


def test_a_stop_is_for_its_own_thread_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("adder.py").write_text("class Adder:\n    def add(self, a, b):\n        return a + b\n")
    with Stop() as stop, Isolated("adder:Adder", threads=1) as mine:
        thread = threading.Thread(target=stop)
        with pytest.raises(Stopped):
            thread.start()
            thread.join()
            mine.call("add", a=1, b=2)
    with Isolated("adder:Adder", threads=1) as other:
        assert other.call("add", a=1, b=2) == 3
    assert not issubclass(Stopped, Exception | IsolatedError)  # or a road would take it for a failed row


def test_stopped_in_the_second_row_the_first_is_kept_and_the_next_press_goes_on(live, monkeypatch):
    follow, names = lab.follow, []

    def stopping(steps, show):
        def shown(name):
            names.append(name)
            if name == f"{RTN4}: logits" and names.count(name) == 1:
                live.stop.click()
            return show(name)

        return follow(steps, shown)

    monkeypatch.setattr(lab, "follow", stopping)
    live.start.click()
    until(lambda: not live.start.disabled)
    assert live.said.value == "Stopped. What had been measured is kept: 1 of 2 rows."
    assert [(row.recipe, row.status) for row in ledger.own()] == [("none", "ok")]
    assert [[row.recipe for row in rows] for rows in live.got] == [["none"]]
    live.start.click()
    until(lambda: not live.start.disabled)
    assert [(row.recipe, row.status) for row in ledger.own()] == [("none", "ok"), (RTN4, "ok")]
    assert names.count("none: logits") == 1 and [row.recipe for row in live.got[1]] == ["none", RTN4]


# Estimates


def test_the_estimate_is_that_of_the_plan_and_nothing_once_it_is_known(live):
    steps = lab.planned(live.asked(), interleave=False, **live.settings)
    seconds = sum(step.estimate_s for step in steps)
    assert lab.estimate_s(live.asked(), interleave=False, **live.settings) == pytest.approx(seconds)
    live.offer()
    assert live.said.value == f"Measuring it takes {about(seconds)}."
    live.start.click()
    until(lambda: not live.start.disabled)
    live.offer()
    assert live.said.value == ""


def test_without_the_model_nothing_is_fetched_for_an_estimate(control, monkeypatch):
    monkeypatch.setattr("edgelab.assets.fetch", lambda *_: pytest.fail("it fetches"))
    live = Live(lambda: ["none"], print, [control])
    live.offer()
    assert live.said.value == ""


@pytest.mark.parametrize(
    "seconds, text",
    [(2, "a few seconds"), (12, "about 10 s"), (61, "about 60 s"), (100, "about 2 min"), (9000, "about 2 h")],
)
def test_estimates_claim_no_more_than_is_known(seconds, text):
    assert about(seconds) == text


def test_the_line_says_step_part_and_times():
    steps = [Step(None, estimate_s=10), Step(None, row=Row("none")), Step(None, estimate_s=30)]
    told = _Told(steps, print)
    told.started = told.step_started = 100.0
    assert told._state(104) == ("Step 1 of 2. 4 s so far, about 35 s to go.", pytest.approx(4 / 40))
    told.show("quantize.rtn: logits")(3, 4)
    text = "Step 1 of 2, quantize.rtn: reading the text, 75%. 50 s so far, about 30 s to go."
    assert told._state(150) == (text, pytest.approx(9.5 / 40))  # it takes longer than was estimated
    told.next(steps[0])
    told.next(steps[1])
    told.step_started = 150.0
    assert told._state(160)[1] == pytest.approx(20 / 40) and "Step 2 of 2" in told._state(160)[0]
