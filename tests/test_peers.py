"""The side-by-side with the peer libraries: its table, its check of their weights, and what a failing peer becomes."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import peers
from edgelab.techniques.quantization.rtn import quantize_affine


def test_table_is_ordered_by_task_then_perplexity_with_failures_last():
    three, four, pairs = peers.Task(3), peers.Task(4), peers.Task(pattern="2:4")
    rows = [
        peers.Result("Wanda", "a peer", pairs, 145.0, zeros=0.5, seconds=108.0),
        peers.Result("HQQ", "hqq 1", three, 40.0, 3.7, seconds=10.04),
        peers.Result("GPTQ", "a peer", four, error="out of\nmemory | disk"),
        peers.Result("HQQ", "hqq 1", four, 26.256, 4.5, seconds=79.44),
        peers.Result("quantize.gptq:bits=4", "edgelab", four, 25.5, 4.3125, seconds=60.0),
    ]
    assert peers.table(rows)[2:] == [
        "| 4 bits | `quantize.gptq:bits=4` | edgelab | 25.50 | 4.312 |  | 60.0 |",
        "| 4 bits | `HQQ` | hqq 1 | 26.26 | 4.500 |  | 79.4 |",
        "| 4 bits | `GPTQ` | a peer | out of memory / disk |  |  |  |",
        "| 3 bits | `HQQ` | hqq 1 | 40.00 | 3.700 |  | 10.0 |",
        "| half, 2:4 | `Wanda` | a peer | 145.00 |  | 50.00% | 108.0 |",
    ]


def test_own_and_peer_of_a_method_take_turns():
    assert peers.Task(pattern="4:8").contestants == (
        *("prune.wanda", "llmcompressor/wanda"),
        *("prune.sparsegpt", "llmcompressor/sparsegpt"),
    )
    assert set(peers.Task(4).contestants) | set(peers.Task(pattern="4:8").contestants) == {
        *peers.OWN,
        *peers.PEERS,
    }


def test_most_kept_counts_within_groups_of_the_pattern():
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0]])
    assert peers.most_kept(weight, "2:4") == 0.5
    assert peers.most_kept(weight, "4:8") == peers.most_kept(weight, "unstructured") == 0.375
    assert peers.most_kept(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), "2:4") == 0.75
    assert peers.zeros([weight, torch.ones(1, 2)]) == 0.5


def test_most_values_counts_within_groups():
    weight = torch.tensor([[1.0, 2.0, 1.0, 2.0], [3.0, 3.0, 4.0, 5.0]])
    assert peers.most_values(weight, 2) == 2
    assert peers.most_values(weight, 4) == 3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounded_weights_hold_no_more_values_than_their_bits_tell(bits):
    torch.manual_seed(0)
    weight = torch.randn(32, 192)
    assert peers.most_values(weight, 64) == 64
    assert peers.most_values(quantize_affine(weight, bits, 64).dequantize(), 64) <= 2**bits


def worker(tmp_path, monkeypatch, source: str, timeout_s: float = 30) -> dict:
    """What `in_peers_environment` makes of a worker with this source."""
    script = tmp_path / "worker.py"
    script.write_text(source)
    monkeypatch.setattr(peers, "WORKER", script)
    monkeypatch.setattr(peers, "PYTHON", sys.executable)
    return peers.in_peers_environment({"out": str(tmp_path), "threads": 1}, timeout_s)


def test_report_of_a_worker_is_read(tmp_path, monkeypatch):
    report = {"seconds": 1.5, "bits_per_weight": 4.5, "version": "1"}
    source = f"import pathlib; pathlib.Path('report.json').write_text({json.dumps(json.dumps(report))})"
    assert worker(tmp_path, monkeypatch, source) == report


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise SystemExit('no such kernel\\n\\n')", "The process ended with exit code 1: no such kernel"),
        ("import os; os._exit(3)", "The process ended with exit code 3: it said nothing"),
        ("import os; os.kill(os.getpid(), 9)", "The process was killed, most likely because memory ran out."),
    ],
)
def test_a_worker_that_dies_leaves_its_reason(tmp_path, monkeypatch, source, reason):
    assert worker(tmp_path, monkeypatch, source) == {"error": reason}


def test_a_worker_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    report = worker(tmp_path, monkeypatch, "import time; time.sleep(60)", timeout_s=0.5)
    assert report == {"error": "It took longer than the limit of 0 s."}
