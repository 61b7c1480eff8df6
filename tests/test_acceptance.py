"""Which tokens of a draft stay, greedy and sampled, and what a round gives and takes."""

import heapq
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgelab.deployments.hybrid.speculation import acceptance as rules
from edgelab.deployments.hybrid.speculation.acceptance import (
    SpeculationError,
    accept_greedy,
    accept_sampled,
    best_draft,
    break_even_round_trip_ms,
    capacity_clients,
    expected_tokens,
    overlap,
    pipelined_ms,
    sent_bytes,
    time_per_token_ms,
    travel_ms,
)
from edgelab.network import Link


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Which tokens stay


def test_greedy_by_hand():
    logits = torch.tensor([[0.0, 3, 1], [2, 0, 1], [0, 0, 5]])  # 1, then 0, then 2
    assert accept_greedy(logits, [1, 0]) == (2, 2)
    assert accept_greedy(logits, [1, 2]) == (1, 0)
    assert accept_greedy(logits, [0, 0]) == (0, 1)
    assert accept_greedy(logits[:1], []) == (0, 1)
    assert accept_greedy(torch.zeros(1, 3), []) == (0, 0)  # equal ones: the first


def test_sampled_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    same = p[:1]
    for seed in range(20):
        assert accept_sampled(p, same, [1], seeded(seed)) == (
            1,
            2,
        )  # p = q: all stay, and the last row is certain
        # token 2 has p = 0 and goes; what the target has more of is token 0 alone
        assert accept_sampled(p, torch.tensor([[0.0, 0.5, 0.5]]), [2], seeded(seed)) == (0, 0)
    assert accept_sampled(p[1:], torch.empty(0, 3), [], seeded()) == (0, 2)


def test_rows_are_normalized():
    """Rounded to float16 they sum to almost 1: what counts are shares."""
    p, q = torch.rand(2, 3, 8, generator=seeded()).unbind()
    for seed in range(50):
        found = accept_sampled(p, q[:2], [3, 4], seeded(seed))
        assert found == accept_sampled(8 * p, 0.5 * q[:2], [3, 4], seeded(seed))


P, Q = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(5)).mul(1.5).softmax(-1).unbind()


def first_tokens(samples=8000):
    """The first token of many rounds of two drafted tokens, counted, (vocabulary,); how often it was the draft's."""
    generator, drafter = seeded(1), seeded(2)
    drafts = torch.stack(
        [torch.multinomial(row, samples, True, generator=drafter) for row in Q[:2]], 1
    ).tolist()
    found, accepted = np.zeros(12), 0
    for draft in drafts:
        stays, token = accept_sampled(P, Q[:2], draft, generator)
        found[draft[0] if stays else token] += 1
        accepted += stays > 0
    return found, accepted


def chance(found):
    """Probability of counts at least as far from the target's own probabilities."""
    return stats.chisquare(found, P[0].double().numpy() / P[0].double().sum().item() * found.sum()).pvalue


def test_what_is_written_is_distributed_as_the_target_and_accepted_as_the_overlap_says():
    found, accepted = first_tokens()
    assert chance(found) > 1e-3
    share = overlap(P[0], Q[0]).item()
    assert 0.3 < share < 0.7
    assert stats.binomtest(accepted, int(found.sum()), share).pvalue > 1e-3


@pytest.mark.parametrize("mutation", ["plain", "drafter's own", "everything"])
def test_another_rule_is_told_apart(mutation, monkeypatch):
    """In place of the residual: plain sampling from p, or from q; and a rule that accepts whatever is drafted."""
    if mutation == "plain":
        monkeypatch.setattr(rules, "_residual", lambda p, q: p)
    elif mutation == "drafter's own":
        monkeypatch.setattr(rules, "_residual", lambda p, q: q)
    else:
        monkeypatch.setattr(rules.torch, "rand", lambda count, **_: torch.zeros(count))
    assert chance(first_tokens()[0]) < 1e-9


