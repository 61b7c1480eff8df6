"""Speculative decoding: what stays of a draft, what a round takes, and loops that write what the target would."""

import copy
import heapq
import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgelab.deployments.hybrid.speculation import acceptance as rules
from edgelab.deployments.hybrid.speculation import drafting
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
from edgelab.deployments.hybrid.speculation.drafting import Drafting, Verifying, departure
from edgelab.deployments.hybrid.speculation.rounds import Adaptive, Counts
from edgelab.model.finite import NotFiniteError
from edgelab.network import Link
from edgelab.runtimes.eager import Eager
from edgelab.runtimes.session import Session

PROMPT = torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(0)).tolist()
CLOSE = 1e-4  # logits that lie no further apart may change places when a sequence is read in other pieces


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


# Loops


class Table(Session):
    """A session whose next token depends on the last one only: logits by row, (vocabulary, vocabulary)."""

    def __init__(self, logits):
        super().__init__()
        self.table, self.vocabulary = logits, len(logits)

    @classmethod
    def _refusal(cls, about):
        return None

    def _feed(self, ids, every):
        return self.table[ids if every else ids[-1:]].clone()

    def _cut(self, length):
        return True


class Later:
    """In place of threads: an answer is there when the drafter has asked for it so many times, or waits for it."""

    def __init__(self, asked):
        self.asked = asked

    def __call__(self, workers, name):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, work, *given):
        return Answer(self.asked, lambda: work(*given))


class Answer:
    def __init__(self, asked, work):
        self.left, self.result = asked, work

    def done(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def models(new_model):
    """A target, a noisy copy of it, and a model that has nothing to do with it."""
    target = new_model("llama")
    noisy = copy.deepcopy(target)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15 * parameter.std())
    return {"target": target, "noisy": noisy, "other": new_model("qwen3")}


def alone(model, prompt, count):
    session = Eager(model)
    token, written = session.prefill(prompt), []
    for _ in range(count):
        written.append(token)
        token = session.decode(token)
    return written


@pytest.fixture(scope="module")
def expected(models):
    return alone(models["target"], PROMPT, 24)


def same(target, written, expected):
    """Equal, or apart first at a place where the target's two likeliest logits lie closer than sums may be off."""
    assert len(written) == len(expected)
    found = departure(Eager(target), PROMPT, written, expected)
    return found is None or found[1] < CLOSE


