"""The circuit breaker on a clock of the test: when it opens, whom it lets try, and when it closes."""

import threading

import pytest

from edgelab.deployments.hybrid.client.breaker import CircuitBreaker
from edgelab.deployments.hybrid.client.failures import (
    CircuitOpen,
    CloudDown,
    CloudGarbled,
    CloudRefused,
    CloudSlow,
    TooLate,
)
from edgelab.errors import EdgeLabError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def fails(error=CloudDown):
    def ask():
        raise error("It failed.")

    return ask


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return CircuitBreaker(failures=3, cool_down_s=10, clock=clock)


def trip(breaker, times=3):
    for _ in range(times):
        with pytest.raises(CloudDown):
            breaker.call(fails())


def test_it_opens_after_failures_in_a_row(breaker):
    trip(breaker, 2)
    assert breaker.call(lambda: 5) == 5  # which begins a new row
    trip(breaker, 2)
    assert breaker.state == "closed"
    trip(breaker, 1)
    assert breaker.state == "open"
    with pytest.raises(CircuitOpen, match="failed at least 3 times in a row and is not asked; 10 s after"):
        breaker.call(lambda: pytest.fail("nothing goes through"))


def test_one_trial_after_the_cool_down(breaker, clock):
    trip(breaker)
    clock.now += 9.9
    with pytest.raises(CircuitOpen):
        breaker.enter()
    clock.now += 0.2
    assert breaker.state == "trial"
    breaker.enter()
    with pytest.raises(CircuitOpen):  # a second one is none
        breaker.enter()
    breaker.worked()
    assert breaker.state == "closed"
    trip(breaker, 2)
    assert breaker.state == "closed"


def test_a_trial_that_fails_opens_it_for_as_long_again(breaker, clock):
    trip(breaker)
    clock.now += 11
    trip(breaker, 1)
    assert breaker.state == "open"
    clock.now += 9
    with pytest.raises(CircuitOpen):
        breaker.enter()
    clock.now += 2
    assert breaker.call(lambda: "again") == "again"


def test_a_refusal_is_an_answer(breaker, clock):
    trip(breaker, 2)
    with pytest.raises(CloudRefused):
        breaker.call(lambda: (_ for _ in ()).throw(CloudRefused("Too long.", 400)))
    trip(breaker, 2)
    assert breaker.state == "closed"
    for error in (CloudSlow, CloudGarbled):
        breaker.worked()
        for _ in range(3):
            with pytest.raises(error):
                breaker.call(fails(error))
        assert breaker.state == "open"


def test_all_that_are_not_let_through_are_told_the_same(breaker, clock):
    """Whenever they come, also behind a trial that failed and while another is under way: a row sums sentences up."""
    trip(breaker)
    said = set()
    for seconds, then in (
        (1, None),
        (3.5, None),
        (7, lambda: trip(breaker, 1)),
        (2, None),
        (9, breaker.enter),
    ):
        clock.now += seconds
        if then is not None:
            then()
        with pytest.raises(CircuitOpen) as raised:
            breaker.enter()
        said.add(str(raised.value))
    assert len(said) == 1


def test_a_call_that_came_too_late_to_ask_says_nothing_about_the_cloud(breaker, clock):
    """It neither opens the breaker, nor ends a row of failures, nor closes it as a trial that it was not."""
    for _ in range(5):
        with pytest.raises(TooLate):
            breaker.call(fails(TooLate))
    assert breaker.state == "closed"
    trip(breaker, 2)
    with pytest.raises(TooLate):
        breaker.call(fails(TooLate))
    trip(breaker, 1)
    assert breaker.state == "open"
    clock.now += 11
    with pytest.raises(TooLate):
        breaker.call(fails(TooLate))
    assert breaker.state == "trial"
    assert breaker.call(lambda: 5) == 5
    assert breaker.state == "closed"


def test_an_interrupted_trial_ends_it(breaker, clock):
    trip(breaker)
    clock.now += 11
    with pytest.raises(KeyboardInterrupt):
        breaker.call(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    clock.now += 11
    assert breaker.call(lambda: 1) == 1


def test_a_breaker_that_would_never_close():
    for change in ({"failures": 0}, {"cool_down_s": -1}, {"cool_down_s": float("nan")}):
        with pytest.raises(EdgeLabError, match=next(iter(change))):
            CircuitBreaker(**change)


def test_a_lone_trial_among_many_threads(breaker, clock):
    trip(breaker)
    clock.now += 11
    start, entered = threading.Barrier(20), []

    def enter():
        start.wait()
        try:
            breaker.enter()
            entered.append(1)
        except CircuitOpen:
            pass

    threads = [threading.Thread(target=enter) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1