def test_what_cannot_be_verified_is_refused_in_one_sentence():
    logits, rows = torch.zeros(3, 8), torch.full((2, 8), 1 / 8)
    target = torch.full((3, 8), 1 / 8)
    for found in (torch.zeros(2, 8), torch.zeros(3), torch.zeros(1, 3, 8)):
        with pytest.raises(
            SpeculationError, match=r"draft of 2, logits should have the shape \(3, vocabulary\)"
        ):
            accept_greedy(found, [1, 2])
    with pytest.raises(SpeculationError, match="NaN"):
        accept_greedy(logits * float("nan"), [1, 2])
    with pytest.raises(
        SpeculationError, match=r"draft of 2, drafted should have the shape \(2, vocabulary\)"
    ):
        accept_sampled(target, target, [1, 2], seeded())
    for value in (float("nan"), float("inf"), -1.0, 0.0):
        with pytest.raises(SpeculationError, match="drafted holds no probabilities"):
            accept_sampled(target, rows.index_fill(0, torch.tensor([1]), value), [1, 2], seeded())
    with pytest.raises(SpeculationError, match="8 tokens and the drafter 9"):
        accept_sampled(target, torch.full((2, 9), 1 / 9), [1, 2], seeded())
    with pytest.raises(SpeculationError, match="Token 8 of the draft is outside"):
        accept_sampled(target, rows, [8, 2], seeded())
    rows[0, 1] = 0
    with pytest.raises(SpeculationError, match="Token 1 of the draft has probability 0"):
        accept_sampled(target, rows, [1, 2], seeded())


# What a round gives and takes


def test_expected_tokens_of_published_settings():
    assert [expected_tokens(0.8, draft) for draft in (1, 2, 4, 8)] == pytest.approx(
        [1.8, 2.44, 3.3616, 4.3289], abs=5e-5
    )
    assert expected_tokens(1, 4) == 5 and expected_tokens(0, 4) == 1 and expected_tokens(0.3, 0) == 1


@given(st.floats(0, 1), st.integers(0, 12))
def test_expected_tokens_is_the_sum_of_chances(acceptance, draft):
    """A round has a k-th token where the k - 1 before it were accepted."""
    assert expected_tokens(acceptance, draft) == pytest.approx(
        sum(acceptance**place for place in range(draft + 1)), rel=1e-6
    )


@pytest.mark.parametrize(("acceptance", "round_trip_ms", "co_located_ms"), [
    (0.8, 30.8, 20.8), (0.9, 52.9, 17.1), (0.6, None, 30.4),
])  # fmt: skip
def test_worked_times(acceptance, round_trip_ms, co_located_ms):
    """Drafts of 4 at 10 ms a token, 30 ms to verify and for a token of the cloud."""
    assert time_per_token_ms(acceptance, 4, 10, 30) == pytest.approx(co_located_ms, abs=0.05)
    found = break_even_round_trip_ms(acceptance, 4, 10, 30, 30)
    if round_trip_ms is None:
        assert found < 0
        return
    assert found == pytest.approx(round_trip_ms, abs=0.05)
    assert time_per_token_ms(acceptance, 4, 10, 30, travel_ms=found) == pytest.approx(30)
    assert break_even_round_trip_ms(acceptance, 4, 10, 30, 30, sending_ms=5) == pytest.approx(found - 5)


def test_bytes_and_their_time():
    assert sent_bytes(4) == 16
    assert sent_bytes(4, vocabulary=49_152) == 16 + 4 * 49_152 * 2
    link = Link("slow", down_mbps=20, up_mbps=10, round_trip_ms=50)
    assert travel_ms(link) == pytest.approx(50)
    assert travel_ms(link, up_bytes=393_216, down_bytes=1000) == pytest.approx(50 + 314.5728 + 0.4)


def test_capacity_by_hand():
    assert capacity_clients(4, 10, 30) == pytest.approx(1 + 4 * 10 / 30)
    assert capacity_clients(4, 10, 20) == pytest.approx(3)
    assert capacity_clients(4, 10, 20, travel_ms=40) == pytest.approx(5)


def rounds_per_client(clients, draft, draft_ms, verify_ms, until=100_000.0):
    """Clients that draft, queue for one target, and begin again: rounds of each one in the time given."""
    arrivals = [(draft * draft_ms, client) for client in range(clients)]
    heapq.heapify(arrivals)
    free, done = 0.0, 0
    while arrivals[0][0] < until:
        arrived, client = heapq.heappop(arrivals)
        free = max(free, arrived) + verify_ms
        done += 1
        heapq.heappush(arrivals, (free + draft * draft_ms, client))
    return done / clients


