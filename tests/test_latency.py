"""The arithmetic of latency on made-up times, and sessions whose clock is scripted. Nothing here measures time."""

import itertools
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab.measure import latency
from edgelab.measure.latency import Latency, Timed, ratio

MS = st.floats(0.1, 1000)
TURN = st.lists(MS, min_size=1, max_size=4)


def test_percentiles_by_hand():
    found = Latency([100, 300, 160], [[10, 20, 30], [40, 50, 60], [5, 5, 100]])
    assert found.ttft_ms_p50 == 160
    assert found.prefill_tok_s == pytest.approx(128 / 0.160)
    # all nine tokens: 5 5 10 20 30 40 50 60 100; the 95th percentile lies at position 7.6 of 0 to 8
    assert found.tpot_ms(50) == 30
    assert found.tpot_ms(95) == pytest.approx(60 + 0.6 * 40)
    assert found.decode_tok_s == pytest.approx(1000 / 30)
    assert found.decode_s == pytest.approx(0.320)


def test_nothing_measured_yet():
    assert Latency().decode_s == 0
    assert Latency().ttft_ms is not Latency().ttft_ms


def test_what_the_design_promises():
    assert (latency.PREFILL_TOKENS, latency.DECODE_TOKENS) == (128, 64)
    assert latency.DECODE_TOKENS % latency.TURN_TOKENS == 0
    assert (latency.WARM_UP_MIN, latency.PREFILLS_MIN, latency.SECONDS_MIN) == (3, 10, 2)


def test_ratio_of_constant_turns_is_certain():
    assert ratio([[10, 10]] * 4, [[20, 20]] * 4) == pytest.approx((2, 2, 2))


def test_ratio_by_hand():
    # Rates 2 and 8 times the baseline's: geometric mean 4. The logarithms lie log(2) to either side of log(4), so
    # their standard error is log(2); Student's t of one degree of freedom is 12.706205.
    found = ratio([[4, 6], [5, 5]], [[15, 5], [40, 40]])
    reach = math.exp(12.706205 * math.log(2))
    assert found == pytest.approx((4, 4 / reach, 4 * reach), rel=1e-5)


def test_one_turn_has_no_interval():
    mean, low, high = ratio([[10]], [[30]])
    assert mean == pytest.approx(3)
    assert math.isnan(low) and math.isnan(high)


@given(st.lists(st.tuples(TURN, TURN), min_size=2, max_size=6))
def test_ratio_turned_round_is_the_inverse(pairs):
    one, other = (list(side) for side in zip(*pairs, strict=True))
    mean, low, high = ratio(one, other)
    assert low <= mean * (1 + 1e-9) and mean <= high * (1 + 1e-9)
    assert ratio(other, one)[0] == pytest.approx(1 / mean)


def test_unpaired_turns_are_refused():
    with pytest.raises(ValueError, match="longer"):
        ratio([[1]], [[1], [1]])


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


def test_each_step_is_timed_and_feeds_back_its_token(monkeypatch):
    session = Scripted(monkeypatch, [120, 80], [4, 5, 6, 7])
    timed = Timed(session, [1] * 128)
    assert timed.prefill() == pytest.approx(120)
    assert timed.decode(2) == pytest.approx([4, 5])
    assert timed.decode(1) == pytest.approx([6])  # the next turn goes on where the last one stopped
    assert timed.prefill() == pytest.approx(80)
    assert timed.decode(1) == pytest.approx([7])
    assert session.calls == [
        ("prefill", 128),
        ("decode", 7),
        ("decode", 8),
        ("decode", 9),
        ("prefill", 128),
        ("decode", 7),
    ]


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
    steps = itertools.chain.from_iterable([ms] * latency.TURN_TOKENS for ms in times)
    session = Scripted(monkeypatch, itertools.repeat(1), steps)
    assert Timed(session, [1, 2]).warm_up() == count
    assert session.calls.count(("prefill", 2)) == count
