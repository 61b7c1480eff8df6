"""The limits of a machine: right units and counts; how large they are is for the machine to say."""

import pytest
import torch
from torch import nn

from edgelab.measure import bandwidth
from edgelab.measure.bandwidth import Machine, layer_points, measure_machine, seconds_per_call


@pytest.fixture
def clock(monkeypatch):
    """A clock that says that every call took 2 ms."""
    now = iter(range(10_000))
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: 2e-3 * next(now))


def test_rates_are_counts_over_seconds(clock):
    assert bandwidth.read_gb_s(megabytes=4, seconds=0) == pytest.approx(4e6 / 2e-3 / 1e9)
    found = bandwidth.product_gflop_s(torch.float32, size=64, seconds=2)
    assert found == pytest.approx(2 * 64**3 / 2e-3 / 1e9)


def test_a_slow_dtype_is_measured_on_a_smaller_product(clock):
    # an eighth of the size takes 2 ms here, so that the whole would take 512 times as long
    found = bandwidth.product_gflop_s(torch.float16, size=64, seconds=1)
    assert found == pytest.approx(2 * 8**3 / 2e-3 / 1e9)


def test_every_dtype_has_a_rate_and_a_ridge():
    machine = measure_machine(megabytes=2, size=64, seconds=0)
    assert set(machine.gflop_s) == {"float32", "bfloat16", "float16", "int8"}
    assert machine.read_gb_s > 0 and min(machine.gflop_s.values()) > 0
    assert machine.threads == torch.get_num_threads()
    assert Machine(2, 25.0, {"int8": 1000.0}).ridge("int8") == 40


def test_calls_go_round(clock):
    seen = []
    calls = [lambda inputs, name=name: seen.append(name) or inputs for name in "abc"]
    assert seconds_per_call(calls, torch.ones(1), seconds=0) == pytest.approx(2e-3)
    assert seen[:3] == ["a", "b", "c"] and seen[3:] == ["a", "b", "c", "a"]  # one to warm up, then three


def test_points_count_operations_and_bytes(clock):
    layers = [nn.Linear(8, 4, bias=False) for _ in range(3)]
    points = layer_points(layers, 8, [1, 6], seconds=0)
    assert [point["tokens"] for point in points] == [1, 6]
    assert [point["flop_per_byte"] for point in points] == [
        0.5,
        3.0,
    ]  # two operations on four bytes, per token
    assert points[1]["gflop_s"] == pytest.approx(2 * 6 * 32 / 2e-3 / 1e9)
    assert points[1]["ms"] == pytest.approx(2)
    half = layer_points([layer.bfloat16() for layer in layers], 8, [1], seconds=0)
    assert half[0]["flop_per_byte"] == 1.0
