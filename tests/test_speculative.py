"""Speculative decoding: loops that write what the target would, in every way of drafting."""

import copy
import itertools
import threading

import numpy as np
import pytest
import torch
from scipy import stats

from edgelab.deployments.hybrid.speculation import acceptance as rules
from edgelab.deployments.hybrid.speculation import drafting
from edgelab.deployments.hybrid.speculation.acceptance import SpeculationError, best_draft
from edgelab.deployments.hybrid.speculation.drafting import Drafting, Verifying, departure
from edgelab.deployments.hybrid.speculation.rounds import Adaptive, Counts
from edgelab.model.finite import NotFiniteError
from edgelab.runtimes.eager import Eager
from edgelab.runtimes.session import Session

PROMPT = torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(0)).tolist()
CLOSE = 1e-4  # logits that lie no further apart may change places when a sequence is read in other pieces


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("draft", [1, 2, 3, 8])
def test_texts_end_where_what_was_written_says_so(draft, pipelined, monkeypatch):
    """0 1 2 3 4 5 and again; behind 4 and 5 a text has ended, wherever in a draft that is."""
    monkeypatch.setattr(drafting, "ThreadPoolExecutor", Later(3))
    for edge in (cycle(*range(6)), cycle(0, 1, 2, 6, 4, 5)):
        loop = Drafting(
            edge, Verifying(cycle(*range(6)), [4]), draft, pipelined=pipelined,
            ends=lambda written: written[-2:] == [4, 5],
        )  # fmt: skip
        assert loop.write([4], 40) == [5, 0, 1, 2, 3, 4, 5]  # what stands in the prompt does not count
        assert loop.counts.tokens == 7


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
    for temperature in (-0.5, 0.0009, 2.5, float("nan")):
        with pytest.raises(
            SpeculationError, match=rf"temperature is {temperature} and should be 0\.001 to 2, or 0"
        ):
            Drafting(Table(TABLES[1]), None, temperature=temperature)
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
