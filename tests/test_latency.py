"""The arithmetic of latency on made-up iterations, and sessions whose clock is scripted. Nothing here measures time."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab.measure import latency
from edgelab.measure.latency import Iteration, Latency, iterate, ratio, warm_up

MS = st.floats(0.1, 1000)
ITERATION = st.builds(Iteration, MS, st.lists(MS, min_size=1, max_size=4))


def test_iteration_by_hand():
    assert Iteration(100, [10, 20, 30]).decode_tok_s == pytest.approx(50)


def test_percentiles_by_hand():
    found = Latency(128, 3, [Iteration(100, [10, 20, 30]), Iteration(300, [40, 50, 60]), Iteration(160, [5, 5, 100])])
    assert found.ttft_ms_p50 == 160
    assert found.prefill_tok_s == pytest.approx(800)
    # all nine tokens: 5 5 10 20 30 40 50 60 100; the 95th percentile lies at position 7.6 of 0 to 8
    assert found.tpot_ms(50) == 30
    assert found.tpot_ms(95) == pytest.approx(60 + 0.6 * 40)
    assert found.decode_tok_s == pytest.approx(1000 / 30)
    assert found.seconds == pytest.approx((100 + 60 + 300 + 150 + 160 + 110) / 1000)


@pytest.mark.parametrize(("count", "ms", "enough"), [(10, 200, True), (9, 1000, False), (10, 199, False), (30, 67, True)])
def test_enough_is_ten_iterations_and_two_seconds(count, ms, enough):
    assert Latency(1, 1, [Iteration(ms / 2, [ms / 2])] * count).enough == enough


def test_ratio_of_constant_pairs_is_certain():
    slow, fast = Iteration(1, [20, 20]), Iteration(1, [10, 10])
    assert ratio([fast] * 4, [slow] * 4) == pytest.approx((2, 2, 2))


def test_ratio_by_hand():
    # Rates 2 and 8 times the baseline's: geometric mean 4. The logarithms spread by log(2) around log(4):
    # standard error log(2), Student's t of one degree of freedom 12.706205.
    found = ratio([Iteration(1, [10]), Iteration(1, [10])], [Iteration(1, [20]), Iteration(1, [80])])
    reach = math.exp(12.706205 * math.log(2))
    assert found == pytest.approx((4, 4 / reach, 4 * reach), rel=1e-5)


def test_one_pair_has_no_interval():
    mean, low, high = ratio([Iteration(1, [10])], [Iteration(1, [30])])
    assert mean == pytest.approx(3)
    assert math.isnan(low) and math.isnan(high)


@given(st.lists(st.tuples(ITERATION, ITERATION), min_size=2, max_size=6))
def test_ratio_turned_round_is_the_inverse(pairs):
    one, other = (list(side) for side in zip(*pairs, strict=True))
    mean, low, high = ratio(one, other)
    assert low <= mean * (1 + 1e-9) and mean <= high * (1 + 1e-9)
    assert ratio(other, one)[0] == pytest.approx(1 / mean)


def test_unpaired_iterations_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        ratio([Iteration(1, [1])], [Iteration(1, [1])] * 2)


class Scripted:
    """A session whose prefill and decode steps take the next of the scripted times, in ms."""

    def __init__(self, monkeypatch, prefill_ms, decode_ms):
        self.now, self.calls = 0.0, []
        self.prefill_ms, self.decode_ms = iter(prefill_ms), iter(decode_ms)
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def prefill(self, ids):
        self.now += next(self.prefill_ms) / 1e3
        self.calls.append(("prefill", len(ids)))
        return 7

    def decode(self, token):
        self.now += next(self.decode_ms) / 1e3
        self.calls.append(("decode", token))
        return token + 1


def test_an_iteration_times_each_step_and_feeds_back_the_tokens(monkeypatch):
    session = Scripted(monkeypatch, [120], [4, 5, 6])
    found = iterate(session, [1] * 128, 3)
    assert found.ttft_ms == pytest.approx(120)
    assert found.tpot_ms == pytest.approx([4, 5, 6])
    assert session.calls == [("prefill", 128), ("decode", 7), ("decode", 8), ("decode", 9)]


@pytest.mark.parametrize(
    ("times", "count"),
    [
        ([10, 10, 10, 10], 3),
        ([10, 10.5, 11, 10], 3),  # within 10 %
        ([100, 50, 10, 10, 10, 10], 5),
        ([100, 10, 11.5, 10, 11, 10.5, 10], 6),
        ([10, 20] * 4, 8),  # never: at most eight
    ],
)
def test_warm_up_stops_when_three_in_a_row_agree(times, count, monkeypatch):
    steps = itertools.chain.from_iterable([ms] * latency.WARM_UP_TOKENS for ms in times)
    session = Scripted(monkeypatch, itertools.repeat(1), steps)
    assert warm_up(session, [1, 2]) == count
    assert session.calls.count(("prefill", 2)) == count
