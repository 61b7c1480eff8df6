"""Plans on a clock, against the formulas for pipelines and against sums by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelab.deployments.partition.problem import NoPlan
from edgelab.deployments.partition.simulator import Chain, chain, pipeline_tok_s, rates, simulate


def line_of(*seconds, delay=0.0):
    count = len(seconds)
    return Chain(
        tuple(f"stage {place}" for place in range(count)),
        np.array(seconds, dtype=float),
        np.full(count, delay),
        np.zeros(count, dtype=bool),
        np.arange(count),
    )


def test_chain_of_the_relay(relay):
    """10 ms, 2.5 on the link, 10, 2.5, and four layers of 1; nothing goes back."""
    line = chain(relay, (0, 1, 2, 2, 2, 2))
    assert line.seconds.tolist() == [10, 2.5, 10, 2.5, 4]
    assert line.is_link.tolist() == [False, True, False, True, False]
    assert line.latency_s == pytest.approx(29)


def test_placement_without_a_link_is_refused(relay):
    problem = relay.with_bandwidth(0, 2, 0.0)
    with pytest.raises(NoPlan, match="no link"):
        chain(problem, (0, 2, 2, 2, 2, 2))


def test_formulas_by_hand():
    tau = np.array([2.0, 3.0, 1.0])
    assert pipeline_tok_s(tau, 1) == pytest.approx(1 / 6)
    assert pipeline_tok_s(tau, 2) == pytest.approx(2 / 6)
    assert pipeline_tok_s(tau, 4) == pytest.approx(4 / 12)
    assert pipeline_tok_s(tau, 4, bubbles=True) == pytest.approx(4 / (3 * 3 + 6))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6))
def test_simulated_pipelines_tend_to_the_formulas(seconds, requests):
    line, tokens = line_of(*seconds), 60
    for bubbles in (False, True):
        tasks = simulate(line, requests, tokens, bubbles=bubbles)
        ends = tasks[tasks["place"] == tasks["place"].max()].groupby("token")["end"].max()
        step = (ends.iloc[-1] - ends.iloc[tokens // 2]) / (tokens - 1 - tokens // 2)
        assert requests / step == pytest.approx(pipeline_tok_s(line.seconds, requests, bubbles), rel=0.02)


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=4), st.integers(1, 5), st.floats(0, 0.5))
def test_no_place_does_two_things_at_once(seconds, requests, jitter):
    tasks = simulate(line_of(*seconds, delay=0.3), requests, 6, jitter=jitter)
    assert len(tasks) == len(seconds) * requests * 6
    for _, of_place in tasks.groupby("place"):
        ordered = of_place.sort_values("start")
        assert (ordered["start"].to_numpy()[1:] >= ordered["end"].to_numpy()[:-1] - 1e-9).all()
    for _, one in tasks.groupby(["request", "token"]):
        ordered = one.sort_values("place")
        assert (ordered["start"].to_numpy()[1:] >= ordered["end"].to_numpy()[:-1] + 0.3 - 1e-9).all()


def test_prompt_and_round_trip():
    """A prompt of 4 tokens goes once over the link as 4 states; a delay of 1 follows each place."""
    line = Chain(
        ("a", "a > b", "b"),
        np.array([2.0, 0.5, 3.0]),
        np.ones(3),
        np.array([False, True, False]),
        np.arange(3),
    )
    tasks = simulate(line, tokens=3, prompt_tokens=4, prefill=np.array([8.0, 2.0, 12.0]))
    found = rates(tasks)
    assert found["time_to_first_token_s"] == pytest.approx(8 + 1 + 2 + 1 + 12)
    assert found["latency_s"] == pytest.approx(2 + 0.5 + 3 + 3)
    same = rates(simulate(line, tokens=3, prompt_tokens=4))
    assert same["time_to_first_token_s"] == pytest.approx(2 + 1 + 4 * 0.5 + 1 + 3)


def test_same_seed_same_run():
    one, other = (simulate(line_of(1, 2), 3, 5, jitter=0.2, seed=7) for _ in range(2))
    assert one.equals(other)
    assert not one.equals(simulate(line_of(1, 2), 3, 5, jitter=0.2, seed=8))


def test_one_device_does_one_thing_at_a_time():
    """The source has two stages where the head comes back to it: 2 and 1 of its own, 3 elsewhere."""
    line = Chain(
        ("a", "b", "a"), np.array([2.0, 3.0, 1.0]), np.zeros(3), np.zeros(3, dtype=bool), np.array([0, 1, 0])
    )
    assert line.busy_s.tolist() == [3, 3]
    tasks = simulate(line, requests=3, tokens=6)
    own = tasks[tasks["place"] != 1].sort_values("start")
    assert (own["start"].to_numpy()[1:] >= own["end"].to_numpy()[:-1] - 1e-9).all()
    assert rates(tasks)["tok_s"] <= 1 / 3