def test_so_many_clients_keep_their_speed():
    alone = rounds_per_client(1, 4, 10, 20)
    assert alone == pytest.approx(100_000 / 60, rel=1e-3)
    assert rounds_per_client(3, 4, 10, 20) == pytest.approx(alone, rel=1e-2)  # the capacity
    assert rounds_per_client(6, 4, 10, 20) == pytest.approx(alone / 2, rel=1e-2)


def simulated_ms(acceptance, draft, draft_ms, away_ms, pipelined, rounds=6000):
    """Time per token on a clock of events: steps of the drafter that end, and answers that arrive."""
    random, number = np.random.default_rng(0), itertools.count()
    events, now, tokens = [], 0.0, 0
    made, needed, away, running = 0, draft, False, False

    def after(delay, what):
        heapq.heappush(events, (now + delay, next(number), what))

    done = 0
    while done < rounds:
        if (
            not away and made >= needed
        ):  # the draft leaves; behind it the target's token and another draft are next
            away, made, needed = True, 0, draft + 1
            after(away_ms, "answer")
        if not running and made < needed and (pipelined or not away):
            running = True
            after(draft_ms, "step")
        now, _, what = heapq.heappop(events)
        if what == "step":
            running, made = False, made + 1
            continue
        done, away = done + 1, False
        right = next((place for place in range(draft + 1) if random.random() >= acceptance), draft + 1)
        tokens += min(right, draft) + 1
        if right <= draft or not pipelined:
            if running:  # what is under way is finished, for nothing
                now, _, _ = heapq.heappop(events)
                running = False
            made, needed = 0, draft
    return now / tokens


@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    ("draft", "draft_ms", "away_ms"), [(4, 10, 30), (4, 10, 50), (4, 10, 83), (1, 7, 40), (8, 10, 5)]
)
def test_times_on_a_clock(acceptance, draft, draft_ms, away_ms):
    expected = time_per_token_ms(acceptance, draft, draft_ms, verify_ms=away_ms)
    assert simulated_ms(acceptance, draft, draft_ms, away_ms, False) == pytest.approx(expected, rel=0.025)
    expected = pipelined_ms(acceptance, draft, draft_ms, verify_ms=1, travel_ms=away_ms - 1)
    assert simulated_ms(acceptance, draft, draft_ms, away_ms, True) == pytest.approx(expected, rel=0.025)


@given(st.floats(0, 1), st.integers(1, 12), st.floats(0, 50), st.floats(0.1, 50), st.floats(0, 200))
def test_pipelining_costs_at_most_the_step_under_way(acceptance, draft, draft_ms, verify_ms, travel):
    plain = time_per_token_ms(acceptance, draft, draft_ms, verify_ms, travel)
    tokens = expected_tokens(acceptance, draft)
    found = pipelined_ms(acceptance, draft, draft_ms, verify_ms, travel)
    hidden = min(
        draft * draft_ms, verify_ms + travel
    )  # a draft can be hidden behind what is away, or that behind it
    assert plain - hidden / tokens - 1e-6 <= found <= plain + draft_ms / tokens + 1e-6


def test_best_draft_grows_with_the_way_and_with_acceptance():
    assert best_draft(0.0, 10, 30) == 1
    assert best_draft(1.0, 10, 30) == 16
    near, far = best_draft(0.7, 10, 30), best_draft(0.7, 10, 30, travel_ms=200)
    assert 1 < near < far < 16
    assert best_draft(0.5, 10, 30) < best_draft(0.9, 10, 30)
    times = [time_per_token_ms(0.7, draft, 10, 30) for draft in range(1, 17)]
    assert near == 1 + times.index(min(times))
    assert best_draft(0.7, 10, 30, 200, pipelined=True, longest=5) <= 5


def test_figures_that_cannot_be():
    with pytest.raises(SpeculationError, match=r"acceptance of 1\.2 .* 0 to 1"):
        expected_tokens(1.2, 4)
    with pytest.raises(SpeculationError, match="draft of -1 tokens"):
        time_per_token_ms(0.5, -1, 10, 30)
    with pytest.raises(SpeculationError, match="verify_ms is 0"):
        capacity_clients(4, 10, 0)