@pytest.mark.parametrize("drafter", ["noisy", "other", "target"])
@pytest.mark.parametrize("draft", range(1, 9))
def test_greedy_text_is_the_target_s(draft, drafter, models, expected, monkeypatch):
    for asked in (None, 0, 2, 20):  # one after the other; pipelined, with answers sooner and later
        if asked is not None:
            monkeypatch.setattr(drafting, "ThreadPoolExecutor", Later(asked))
        verify = Verifying(Eager(models["target"]), PROMPT)
        loop = Drafting(Eager(models[drafter]), verify, draft, pipelined=asked is not None)
        assert same(models["target"], loop.write(PROMPT, 24), expected)
        counts = loop.counts
        assert counts.tokens == 24 <= counts.accepted + counts.rounds
        unsent = counts.steps - counts.drafted - counts.thrown_away  # tokens of the target that were guessed
        assert 0 <= unsent <= counts.rounds and counts.ahead >= counts.thrown_away
        assert (counts.ahead > 0) == (asked not in (None, 0))
        if drafter == "target":
            assert counts.acceptance == 1 and counts.thrown_away == 0
            assert counts.rounds == -(-24 // (draft + 1))
        if drafter == "noisy":
            assert 0.1 < counts.acceptance < 0.95


def test_places_of_a_draft_are_counted_by_themselves(models):
    """A place is tried where all before it held."""
    loop = Drafting(Eager(models["noisy"]), Verifying(Eager(models["target"]), PROMPT), 5)
    rounds = list(loop.stream(PROMPT, 24))
    counts = loop.counts
    assert len(rounds) == counts.rounds and counts.rounds - counts.tried[0] in (
        0,
        1,
    )  # the last may need no draft
    assert all(tried <= held for tried, held in zip(counts.tried[1:], counts.held, strict=False))
    assert sum(counts.held) == counts.accepted and counts.tokens_per_round == 24 / counts.rounds
    by_hand = Counts()
    for drafted, accepted in ((3, 3), (3, 1), (2, 0)):
        by_hand.count(drafted, accepted)
    assert (by_hand.tried, by_hand.held) == ([3, 2, 1], [2, 1, 1])
    assert by_hand.acceptance == 4 / 6 and by_hand.acceptance_by_place == [2 / 3, 1 / 2, 1]
    by_hand.count(5, 0)
    assert by_hand.acceptance_by_place == [2 / 4, 1 / 2, 1, None, None]  # places that nothing reached


class Telling(Eager):
    """Says when it has made a step."""

    stepped = threading.Event()

    def _feed(self, ids, every):
        found = super()._feed(ids, every)
        self.stepped.set()
        return found


@pytest.mark.parametrize("drafter", ["noisy", "target"])
def test_real_threads(drafter, models, expected):
    """Answers come when the drafter is a step ahead; what it has read and was not right is taken back."""
    edge, target = Telling(models[drafter]), Verifying(Eager(models["target"]), PROMPT)

    def verify(step, ids, probabilities):
        edge.stepped.clear()
        edge.stepped.wait(0.5)  # no step is made ahead of the last round
        return target(step, ids, probabilities)

    loop = Drafting(edge, verify, 3, pipelined=True)
    assert same(models["target"], loop.write(PROMPT, 24), expected)
    assert loop.counts.ahead > 0 and (loop.counts.thrown_away > 0) == (drafter == "noisy")


@pytest.mark.parametrize("pipelined", [False, True])
def test_an_adaptive_draft_writes_the_same(pipelined, models, expected):
    adaptive = Adaptive(start=3, longest=6)
    loop = Drafting(
        Eager(models["noisy"]), Verifying(Eager(models["target"]), PROMPT), adaptive, pipelined=pipelined
    )
    assert same(models["target"], loop.write(PROMPT, 24), expected)
    assert adaptive.away_ms > 0 and adaptive.draft_ms > 0 and 0 < adaptive.acceptance < 1


def test_adaptive_lengths_by_hand():
    """Starts at what it is told; longer after rounds that held, and on slow links; shorter after those that did not."""
    adaptive = Adaptive(start=4, memory=0.5)
    assert adaptive.length() == 4 and adaptive.acceptance == 0.5
    adaptive.observe(4, 4, draft_ms=10, away_ms=40)
    assert adaptive.acceptance == (0.5 + 4) / (1 + 4)
    assert adaptive.length() == best_draft(0.9, 10, 40)
    adaptive.observe(8, 0, draft_ms=20, away_ms=60)
    assert adaptive.acceptance == pytest.approx(2.25 / 3.5)
    assert (adaptive.draft_ms, adaptive.away_ms) == (15, 50)
    assert adaptive.length() == best_draft(2.25 / 3.5, 15, 50) < best_draft(0.9, 10, 40)
    assert adaptive.length(pipelined=True) == best_draft(2.25 / 3.5, 15, 50, pipelined=True)
    for memory in (-0.1, 1.0):
        with pytest.raises(SpeculationError, match="memory="):
            Adaptive(memory=memory)
    with pytest.raises(SpeculationError, match="start=17 should be 1 to longest=16"):
        Adaptive(start=17)


def cycle(*tokens, vocabulary=8):
    """A table that writes these tokens in a circle."""
    table = torch.zeros(vocabulary, vocabulary)
    for one, following in itertools.pairwise([*tokens, tokens[0]]):
        table[one, following] = 5.0
    return Table(table)


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("limit", range(1, 12))
@pytest.mark.parametrize("draft", [1, 3, 20])
def test_texts_end_at_the_limit_and_at_a_stop(draft, limit, pipelined, monkeypatch):
    """0 1 2 3 4 5 and again; 5 ends. One drafter is right, one takes 6 for 3, and one ends too early."""
    monkeypatch.setattr(drafting, "ThreadPoolExecutor", Later(3))
    whole, written = [1, 2, 3, 4, 5], []
    for edge in (cycle(*range(6)), cycle(0, 1, 2, 6, 4, 5), cycle(0, 1, 5, 2, 3, 4)):
        target = Verifying(cycle(*range(6)), [5, 0])

        def verify(step, ids, probabilities, target=target, written=written):
            assert len(ids) < limit - len(written)  # the target adds one
            return target(step, ids, probabilities)

        loop = Drafting(edge, verify, draft, pipelined=pipelined, stop={5})
        written.clear()
        for tokens in loop.stream([5, 0], limit):
            written += tokens
        assert written == whole[:limit] and loop.counts.tokens == min(limit, 5)
    endless = Drafting(cycle(*range(6)), Verifying(cycle(*range(6)), [0]), draft, pipelined=pipelined)
    assert endless.write([0], limit) == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5][:limit]
    assert endless.write([0], 0) == []


