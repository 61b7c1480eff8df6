"""Fleets as files, profiles counted from shapes, and the published table."""

import dataclasses

import numpy as np
import pytest

from edgelab.deployments.partition import fleet as fleets
from edgelab.deployments.partition import planners, published
from edgelab.deployments.partition.fleet import FleetError
from edgelab.deployments.partition.problem import stages
from edgelab.deployments.partition.profile import from_shape, hidden_bytes, problem_of
from edgelab.devices.shapes import models

HEAD = "kind,name,to,what,count,room_gb,slow_down,source\n"


def written(tmp_path, lines):
    path = tmp_path / "mine.csv"
    path.write_text(HEAD + lines)
    return path


def test_every_fleet_of_the_project_can_be_read():
    known = fleets.fleets()
    assert {"edgeshard", "laptop_and_pis", "phones", "edge_and_cloud"} <= known.keys()
    for name in known:
        fleet = fleets.load(name)
        assert np.isinf(np.diag(fleet.bandwidth)).all()
        assert (fleet.delay >= 0).all()


def test_what_is_free_just_now_is_no_part_of_a_fleet(tmp_path, monkeypatch):
    here = fleets.this_machine()
    free, stated = "device,a,,This machine,,,,\n", "device,a,,This machine,,2,,\n"
    before = fleets.identity(written(tmp_path, free))
    monkeypatch.setattr(fleets, "this_machine", lambda: dataclasses.replace(here, usable_gb=1.5))
    assert fleets.identity(written(tmp_path, free)) == before
    assert fleets.load(tmp_path / "mine.csv").members[0].room_gb == 1.5
    assert fleets.identity(written(tmp_path, stated)) != before


def test_testbed_as_published():
    fleet = fleets.load("edgeshard")
    assert len(fleet.members) == 15
    assert fleet.names[:2] == ("source", "agx 1")
    source, cloud, agx = (fleet.index(name) for name in ("source", "cloud", "agx 11"))
    assert fleet.bandwidth[source, cloud] == fleet.bandwidth[cloud, source] == 1e6 / 8
    assert fleet.bandwidth[source, agx] == fleet.bandwidth[agx, cloud] == 50e6 / 8


def test_links_have_two_directions_and_later_lines_win(tmp_path):
    path = written(
        tmp_path,
        "device,a,,Raspberry Pi 5,1,,2,\ndevice,b,,Intel N100,2,4,,\nlink,*,*,100,,,,\nlink,a,b,wifi,,,,\n",
    )
    fleet = fleets.load(path)
    assert fleet.names == ("a", "b 1", "b 2")
    assert fleet.members[0].slow_down == 2
    assert fleet.members[1].room_gb == 4
    assert fleet.bandwidth[0, 1] == 15e6 / 8  # up from a
    assert fleet.bandwidth[1, 0] == 30e6 / 8
    assert fleet.bandwidth[1, 2] == 100e6 / 8
    assert fleet.delay[0, 2] == pytest.approx(0.001)
    assert fleet.only(["b 2", "a"]).bandwidth[0, 1] == 30e6 / 8


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("device,a,,Rasberry Pi 5,,,,\n", "line 2, column what: 'Rasberry Pi 5' should be a device"),
        ("device,a,,Raspberry Pi 5,x,,,\n", "line 2, column count: 'x' is no number"),
        ("device,a,,Raspberry Pi 5,1.5,,,\n", "column count: '1.5' should be a whole number"),
        ("device,a,,Raspberry Pi 5,1,0,,\n", "column room_gb: '0' should be a number above 0"),
        ("device,a,,Raspberry Pi 5,,,,\nlink,a,c,wifi,,,,\n", "line 3, column to: 'c' should be one of a"),
        (
            "device,a,,Raspberry Pi 5,,,,\nlink,a,a,wify,,,,\n",
            "line 3, column what: No link is called 'wify'",
        ),
        ("device,a,,Raspberry Pi 5,,,,\nlink,a,a,0,,,,\n", "line 3, column what: Link 0: down_mbps is 0.0"),
        ("device,a,,Raspberry Pi 5,,,,\ndevise,b,,Raspberry Pi 5,,,,\n", "line 3, column kind: 'devise'"),
        ("device,a,,Raspberry Pi 5,,,,\ndevice,a,,Raspberry Pi 5,,,,\n", "two devices are called 'a'"),
        ("link,*,*,wifi,,,,\n", "has no device"),
        ("device,,,Raspberry Pi 5,,,,\n", "line 2, column name: '' should be a name"),
        ("device,a,,Raspberry Pi 5,1,,,a source, and more\n", "line 2: there are 9 cells for 8 columns"),
        ("device,a,,Raspberry Pi 5\nlink,a\n", "line 3, column what: '' should be a link"),
        (
            "device,a,,Raspberry Pi 5,,,,\nlink,a,a,inf,,,,\n",
            "line 3, column what: Link inf: down_mbps is inf",
        ),
        ("device,a,,Raspberry Pi 5,,,,\nlink,a,a,1_000,,,,\n", "column what: No link is called '1_000'"),
    ],
)
def test_typos_are_named_with_line_and_column(tmp_path, lines, said):
    with pytest.raises(FleetError, match=said.replace("*", r"\*")):
        fleets.load(written(tmp_path, lines))


