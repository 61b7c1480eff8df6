"""The fleet editor and the live partition: what their controls do."""

import re
import time

import pytest

from edgelab.deployments.partition.profile import Timings
from edgelab.widgets.fleet import fleet_editor
from edgelab.widgets.partition import live_partition


def control(box, description):
    found = [one for one in walk(box) if getattr(one, "description", "") == description]
    assert len(found) == 1, description
    return found[0]


def walk(box):
    yield box
    for child in getattr(box, "children", ()):
        yield from walk(child)


def milliseconds(box):
    return float(re.search(r'data-ms="([\d.]+)"', box.children[1].value)[1])


@pytest.fixture
def timings():
    parts = ["embedding", *(f"block {place}" for place in range(6)), "head"]
    return Timings(
        "tiny", "none", "This machine", 1, 576, 20.0, 0.5, [32], [32], parts,
        [[0.1], *[[10.0]] * 6, [40.0]], [[0.1], *[[100.0]] * 6, [40.0]], [1e6] * 8, [1e3] * 8,
    )  # fmt: skip


def test_a_faster_link_and_less_memory_change_the_plan():
    box = fleet_editor()
    before = milliseconds(box)
    assert "EdgeShard" in box.children[1].value and "does not fit" not in box.children[1].value
    assert 'alt="' in box.children[2].value
    control(box, "Cloud (Mbps)").value = 50
    assert milliseconds(box) < before
    control(box, "Memory (%)").value = 60
    assert milliseconds(box) > before
    control(box, "Model").value = "Llama-2-70B"
    control(box, "Memory (%)").value = 30
    assert "all devices together have" in box.children[1].value and box.children[2].value == ""
    control(box, "Weights").value = 4
    assert "ms per token" in box.children[1].value


def test_devices_are_chosen_and_another_fleet_offers_its_own():
    box = fleet_editor()
    control(box, "Fleet").value = "phones"
    assert control(box, "Devices").options == ("phone 1", "phone 2", "phone 3", "router")
    control(box, "Weights").value = 4
    control(box, "Devices").value = ("phone 1",)
    assert "phone 1 runs" in box.children[1].value and "phone 2" not in box.children[1].value
    control(box, "Devices").value = ()
    assert box.children[1].value == "Choose at least one device."


@pytest.mark.parametrize("objective", ["throughput", "energy", "slow_bytes"])
def test_every_objective_is_planned(objective):
    box = fleet_editor(name="edge_and_cloud")
    control(box, "Weights").value = 4
    control(box, "Least").value = objective
    control(box, "Wire").value = "int8"
    assert milliseconds(box) > 0


def test_where_no_power_is_known_energy_is_not_planned():
    box = fleet_editor()
    control(box, "Least").value = "energy"
    assert "source has no power in the catalogue" in box.children[1].value


def test_a_planner_that_gives_none_says_why():
    box = fleet_editor()
    control(box, "Least").value = "throughput"
    assert "15 devices" in box.children[1].value and "14 devices are the most here" in box.children[1].value


def test_a_model_that_was_timed_here(timings):
    box = fleet_editor(timings, "two_here")
    assert control(box, "Model").value == "tiny, timed here"
    assert control(box, "Weights").disabled
    assert milliseconds(box) == pytest.approx(100.1, rel=0.01)


def test_a_live_partition_says_why_it_cannot_run(tiny):
    box = live_partition("none @ partition:fleet=moon", model=str(tiny))
    write, kill = control(box, "Write"), control(box, "Kill a device")
    assert kill.disabled and not write.disabled
    write.click()
    deadline = time.monotonic() + 60
    while write.disabled and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "moon is no file and no fleet" in box.children[2].value
    kill.click()  # nothing runs: nothing happens