def test_a_drafted_stop_ends_the_draft():
    seen = []
    target = Verifying(cycle(*range(6)), [0])

    def verify(step, ids, probabilities):
        seen.append((step, ids))
        return target(step, ids, probabilities)

    assert Drafting(cycle(*range(6)), verify, 8, stop={3}).write([0], 40) == [1, 2, 3]
    assert seen == [(0, [1, 2, 3])]
    assert Drafting(cycle(*range(6)), Verifying(cycle(*range(6)), [0]), 2, stop={3}).write([0], 40) == [
        1,
        2,
        3,
    ]


TABLES = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(7)).cumsum(
    0
)  # target, drafter: more noise
TEXTS, TOKENS = 8, 600


def transitions(draft=3, pipelined=False, temperature=0.8):
    """How often each token followed each one in sampled texts, (8, 8); and the counts of the last one's rounds."""
    found = np.zeros((8, 8))
    for seed in range(TEXTS):  # drafter and target have the same, and yet other random numbers
        verify = Verifying(Table(TABLES[0]), [0], temperature, seed)
        loop = Drafting(
            Table(TABLES[1]), verify, draft, pipelined=pipelined, temperature=temperature, seed=seed
        )
        written = [0, *loop.write([0], TOKENS)]
        np.add.at(found, (written[:-1], written[1:]), 1)
    return found, loop.counts


def chance_of_transitions(found, temperature=0.8):
    """As `chance`, over all tokens that something followed."""
    p = (TABLES[0].double() / temperature).softmax(-1).numpy()
    expected = p * found.sum(1, keepdims=True)
    return stats.chi2.sf(((found - expected) ** 2 / expected).sum(), 8 * 7)


@pytest.mark.parametrize("draft", [1, 4])
@pytest.mark.parametrize("asked", [None, 0, 2, 9])
def test_sampled_texts_are_distributed_as_the_target_s(asked, draft, monkeypatch):
    if asked is not None:
        monkeypatch.setattr(drafting, "ThreadPoolExecutor", Later(asked))
    found, counts = transitions(draft, asked is not None)
    assert found.sum() == TEXTS * TOKENS == TEXTS * counts.tokens
    assert chance_of_transitions(found) > 1e-3
    assert 0.3 < counts.acceptance < 0.8
    if asked == 9:
        assert 0 < counts.thrown_away < counts.ahead


@pytest.mark.parametrize("mutation", ["residual", "probabilities"])
def test_texts_of_another_distribution_are_told_apart(mutation, monkeypatch):
    """Plain p in place of the residual, and q of another temperature than was sampled from."""
    if mutation == "residual":
        monkeypatch.setattr(rules, "_residual", lambda p, q: p)
    else:
        rule = drafting.accept_sampled
        monkeypatch.setattr(drafting, "accept_sampled", lambda p, q, *rest: rule(p, q.double() ** 0.5, *rest))
    assert chance_of_transitions(transitions(4)[0]) < 1e-9


