"""A plan in motion, with workers in threads of this process: tokens, bytes, faults, slower links."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from edgelab.deployments.partition import wire, worker
from edgelab.deployments.partition.cluster import Cluster
from edgelab.deployments.partition.observing import slowed as slowed_links
from edgelab.deployments.partition.planners import exact
from edgelab.deployments.partition.problem import NoPlan, Problem, planned
from edgelab.deployments.partition.profile import hidden_bytes
from edgelab.deployments.partition.seats import ClusterError, WorkerEnded
from edgelab.deployments.partition.stage import Stage, generate
from edgelab.deployments.partition.wire import FRAME_BYTES
from edgelab.errors import EdgeLabError
from edgelab.network import Link

PROMPTS = [[5, 100, 42, 7], [9, 8, 7, 6, 5, 4]]
TOKENS = 6
PARTS = 6  # of a tiny model of four blocks


@pytest.fixture
def folder(variant):
    return variant("none", num_hidden_layers=4)


def problem(devices=3, mbps=0.0, round_trip_ms=0.0, wire_format="float32", seconds=None, room=None):
    """Of the tiny model: every part takes a millisecond everywhere, links are as wide as asked for."""
    handed = np.array([hidden_bytes(64, wire_format)] * (PARTS - 1) + [4.0])
    return Problem(
        seconds=np.full((PARTS, devices), 1e-3) if seconds is None else seconds,
        handed=handed,
        memory=np.ones(PARTS),
        room=np.full(devices, float(PARTS)) if room is None else np.array(room, dtype=float),
        bandwidth=np.full((devices, devices), mbps * 1e6 / 8 or 1e12),
        delay=np.full((devices, devices), round_trip_ms / 2e3),
        names=("edge", "hub", "cloud")[:devices],
    )


def cluster_of(folder, start, placement, found=None, **settings):
    found = found or problem()
    return Cluster(folder, found, planned(found, placement, "latency", "exact"), start, **settings)


@pytest.fixture
def expected(folder):
    stage = Stage.load(folder, 0, PARTS)
    return [generate([stage], prompt, TOKENS, number) for number, prompt in enumerate(PROMPTS)]


def written(cluster, prompts=PROMPTS, tokens=TOKENS):
    answers = [[] for _ in prompts]
    for place, token in cluster.stream(prompts, tokens):
        answers[place].append(token)
    return answers


@pytest.mark.parametrize(
    "placement", [(0,) * 6, (0, 0, 0, 1, 1, 1), (0, 1, 1, 2, 2, 2), (0, 0, 0, 0, 0, 2), (0, 0, 1, 1, 1, 0)]
)
@pytest.mark.parametrize("shaped", [True, False])
def test_tokens_are_those_of_one_stage(folder, start, placement, shaped, expected):
    with cluster_of(folder, start, placement, shaped=shaped) as cluster:
        assert [cluster.write(prompt, TOKENS) for prompt in PROMPTS] == expected
        assert written(cluster) == expected  # both in flight
        assert {name.removesuffix(" again") for name in cluster.loaded} == {
            ("edge", "hub", "cloud")[one] for one in placement
        }


def test_the_head_at_home_hears_of_the_last_state_alone(folder, start, expected):
    with cluster_of(folder, start, (0, 0, 1, 1, 1, 0)) as cluster:
        assert [cluster.write(prompt, TOKENS) for prompt in PROMPTS] == expected
        assert list(cluster.loaded) == ["edge", "hub", "edge again"]
        assert set(cluster.links) == {("edge", "hub"), ("hub", "edge")}
        sent = {one.sent for one in cluster.spent()["hub"] if one.step == 0 and one.tokens}
        assert sent == {hidden_bytes(64) + FRAME_BYTES}


def test_logits_are_those_of_one_stage_to_the_bit(folder, start):
    stage, ids = Stage.load(folder, 0, PARTS), PROMPTS[0]
    with cluster_of(folder, start, (0, 0, 1, 1, 2, 2)) as cluster:
        number = cluster.begin()
        for place in (ids, [3], [4, 5]):
            found = np.frombuffer(cluster.read(number, place, logits=True), np.float32)
            assert np.array_equal(found, stage.read(torch.tensor(place), stage.length()).numpy())
        assert wire.ids_of(cluster.read(number, [6])) == [int(stage.read(torch.tensor([6]), 7).argmax())]


@pytest.mark.parametrize("format_", wire.FORMATS)
def test_bytes_over_every_link_are_those_of_the_formula(folder, start, format_):
    found = problem(wire_format=format_)
    with cluster_of(folder, start, (0, 0, 1, 1, 2, 2), found, wire=format_) as cluster:
        cluster.write(PROMPTS[0], TOKENS)
        cluster.begin()  # what was forgotten has passed
        spent = cluster.spent()
        state, steps = hidden_bytes(64, format_), 1 + TOKENS - 1
        read = len(PROMPTS[0]) + TOKENS - 1
        for name, payload in (("edge", read * state), ("hub", read * state), ("cloud", 4 * steps)):
            told = [one for one in spent[name] if one.tokens]
            assert sum(one.sent for one in told) == payload + FRAME_BYTES * steps
        links = cluster.links
        assert set(links) == {("edge", "hub"), ("hub", "cloud"), ("cloud", "edge")}
        deadline = time.monotonic() + 5
        wanted = read * state + FRAME_BYTES * (steps + 1)  # and one that says the request is over
        while links["edge", "hub"].traffic.up < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert links["edge", "hub"].traffic.up == wanted


def test_a_slower_format_is_rounded_as_in_one_process(folder, start):
    stages = [Stage.load(folder, 0, 3), Stage.load(folder, 3, 6)]
    given = wire.through(stages[0].read(torch.tensor(PROMPTS[0]), 0), "int8")
    here = stages[1].read(given, 0)
    with cluster_of(folder, start, (0, 0, 0, 1, 1, 1), problem(wire_format="int8"), wire="int8") as cluster:
        found = np.frombuffer(cluster.read(cluster.begin(), PROMPTS[0], logits=True), np.float32)
    assert np.array_equal(found, here.numpy())


@pytest.mark.parametrize("lost", ["hub", "cloud"])
def test_a_stage_that_ends_costs_no_request_its_result(folder, start, lost, expected):
    with cluster_of(folder, start, (0, 0, 1, 1, 2, 2)) as cluster:
        answers = [[], []]
        for place, token in cluster.stream(PROMPTS, TOKENS):
            answers[place].append(token)
            if sum(map(len, answers)) == 5:
                cluster.kill(lost)
        assert answers == expected
        (recovery,) = cluster.recoveries
        assert recovery.device == lost
        assert lost not in {cluster.problem.names[one] for one in cluster.plan.placement}
        parts = recovery.detected_s + recovery.planning_s + recovery.loading_s + recovery.reading_s
        assert parts == pytest.approx(recovery.whole_s, rel=0.25)
        assert written(cluster) == expected
        cluster.join(lost)
        cluster.write(PROMPTS[0], 1)
        assert cluster.plan.placement == exact(cluster.problem, "latency").placement


def test_a_request_that_waits_for_nothing_is_read_again_when_it_goes_on(folder, start, expected):
    stage = Stage.load(folder, 0, PARTS)
    with cluster_of(folder, start, (0, 0, 1, 1, 2, 2)) as cluster:
        number = cluster.begin()
        cluster.read(number, PROMPTS[0])
        answer = []
        for _, token in cluster.stream(PROMPTS[1:], TOKENS):
            answer.append(token)
            if len(answer) == 2:
                cluster.kill("hub")
        assert answer == expected[1]
        stage.read(torch.tensor(PROMPTS[0]), 0)
        wanted = int(stage.read(torch.tensor([3]), len(PROMPTS[0])).argmax())
        assert wire.ids_of(cluster.read(number, [3])) == [wanted]


def test_an_end_between_requests_is_noticed(folder, start, expected):
    with cluster_of(folder, start, (0, 0, 1, 1, 1, 1)) as cluster:
        assert written(cluster) == expected
        cluster.kill("hub")
        time.sleep(0.2)
        assert written(cluster) == expected
        assert [one.device for one in cluster.recoveries] == ["hub"]


def test_two_ends_at_once(folder, start, expected):
    with cluster_of(folder, start, (0, 0, 1, 1, 2, 2)) as cluster:
        answers = [[], []]
        for place, token in cluster.stream(PROMPTS, TOKENS):
            answers[place].append(token)
            if sum(map(len, answers)) == 5:
                cluster.kill("hub")
                cluster.kill("cloud")
        assert answers == expected
        assert set(cluster.plan.placement) == {0}


def test_nothing_fits_any_more(folder, start):
    found = problem(devices=2, room=[3, 6])
    said = "^hub is gone, and no plan fits without it: The model takes"
    with cluster_of(folder, start, (0, 0, 0, 1, 1, 1), found) as cluster, pytest.raises(NoPlan, match=said):
        for _ in cluster.stream(PROMPTS, TOKENS):
            cluster.kill("hub")


def test_a_worker_that_ends_while_it_loads(folder, start):
    def failing(name, place):
        worker = start(name, place)
        worker.fails = ("load",) if name == "hub" else ()
        return worker

    with (
        pytest.raises((WorkerEnded, RuntimeError), match="died"),
        cluster_of(folder, failing, (0, 0, 0, 1, 1, 1)),
    ):
        pass
    assert all(one.worker._stage is None for one in start.workers.values())


def test_a_link_that_slows_down(folder, start):
    seconds = np.full((PARTS, 3), 1e-3)
    seconds[:, 0] = 0.02
    found = problem(mbps=100, round_trip_ms=100, seconds=seconds)
    with cluster_of(folder, start, (0, 1, 1, 1, 1, 1), found) as cluster:
        cluster.write(PROMPTS[0], 12)
        assert slowed_links(cluster) == []
        with pytest.raises(ClusterError, match="in use: edge to hub, hub to edge"):
            cluster.use_link("edge", "cloud", Link("slow", 1, 1))
        cluster.use_link(
            "edge", "hub", Link("slow", 0.02, 0.02, 100)
        )  # 2,500 bytes per second: 0.1 s for a token
        cluster.write(PROMPTS[0], 12)
        (slowed,) = slowed_links(cluster)
        assert (slowed.source, slowed.target) == ("edge", "hub")
        assert 0.005 < slowed.measured_mbps < 0.03  # a busy machine is slower still
        assert slowed.predicted_mbps == 100
        assert 1 not in slowed.plan.placement or slowed.plan.placement != cluster.plan.placement
        assert slowed.gain > 0
        cluster.adopt(slowed)
        assert len(cluster.write(PROMPTS[0], 2)) == 2


def test_an_error_of_a_stage_is_a_sentence(folder, start):
    with cluster_of(folder, start, (0, 0, 0, 1, 1, 1)) as cluster:
        number = cluster.begin()
        cluster.read(number, [1, 2])
        start.workers["hub"].worker._stage.forget(number)
        with pytest.raises(ClusterError, match="goes on at token 0 in this stage, not at 2"):
            cluster.read(number, [3])


def test_nothing_is_left_behind(folder, start):
    before = threading.active_count()
    with cluster_of(folder, start, (0, 0, 0, 1, 1, 1)) as cluster:
        cluster.write(PROMPTS[0], 1)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_a_slower_device_takes_longer(folder, start, monkeypatch):
    waited = []
    monkeypatch.setattr(worker, "sleep", waited.append)
    with cluster_of(folder, start, (0, 0, 0, 1, 1, 1), slow_down={"hub": 30.0}) as cluster:
        cluster.write(PROMPTS[0], 8)
        took = [one.done - one.begun for one in cluster.spent()["hub"] if one.tokens]
    assert len(waited) == len(took) == 8
    assert all(0 < more <= 29 * spent for spent, more in zip(took, waited, strict=True))


def test_clocks_are_compared(folder, start):
    with cluster_of(folder, start, (0, 0, 0, 1, 1, 1)) as cluster:
        cluster.write(PROMPTS[0], 4)
        spent = list(cluster.spent().values())
        for one, other in itertools.pairwise(spent):
            for mine, theirs in zip(one, other, strict=False):
                assert theirs.arrived - mine.done > -0.05


def test_bad_input_names_what_is_right():
    with pytest.raises(EdgeLabError, match="should be above 0"):
        Link("none", 0, 1)
