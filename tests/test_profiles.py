"""Profiles: timed here, saved, edited, scaled to a fleet; plans made from them, saved and read."""

import json

import numpy as np
import pytest

from edgelab import recipes
from edgelab.deployments.partition import Partition
from edgelab.deployments.partition.fleet import FleetError, load
from edgelab.deployments.partition.planning import plan_of, profile_for, read_plan
from edgelab.deployments.partition.problem import NoPlan
from edgelab.deployments.partition.profile import ProfileError, Timings, read, scales, spread
from edgelab.deployments.partition.profiling import measured
from edgelab.recipes import RecipeError


def timings(**changes):
    """Four parts by hand: an embedding, two blocks and a head."""
    given = {
        "model": "tiny", "recipe": "none", "device": "This machine", "threads": 1, "hidden_size": 10,
        "memory_bandwidth_gb_s": 34.2, "hand_over_ms": 0.5, "contexts": [32, 128], "prompts": [32, 128],
        "parts": ["embedding", "block 0", "block 1", "head"],
        "decode_ms": [[1.0, 1.0], [2.0, 4.0], [2.0, 4.0], [8.0, 8.0]],
        "prefill_ms": [[1.0, 1.0], [10.0, 40.0], [10.0, 40.0], [8.0, 8.0]],
        "weight_bytes": [800.0, 100.0, 100.0, 800.0], "cache_bytes": [0.0, 2.0, 2.0, 0.0],
    }  # fmt: skip
    return Timings(**given | changes)


def test_between_lengths_a_straight_line():
    found = timings()
    assert found.decode_s(80).tolist() == [0.001, 0.003, 0.003, 0.008]
    assert found.prefill_s(80).tolist() == pytest.approx([0.001, 0.025, 0.025, 0.008])
    assert found.prefill_s(256)[1] == pytest.approx(0.08)  # beyond what was timed: as much a token
    assert found.prefill_s(16)[1] == pytest.approx(0.01)  # below: as the shortest


def test_scaled_to_a_fleet_by_memory_bandwidth():
    fleet = load("laptop_and_pis")
    found = spread(timings(), fleet, context=128, prompt=32, requests=2)
    factors = {member.name: 34.2 / member.device.memory_bandwidth_gb_s for member in fleet.members}
    assert factors["pi 1"] == pytest.approx(2.0)
    assert found.seconds[:, 0].tolist() == pytest.approx([0.002, 0.008, 0.008, 0.016])
    assert found.memory.tolist() == [800, 100 + 2 * 128 * 2, 100 + 2 * 128 * 2, 800]
    assert found.handed.tolist() == [40, 40, 40, 4]
    assert scales(timings(), load("two_here")).tolist() == [1, 1]


def test_every_member_by_its_own_profile():
    fleet = load("two_here")
    both = {"edge": timings(), "cloud": timings(decode_ms=[[1.0, 1.0]] * 4, hand_over_ms=0.7)}
    found = spread(both, fleet, context=32)
    assert found.seconds.T.tolist() == [[0.001, 0.002, 0.002, 0.008], [0.001] * 4]
    assert found.hand_over_s == 0.7e-3
    with pytest.raises(ProfileError, match="No profile of cloud; there are those of edge"):
        spread({"edge": timings()}, fleet)


def test_a_file_can_be_shared_and_edited(tmp_path):
    path = tmp_path / "profile.json"
    timings().save(path)
    assert read(path) == timings()
    assert sum('"parts": "block' in line for line in path.read_text().splitlines()) == 2  # a line for each
    with pytest.raises(
        ProfileError, match="is a profile of tiny, and the model is another; measure that one"
    ):
        read(path, "another")
    path.write_text(path.read_text().replace('"decode_ms": [2.0, 4.0]', '"decode_ms": [2.0, 4.0'))
    with pytest.raises(ProfileError, match=r"profile.json, line \d+, column \d+"):
        read(path)
    path.write_text('{"model": "tiny"}')
    with pytest.raises(ProfileError, match="is no profile"):
        read(path)
    with pytest.raises(ProfileError, match="edgelab plan"):
        read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decode_ms": [[1.0, 1.0]] * 3}, "3 lines of decode_ms for 4 parts"),
        ({"prefill_ms": [[1.0]] * 4}, "prefill_ms should have 2 numbers"),
        ({"decode_ms": [[1.0, -1.0]] * 4}, "from 0 on"),
    ],
)
def test_profiles_that_are_none(changes, said):
    with pytest.raises(ProfileError, match=said):
        timings(**changes)


@pytest.mark.parametrize("recipe", ["none", "quantize.rtn:bits=4,group_size=32 + quantize.embedding"])
def test_the_parts_of_a_variant_are_timed(recipe, variant):
    found = measured(variant(recipe), "tiny", recipe, contexts=(8, 16), prompts=(4, 8))
    assert found.parts == ["embedding", "block 0", "block 1", "head"]
    assert np.shape(found.decode_ms) == (4, 2)
    assert (np.array(found.decode_ms) > 0).all() and (np.array(found.prefill_ms) > 0).all()
    assert found.hand_over_ms > 0 and found.memory_bandwidth_gb_s > 0
    assert found.weight_bytes[1] == found.weight_bytes[2]
    if recipe == "none":
        assert found.weight_bytes == [
            300 * 64 * 4,
            *[4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 128)] * 2,
            300 * 64 * 4,
        ]
    assert found.cache_bytes == [0, 2 * 32 * 4, 2 * 32 * 4, 0]