def test_the_same_seed_for_both_gives_other_numbers_to_each(monkeypatch):
    """First tokens of many seeds. A draft from the very numbers that decide over it would not be the target's."""

    def first_tokens():
        found = np.zeros(8)
        for seed in range(2000):
            verify = Verifying(Table(TABLES[0]), [0], 0.8, seed)
            loop = Drafting(Table(TABLES[1]), verify, 1, temperature=0.8, seed=seed)
            found[next(loop.stream([0], 2))[0]] += 1
        return stats.chisquare(found, (TABLES[0, 0].double() / 0.8).softmax(-1).numpy() * 2000).pvalue

    assert first_tokens() > 1e-3
    monkeypatch.setattr(drafting, "APART", 0)
    assert first_tokens() < 1e-9


def test_the_seed_fixes_what_is_sampled():
    def once(seed):
        verify = Verifying(Table(TABLES[0]), [0], 1.0, seed)
        return Drafting(Table(TABLES[1]), verify, 3, temperature=1.0, seed=seed).write([0], 30)

    assert once(1) == once(1) != once(2)


def test_what_is_sent_is_what_was_sampled_from():
    sent = []

    def verify(step, ids, probabilities):
        sent.append((ids, probabilities))
        return len(ids), 0

    Drafting(Table(TABLES[1]), verify, 3, temperature=0.5).write([0], 4)
    ((ids, probabilities),) = sent
    assert probabilities.dtype == torch.float16 and probabilities.shape == (3, 8)
    rows = (TABLES[1][[0, *ids[:2]]] / 0.5).softmax(-1)
    torch.testing.assert_close(probabilities.float(), rows, rtol=1e-3, atol=1e-6)
    Drafting(Table(TABLES[1]), lambda step, ids, probabilities: sent.append(probabilities) or (0, 0)).write(
        [0], 1
    )
    assert sent[-1] is None


def test_long_prompts_are_read_in_slices(models):
    prompt = PROMPT * 30  # 360 tokens
    loop = Drafting(Eager(models["noisy"]), Verifying(Eager(models["target"]), prompt), 3)
    expected = alone(models["target"], prompt, 6)
    written = loop.write(prompt, 6)
    found = departure(Eager(models["target"]), prompt, written, expected)
    assert found is None or found[1] < CLOSE


def test_departure_says_where_and_how_far():
    session = cycle(*range(6))
    assert departure(session, [0], [1, 2, 3], [1, 2, 3]) is None
    assert departure(session, [0], [1, 2], [1, 2, 3]) is None
    assert departure(session, [0], [1, 2, 3], [1, 4, 3]) == (1, 5.0)


def test_answers_and_settings_that_cannot_be():
    def answering(*answer):
        return Drafting(Table(TABLES[1]), lambda *given: answer, 3)

    with pytest.raises(SpeculationError, match="4 tokens cannot be accepted of a draft of 3"):
        answering(4, 0).write([0], 10)
    with pytest.raises(SpeculationError, match="token 8 is outside the drafter's vocabulary of 8"):
        answering(0, 8).write([0], 10)
    with pytest.raises(SpeculationError, match="give a prompt"):
        answering(0, 1).write([], 10)
    with pytest.raises(SpeculationError, match="draft of 0 tokens verifies nothing"):
        Drafting(Table(TABLES[1]), None, 0)
    with pytest.raises(SpeculationError, match=r"temperature is -0\.5"):
        Drafting(Table(TABLES[1]), None, temperature=-0.5)
    with pytest.raises(NotFiniteError, match="drafter's logits"):
        Drafting(Table(TABLES[1] * float("nan")), lambda *given: (0, 0)).write([0], 10)
    verify = Verifying(Table(TABLES[0]), [0], temperature=1.0)
    with pytest.raises(SpeculationError, match="Step 1 is out of turn; the next one is 0"):
        verify(1, [2], None)
    with pytest.raises(SpeculationError, match="none came along"):
        verify(0, [2], None)


def test_a_failing_answer_ends_the_text():
    def verify(step, ids, probabilities):
        raise SpeculationError("The cloud is down.")

    for pipelined in (False, True):
        with pytest.raises(SpeculationError, match="down"):
            Drafting(cycle(*range(6)), verify, 3, pipelined=pipelined).write([0], 10)


def test_counts_of_nothing():
    assert (
        Counts().acceptance is None
        and Counts().tokens_per_round is None
        and Counts().acceptance_by_place == []
    )
