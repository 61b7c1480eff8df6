"""A partition as a session: what every runtime does, over the stages of a plan."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from edgelab import recipes, runtimes
from edgelab.deployments.partition import actors, session
from edgelab.deployments.partition.profile import hidden_bytes
from edgelab.deployments.partition.wire import FRAME_BYTES
from edgelab.ledger.row import FIELDS
from edgelab.measure import MEASUREMENTS, measurements
from edgelab.runtimes.eager import Eager

IDS = [5, 100, 42, 7, 299, 12, 8]


@pytest.fixture
def opened(monkeypatch, variant, start):
    """`opened(recipe)`: a session on its deployment, with workers in threads in place of Ray's actors."""

    @contextmanager
    def started(address=None, threads=1):
        yield start

    monkeypatch.setattr(actors, "started", started)
    monkeypatch.setattr(session, "PROMPT", 8)
    found = []

    def make(text):
        recipe = recipes.parse(text)
        found.append(runtimes.load(recipe.deployment, variant(recipe.weights, num_hidden_layers=4)))
        return found[-1]

    yield make
    for one in found:
        one.close()


@pytest.mark.parametrize("recipe", ["none", "quantize.rtn:bits=4,group_size=32"])
def test_a_partition_writes_and_scores_as_one_stage(recipe, opened, variant):
    found = opened(f"{recipe} @ partition:fleet=two_here,cut=3")
    whole = Eager(variant(recipe, num_hidden_layers=4))
    assert found.vocabulary == whole.vocabulary
    torch.testing.assert_close(found.logits(IDS), whole.logits(IDS), rtol=1e-4, atol=1e-3)
    assert found.cluster is None  # texts are scored without workers
    token, expected = found.prefill(IDS), whole.prefill(IDS)
    for _ in range(3):
        assert token == expected
        token, expected = found.decode(token), whole.decode(expected)
    assert [one for one, _ in found.top(IDS, 3)] == [one for one, _ in whole.top(IDS, 3)]
    found.prefill(IDS[:3])
    found.extend(IDS[3:5])  # here
    assert found.decode(IDS[5]) == int(whole.logits(IDS[:6])[-1].argmax())  # and there, where it is read, too


def test_a_wire_format_shows_in_what_is_scored(opened):
    exact, rounded = (
        opened(f"none @ partition:fleet=two_here,cut=3,wire={one}") for one in ("float32", "int8")
    )
    off = (exact.logits(IDS) - rounded.logits(IDS)).abs().max()
    assert 0 < off < 0.5 * exact.logits(IDS).std()


def test_what_a_row_says_of_a_partition(opened):
    found = opened("none @ partition:fleet=two_here,cut=3,wire=int8,requests=3")
    found.prefill(IDS)
    values = found.account()
    assert set(values) == set(measurements()["partition"].fields) <= set(FIELDS)
    plan = json.loads(values.pop("plan"))
    assert [(one["device"], one["first"], one["last"]) for one in plan["stages"]] == [
        ("edge", "embedding", "block 1"),
        ("cloud", "block 2", "head"),
    ]
    assert all(one["measured_ms"] > 0 and one["weights_mb"] > 0 for one in plan["stages"])
    assert plan["pace"] == 1 and plan["link_bytes"]["edge > cloud"] > 0
    assert values["devices"] == 2 and values["in_flight"] == 3
    assert (
        values["sent_bytes_per_token"] == values["predicted_bytes_per_token"] == hidden_bytes(64, "int8") + 4
    )
    assert values["framing_bytes_per_token"] == 2 * FRAME_BYTES
    assert all(np.isfinite(one) and one > 0 for one in values.values())
    assert found.badge == "packed"


def test_faster_devices_run_at_a_slower_pace(opened):
    found = opened("none @ partition:fleet=edge_and_cloud,use=cloud")
    assert found.badge == "analytic"
    assert found.pace > 1
    assert min(found.slow_down.values()) == pytest.approx(1)
    assert set(found.slow_down) == {
        "edge",
        "cloud",
    }  # of all, so that whoever takes over is as slow as it should be
    link = found.running().links["edge", "cloud"].link
    assert link.up_mbps == pytest.approx(12 / found.pace)
    assert link.round_trip_ms == pytest.approx(found.pace * 70)  # what a hand-over takes comes by itself
    assert found.problem.hand_over_s > 0


def test_what_cannot_be_partitioned(variant):
    where = recipes.parse("none @ partition:fleet=two_here").deployment
    with pytest.raises(runtimes.RuntimeRefused, match="stages are run by PyTorch"):
        runtimes.load(where, variant("native.int8"))


def test_only_a_partition_is_measured_as_one():
    measurements()
    found = {name: one.deployment for name, one in MEASUREMENTS.items() if one.deployment}
    assert found == {"partition": "partition", "privacy": "redact"}
