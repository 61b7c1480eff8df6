"""Saved answers routed anew: thresholds and links by hand, over four requests."""

import dataclasses
import json

import numpy as np
import pytest

from edgelab.deployments.hybrid.routing.curves import curve
from edgelab.deployments.hybrid.routing.gap import RoutingError
from edgelab.deployments.hybrid.routing.replay import Served, cascade, choices, over, quickest, served
from edgelab.devices.prices import prices
from edgelab.network import LinkError

MARGIN = [0.9, 0.1, 0.5, 0.3]


def bits(text):
    return np.array([one == "1" for one in text])


EDGE = Served(
    bits("1001"), bits("0000"), np.array([100.0, 200.0, 100.0, 300.0]), np.array([100.0, 200.0, 100.0, 300.0]),
    {"margin": np.array(MARGIN)}, usd_per_1k=0.001, edge_j=0.7,
)  # fmt: skip
CLOUD = Served(
    bits("1100"), bits("1111"), np.array([50.0, 80.0, 60.0, 70.0]), np.zeros(4),
    sent_bytes=1000, received_bytes=500, usd_per_1k=0.02, edge_j=0.0, link="wifi",
)  # fmt: skip


def test_two_of_four_are_sent():
    found = cascade(EDGE, CLOUD, "margin", 0.4)
    assert found.sent.tolist() == [False, True, False, True]
    assert found.right.tolist() == [True, True, False, False]
    assert (found.accuracy, found.share) == (0.5, 0.5)
    assert found.ms.tolist() == [100, 280, 100, 370]
    assert found.ms_at(50) == 190
    assert found.ms_at(95) == pytest.approx(280 + 0.85 * 90)
    assert (found.sent_bytes, found.received_bytes) == (500, 250)
    assert found.usd_per_1k == pytest.approx(0.011)
    assert found.edge_j == 0.7  # the edge answers each of them first
    assert not found.predicted


def test_the_best_threshold_beats_both():
    found = cascade(EDGE, CLOUD, "margin", 0.2)
    assert (found.accuracy, found.share) == (0.75, 0.25)
    assert EDGE.accuracy == CLOUD.accuracy == 0.5


def test_the_quickest_of_what_is_right_often_enough():
    """Means: 175 ms at the edge, half right; 65 ms in the cloud, half right; with one of four sent 195 ms, 3 right."""
    found = choices(EDGE, CLOUD, "margin", "wifi")
    assert next(iter(found)) == "edge only" and list(found)[-1] == "cloud at once" and len(found) == 11
    assert found["edge only"].ms.mean() == 175 and found["cloud at once"].ms.mean() == 65
    assert found["edge first, 20 % sent"].share == 0 and found["edge first, 30 % sent"].share == 0.25
    assert quickest(found, 0.5) == "cloud at once"
    assert quickest(found, 0.75) == quickest(found, 0.75 + 1e-15) == "edge first, 30 % sent"
    slow = choices(EDGE, CLOUD, "margin", "3g")
    assert quickest(slow, 0.5) == "edge only" and slow["edge first, 30 % sent"].predicted
    with pytest.raises(RoutingError, match=r"right 80\.0% of the time; the best is 75\.0%"):
        quickest(found, 0.8)


def test_the_ends_are_the_edge_alone_and_the_cloud_behind_the_edge():
    none, every = (cascade(EDGE, CLOUD, "margin", threshold) for threshold in (0.1, 1.0))
    assert none.ms.tolist() == EDGE.ms.tolist() and none.sent_bytes == 0 and none.usd_per_1k == 0.001
    assert none.right.tolist() == EDGE.right.tolist()
    assert every.right.tolist() == CLOUD.right.tolist() and every.share == 1
    assert every.ms.tolist() == [150, 280, 160, 370]


def test_every_point_of_the_curve_is_a_cascade():
    found = curve(EDGE.right, CLOUD.right, MARGIN)
    routed = [cascade(EDGE, CLOUD, MARGIN, one) for one in found.threshold]
    assert [one.share for one in routed] == found.share.tolist()
    assert [one.accuracy for one in routed] == found.accuracy.tolist()


def test_a_cloud_that_was_asked_in_vain_costs_its_time_and_leaves_the_answer():
    lost = Served(
        bits("1101"),
        bits("1110"),
        np.array([50.0, 80.0, 60.0, 1300.0]),
        np.array([0.0, 0.0, 0.0, 300.0]),
        link="wifi",
    )
    found = cascade(EDGE, lost, "margin", 0.4)
    assert found.sent.tolist() == [False, True, False, False]
    assert found.ms.tolist() == [100, 280, 100, 300 + 1000]
    assert found.right.tolist() == [True, True, False, True]