def plan(settings, given=None, fleet=None):
    given, fleet = given or timings(), fleet or load(settings.fleet)
    return plan_of(settings, profile_for(settings, given, fleet), fleet)


def test_a_plan_is_saved_read_and_run_again(tmp_path):
    found = plan(Partition(fleet="two_here", cut="2"))
    assert found.plan.placement == (0, 0, 1, 1)
    assert [(one["device"], one["first"], one["last"]) for one in found.stages()] == [
        ("edge", "embedding", "block 0"),
        ("cloud", "block 1", "head"),
    ]
    path = tmp_path / "plan.json"
    found.save(path, "none @ partition")
    assert read_plan(path)["placement"] == ["edge", "edge", "cloud", "cloud"]
    again = plan(Partition(fleet="two_here", plan=str(path)))
    assert again.plan.placement == found.plan.placement
    path.write_text(json.dumps(read_plan(path) | {"placement": ["edge"] * 3}))
    with pytest.raises(NoPlan, match="a plan for 3 parts, and this model has 4"):
        plan(Partition(fleet="two_here", plan=str(path)))
    path.write_text("[]")
    with pytest.raises(NoPlan, match="is no plan"):
        read_plan(path)


def test_what_is_predicted_is_the_sum_of_its_parts():
    settings = Partition(fleet="two_here", cut="2")
    found = plan(settings).predicted
    link_ms = 40 * 8 / 10e6 * 1e3
    back_ms = 4 * 8 / 10e6 * 1e3
    assert found.tpot_ms == pytest.approx(1 + 4 + 4 + 8 + link_ms + back_ms + 2 * 0.5)
    assert found.ttft_ms == pytest.approx(1 + 40 + 40 + 8 + 128 * link_ms + back_ms + 2 * 0.5)
    assert found.token_bytes == {("edge", "cloud"): 40, ("cloud", "edge"): 4}
    assert found.prompt_bytes == {("edge", "cloud"): 128 * 40, ("cloud", "edge"): 4}


def test_devices_that_have_to_take_part_or_must_not():
    assert set(plan(Partition(fleet="two_here", use="cloud")).plan.placement) == {0, 1}
    assert set(plan(Partition(fleet="two_here", avoid="cloud")).plan.placement) == {0}
    assert plan(Partition(fleet="two_here", use="cloud", last=1, first=1)).plan.placement[0] == 0
    with pytest.raises(FleetError, match="has no 'moon'; it has edge, cloud"):
        plan(Partition(fleet="two_here", avoid="moon"))


def test_settings_that_cannot_be():
    for text, said in {
        "cut=a": "cut=a is no list of parts",
        "cut=2,plan=x.json": "give one of the two",
        "requests=0": "at least 1",
        "first=0": "the text is on the source",
        "last=-1": "at least 0",
    }.items():
        with pytest.raises(RecipeError, match=said):
            recipes.parse(f"none @ partition:{text}")
    for cut in ("4", "2/2", "1/2/3", "0"):
        with pytest.raises(FleetError, match="growing parts from 1 to 3, at most 1 of them"):
            plan(Partition(fleet="two_here", cut=cut))


def test_another_fleet_file_is_another_question(tmp_path):
    path = tmp_path / "mine.csv"
    lines = "kind,name,to,what\ndevice,a,,This machine\ndevice,b,,This machine\nlink,a,b,{}\n"
    path.write_text(lines.format(10))
    before = Partition(fleet=str(path)).reads()
    assert before == Partition(fleet=str(path)).reads()
    path.write_text(lines.format(20))
    assert before != Partition(fleet=str(path)).reads()


def test_energy_needs_the_power_of_every_device():
    with pytest.raises(FleetError, match="edge has no power in the catalogue"):
        plan(Partition(fleet="two_here", objective="energy"))
    found = plan(Partition(fleet="laptop_and_pis", objective="energy"))
    assert found.plan.cost > 0


def test_a_plan_that_returns_is_no_chain(tmp_path):
    path = tmp_path / "plan.json"
    plan(Partition(fleet="laptop_and_pis")).save(path, "none")
    placement = ["pi 1", "laptop", "pi 2", "laptop"]
    path.write_text(json.dumps(read_plan(path) | {"placement": placement}))
    with pytest.raises(NoPlan, match="returns to a device that it has left"):
        plan(Partition(fleet="laptop_and_pis", plan=str(path)))
    path.write_text(json.dumps(read_plan(path) | {"placement": ["pi 1", "laptop", "laptop", "pi 1"]}))
    assert len(plan(Partition(fleet="laptop_and_pis", plan=str(path))).stages()) == 3  # the head at home
