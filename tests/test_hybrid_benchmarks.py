"""The arithmetic of the benchmarks of hybrid inference: rounds in the middle of a text, and where lines cross."""

import itertools

import pytest
import torch

from benchmarks import speculation
from benchmarks.capacity import Load, Replay
from benchmarks.hybrid import lone, round_trips_ms, transfer_s
from benchmarks.speculation import Rounds, acceptance_of, crossing
from edgelab.deployments.hybrid.inversion import lone_states
from edgelab.deployments.hybrid.speculation.acceptance import expected_tokens
from edgelab.deployments.hybrid.speculation.drafting import Verifying
from edgelab.deployments.hybrid.split import cut_behind
from edgelab.network import Link
from edgelab.runtimes.eager import Eager

PROMPT = [5, 100, 42, 7, 299, 12]


@pytest.mark.parametrize("draft", [1, 4, 8])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
def test_tokens_per_round_say_the_acceptance(acceptance, draft):
    found = acceptance_of(expected_tokens(acceptance, draft), draft)
    assert found == pytest.approx(acceptance, abs=1e-6)


def test_lines_cross_where_drafting_takes_as_long_as_a_stream():
    assert crossing([10, 30], [20, 30], [24, 24]) == pytest.approx(18)  # 15 + trip / 2 against 24
    assert crossing([0, 50], [40, 65], [24, 24]) == pytest.approx(-32)  # never
    assert crossing([10, 30, 50], [20, 30, 40], [24, 24, 24]) == pytest.approx(18)


def test_a_round_by_hand():
    found = Rounds(2, tokens=[3, 1], seconds=[0.1, 0.06], away_s=[0.04, 0.02], up=[600, 400], down=[90, 110])
    assert found.tokens_per_round == 2
    assert found.ms_per_token == pytest.approx(40)
    assert found.verify_ms == pytest.approx(30)
    assert found.draft_ms == pytest.approx(25)  # 100 ms of four steps
    assert found.travel_ms(Link("made", 1, 1, round_trip_ms=20)) == pytest.approx(20 + 4 + 0.8)


def test_rounds_that_begin_or_end_a_text_do_not_count(monkeypatch, new_model):
    """The target drafts for itself, so that every round gives three tokens: 3, 3, 3, and one that is left of ten."""
    clock = itertools.count()
    monkeypatch.setattr(speculation.time, "perf_counter", lambda: float(next(clock)))
    model = new_model("llama")
    found = Rounds(2)
    for _ in range(2):
        found.add(Eager(model), lambda: Verifying(Eager(model), PROMPT), PROMPT, 10)
    assert found.tokens == [3, 3, 3, 3]
    assert len(found.seconds) == len(found.away_s) == 4
    assert len(found.whole_s) == 2
    assert all(away < seconds for away, seconds in zip(found.away_s, found.seconds, strict=True))


def test_recorded_drafts_are_answered_alike_when_they_are_sent_again(new_model):
    cloud = Eager(new_model("llama", num_hidden_layers=3))
    replay = Replay.recorded(Eager(new_model("llama")), cloud, PROMPT, 12)
    assert replay.tokens == 12

    class Server:
        def verifier(self, ids):
            verify = Verifying(cloud, ids)
            return lambda step, draft, probabilities: verify(step, draft, probabilities)

    replay.draft_s = 0.0
    assert replay.sent(Server()) == 0
    replay.drafts[0] = (replay.drafts[0][0], 0, 299 - replay.drafts[0][2])
    assert replay.sent(Server()) == 1


def test_load_by_hand():
    load = Load(tokens=192, seconds=8.0, cpu_s=4.0)
    assert load.rate == 48
    assert str(load) == "24.0 tok/s, 48.0 per second in which it computes"


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_transfer_takes_at_least_what_the_link_does(way):
    link = Link("made", 20, 20, round_trip_ms=10)
    assert transfer_s(link, 50_000, way) >= link.up_s(50_000)


def test_round_trips_are_as_long_as_the_link_is():
    found = round_trips_ms(Link("made", 100, 100, round_trip_ms=15), 3)
    assert len(found) == 3
    assert min(found) >= 15


def test_a_lone_token_is_known_by_its_state(new_model):
    """Behind the embedding alone every state is that of its token, whatever stands before it."""
    edge, _ = cut_behind(new_model("llama"), [0])
    table = lone_states(edge)
    assert lone(edge, table, PROMPT, [8, 8, 131], "float32") == 1
    wrong = table[torch.arange(300).roll(1)]
    assert lone(edge, wrong, PROMPT, [8, 8, 131], "float32") == 0