def test_over_another_link_by_bytes_and_round_trips():
    """wifi: 30 and 15 Mbps, 2 ms; lte: 12 and 12 Mbps, 70 ms."""
    found = over(CLOUD, "lte")
    change = (8 * 1500 / 12e6 - 8 * 1000 / 15e6 - 8 * 500 / 30e6) * 1e3 + 70 - 2
    assert (found.ms - CLOUD.ms).tolist() == pytest.approx([change] * 4)
    assert found.predicted and found.link == "lte"
    assert found.usd_per_1k == pytest.approx(0.02 + 1e3 * 1500 / 1e9 * prices().data["lte"])
    back = over(found, "wifi")
    assert back.ms.tolist() == pytest.approx(CLOUD.ms.tolist())
    assert back.usd_per_1k == pytest.approx(0.02)
    assert over(CLOUD, "wifi") is CLOUD
    assert cascade(EDGE, found, "margin", 0.4).predicted
    with pytest.raises(LinkError, match="No link is called 'moon'"):
        over(CLOUD, "moon")


def test_only_what_is_sent_changes_and_by_the_bytes_of_one_request():
    half = cascade(EDGE, CLOUD, "margin", 0.4)
    changed = over(half, "lte").ms - half.ms
    whole = over(CLOUD, "lte").ms - CLOUD.ms
    assert changed.tolist() == pytest.approx([0, whole[0], 0, whole[0]])
    assert over(EDGE, "lte").ms is EDGE.ms and not over(EDGE, "lte").predicted


def test_a_cloud_that_never_answered_is_no_edge_alone():
    """Every request missed its deadline: the edge's answers in its place have scores, and times are of this link."""
    lost = dataclasses.replace(EDGE, link="wifi", alone_share=1.0)
    assert EDGE.is_edge_alone and not lost.is_edge_alone
    assert over(lost, "lte").predicted and over(lost, "lte").ms is lost.ms
    assert over(lost, "wifi") is lost
    gone = dataclasses.replace(CLOUD, sent=bits("0000"))
    half = cascade(EDGE, gone, "margin", 0.4)
    assert half.alone_share == 0.5 and not half.is_edge_alone
    assert cascade(EDGE, gone, "margin", 0.1).is_edge_alone
    assert not served(row("cloud", sent="00", scores={"margin": [1, 2]}) | {"alone_share": 1.0}).is_edge_alone


def test_percentiles_are_of_answered_requests():
    found = served(row("split:cut=5", sent="10", answered="10"))
    assert found.ms_at(50) == found.ms_at(95) == 10
    none = served(row("split:cut=5", sent="00", answered="00"))
    assert none.ms_at(50) is None and none.accuracy == 0.5
    assert served(row("split:cut=5", sent="10")).ms_at(50) == 15  # a row of before does not say


def test_a_faster_link_takes_no_more_than_the_way():
    slow = Served(bits("1"), bits("1"), np.array([30.0]), np.array([25.0]), sent_bytes=1, link="lte")
    assert over(slow, "ethernet").ms.tolist() == [25]  # 30 ms over a round trip of 70 cannot be, but is asked


def row(runtime, right="10", **more):
    each = {"scores": {}, "sent": "11", "ms": [10.0, 20.0], "edge_ms": [0.0, 1.0], **more}
    return {
        "recipe": f"none @ {runtime}", "runtime": runtime, "served": json.dumps(each), "requests_right": right,
        "sent_bytes_per_request": 100.0, "received_bytes_per_request": 50.0, "usd_per_1k_requests": 0.5,
        "edge_j_per_request": float("nan"), "link": "lte", "alone_share": 0.0,
    }  # fmt: skip


def test_rows_are_read_with_their_round_trips():
    found = served(row("cloud:cloud=(none),link=lte"))
    assert found.right.tolist() == [True, False] and found.sent.all() and found.exchanges == 1
    assert found.edge_j is None and found.link == "lte" and not found.is_edge_alone
    assert served(row("speculative:draft=4", rounds=10)).exchanges == 2  # 2 requests, and 3 to warm up
    assert served(row("split:cut=5")).exchanges == 6
    assert served(row("torch", sent="00", scores={"margin": [1, 2]})).is_edge_alone


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"served": None}, "does not say how each request was answered"),
        ({"served": "{}"}, "does not say how each request was answered"),
        ({"requests_right": "101"}, "speaks of 2 and 3 requests"),
    ],
)
def test_rows_that_do_not_hold_requests(change, said):
    with pytest.raises(RoutingError, match=said):
        served(row("cloud") | change)


def test_scores_and_requests_have_to_be_the_same():
    with pytest.raises(RoutingError, match="No score is called 'luck'; there are margin"):
        cascade(EDGE, CLOUD, "luck", 0.5)
    with pytest.raises(RoutingError, match="of the same items"):
        cascade(EDGE, served(row("cloud")), "margin", 0.5)
