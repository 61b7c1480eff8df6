"""Ray starts and watches the stages: the same tokens, an actor killed in mid-sentence, nothing left afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgelab import recipes, runtimes
from edgelab.deployments.partition import actors
from edgelab.deployments.partition.cluster import Cluster
from edgelab.deployments.partition.problem import Problem, planned
from edgelab.deployments.partition.profile import hidden_bytes
from edgelab.deployments.partition.seats import ClusterError
from edgelab.deployments.partition.stage import Stage, generate
from edgelab.runtimes.eager import Eager

PROMPTS, TOKENS, PARTS = [[5, 100, 42, 7], [9, 8, 7, 6, 5, 4]], 12, 6


def problem():
    return Problem(
        seconds=np.full((PARTS, 2), 1e-3),
        handed=np.array([hidden_bytes(64)] * (PARTS - 1) + [4.0]),
        memory=np.ones(PARTS),
        room=np.full(2, float(PARTS)),
        bandwidth=np.full((2, 2), 1e9),
        names=("edge", "cloud"),
    )


def test_tokens_through_ray_and_a_stage_that_is_killed(variant):
    folder = variant("quantize.rtn:bits=4,group_size=32", num_hidden_layers=4)
    stage = Stage.load(folder, 0, PARTS)
    expected = [generate([stage], prompt, TOKENS, number) for number, prompt in enumerate(PROMPTS)]
    plan = planned(problem(), (0, 0, 0, 1, 1, 1), "latency", "exact")
    with actors.started() as start, Cluster(folder, problem(), plan, start) as cluster:
        assert [cluster.write(prompt, TOKENS) for prompt in PROMPTS] == expected
        processes = {name: seat.begin("process")() for name, seat in cluster._seats.items()}
        assert os.getpid() not in processes.values() and len(set(processes.values())) == 2
        answers = [[], []]
        for place, token in cluster.stream(PROMPTS, TOKENS):
            answers[place].append(token)
            if sum(map(len, answers)) == 8:
                os.kill(processes["cloud"], signal.SIGKILL)
        assert answers == expected
        (recovery,) = cluster.recoveries
        assert recovery.device == "cloud" and set(cluster.plan.placement) == {0}
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, processes.values())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, processes.values()))


def test_no_cluster_answers():
    with (
        pytest.raises(
            ClusterError, match=r"No Ray cluster answers at auto .*start one with `ray start --head`"
        ),
        actors.started("auto"),
    ):
        pass


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(actors.RayMissing, match=r"pip install --editable '\.\[cluster\]'"), actors.started():
        pass


def test_a_running_cluster_is_planned_from_what_its_machines_measure(variant, monkeypatch):
    """Two names for this machine: each worker times the model itself, and links are as they are."""
    ray = Path(sys.executable).parent / "ray"
    named = json.dumps({"edge": 1, "cloud": 1})
    command = [ray, "start", "--head", "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--port=0",
               f"--resources={named}", "--num-cpus=2", f"--object-store-memory={actors.STORE_BYTES}",
               "--disable-usage-stats"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    try:
        folder = variant("none", num_hidden_layers=4)
        whole = Eager(folder)
        where = recipes.parse("none @ partition:fleet=two_here,cut=3,address=auto").deployment
        with closing(runtimes.load(where, folder)) as session:
            assert session.prefill(PROMPTS[0]) == whole.prefill(PROMPTS[0])
            assert session.running().links == {}
            assert session.pace == 1 and session.slow_down == {}
    finally:
        subprocess.run([ray, "stop", "--force"], check=False, capture_output=True, timeout=60)