def test_unknown_columns_and_fleets(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("kind,name,to,what,memory\n")
    with pytest.raises(FleetError, match="line 1: no column is called 'memory'; there are kind"):
        fleets.load(path)
    with pytest.raises(FleetError, match="there are edge_and_cloud, edgeshard"):
        fleets.load("nothing")


def test_bytes_of_a_hidden_state():
    assert hidden_bytes(4096) == 16_384  # Llama-2-7B
    assert hidden_bytes(8192) == 32_768  # 70B
    assert hidden_bytes(576) == 2304  # the embedded model
    assert hidden_bytes(576, "float16") == 1152
    assert hidden_bytes(576, "int8") == 580
    assert hidden_bytes(576, "int4") == 288 + 18 * 2


def test_profile_counts_what_is_read_and_held():
    shape, fleet = models()["Llama-2-7B"], fleets.load("edgeshard")
    profile = from_shape(shape, fleet, 1.0, context=1)
    assert len(profile.names) == 34
    assert profile.memory.sum() == pytest.approx(
        4 * (shape.linear_parameters + shape.embedding_parameters), rel=1e-3
    )
    read = 4 * (
        shape.linear_parameters + shape.vocab_size * shape.hidden_size
    )  # of the embedding one row only
    assert profile.seconds[:, 0].sum() == pytest.approx(read / 204.8e9)
    assert profile.handed[-1] == 4  # the id of a token goes back
    many = from_shape(shape, fleet, 1.0, requests=8, context=128)
    assert (many.memory - profile.memory)[1] == pytest.approx(2 * 4096 * 4 * (8 * 128 - 1))


def test_head_weighs_eight_blocks_of_the_embedded_model():
    shape = models()["SmolLM2-135M"]
    fleet = fleets.load("edge_and_cloud")
    seconds = from_shape(shape, fleet, 1.0).seconds[:, 0]
    assert seconds[-1] / seconds[1] == pytest.approx(8.0, abs=0.01)


def test_private_ends_stay_on_the_source():
    shape, fleet = models()["Llama-2-7B"], fleets.load("edgeshard")
    problem = problem_of(from_shape(shape, fleet, 0.9), fleet, first=3, last=1)
    plan = planners.exact(problem, "latency")
    assert plan.placement[:3] == (0, 0, 0) and plan.placement[-1] == 0
    assert 14 in plan.placement  # the cloud has the blocks between them
    alone = planners.edge_solo(problem, "latency")
    assert plan.cost < 0.6 * alone.cost
    apart = dataclasses.replace(problem, returning=0)
    assert planners.exact(apart, "latency").placement == (0,) * 34  # a chain that ends where it began


def test_published_table():
    """One efficiency, fitted on one cell; what does not fit does not fit here, and who wins is who won there."""
    table = published.compared().set_index(["model", "planner"])
    assert published.fitted_efficiency() == pytest.approx(0.92, abs=0.005)
    assert (table["published_ms"].isna() == table["planned_ms"].isna()).all()
    confirmed = table.loc["Llama-2-7B"]
    assert (confirmed[confirmed["confirmed"]]["error_percent"].abs() < 35).all()
    for model in ("Llama-2-7B", "Llama-2-13B"):
        planned = table.loc[model, "planned_ms"]
        assert planned["edgeshard"] == planned.min()
        assert planned["cloud_edge_even"] == planned.max()
    seven = table.loc["Llama-2-7B", "planned_ms"]
    assert 1 - seven["edgeshard"] / seven["edge_solo"] > 0.4  # published: up to 50 %
    assert table.loc[("Llama-2-70B", "edgeshard"), "planned_ms"] < 0.6 * 3086


def test_published_throughput():
    """One batch, fitted on the source alone: confirmed cells of 7B, and twice the throughput where it was published."""
    table = published.compared().set_index(["model", "planner"])
    assert published.fitted_batch() == pytest.approx(24.36 * 0.1403)
    assert (table["published_tok_s"].isna() == table["planned_tok_s"].isna()).all()
    seven = table.loc["Llama-2-7B"]
    assert seven.loc["edge_solo", "planned_tok_s"] == pytest.approx(24.36)
    assert (seven["tok_s_error_percent"].abs() < 35).all()
    for model, other in (("Llama-2-7B", "edge_solo"), ("Llama-2-13B", "cloud_edge_opt")):
        for column in ("published_tok_s", "planned_tok_s"):
            assert table.loc[(model, "edgeshard"), column] > 2 * table.loc[(model, other), column]
    assert (table["full_pipeline_tok_s"] >= table["planned_tok_s"])[table["planned_tok_s"].notna()].all()


def test_relay_around_the_slow_link_is_what_wins_in_the_testbed():
    fleet = fleets.load("edgeshard")
    problem = problem_of(from_shape(models()["Llama-2-7B"], fleet, published.fitted_efficiency()), fleet)
    plan = planners.exact(problem, "latency")
    devices = [problem.names[stage.device] for stage in stages(plan.placement)]
    assert devices[0] == "source"
    assert "cloud" in devices
    assert devices.index("cloud") > 1


def test_peers_of_one_network_are_as_fast_as_the_slower_way(tmp_path):
    path = tmp_path / "peers.csv"
    lines = "kind,name,to,what,count\ndevice,a,,Raspberry Pi 5,1\ndevice,b,,Raspberry Pi 5,2\n"
    path.write_text(lines + "link,*,*,wifi,\n")
    fleet = fleets.load(path)
    off = ~np.eye(3, dtype=bool)
    assert set(fleet.bandwidth[off]) == {15e6 / 8}  # wifi: 30 Mbps down, 15 up
    path.write_text(lines + "link,a,b,wifi,\n")
    fleet = fleets.load(path)
    assert (fleet.bandwidth[0, 1:] == 15e6 / 8).all() and (fleet.bandwidth[1:, 0] == 30e6 / 8).all()
    for line, said in {"link,a,,wifi,\n": "column to: ''", "link,a,b,,\n": "column what: ''"}.items():
        path.write_text(lines + line)
        with pytest.raises(FleetError, match=said):
            fleets.load(path)
