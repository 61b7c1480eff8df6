"""Planning: seconds for fleets of dozens, how EdgeShard's recurrence fares under memory limits, and its table.

Running: what was predicted beside what two stages on this machine take, over links of three widths; requests in flight;
what it costs to go on without a stage that was killed.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from edgelab.deployments.partition import planners, published
from edgelab.deployments.partition.problem import Problem
from edgelab.lab import profile
from edgelab.lab.partitions import PROMPT, Running, in_flight, over_rates, running
from edgelab.measure.latency import Timed
from edgelab.runtimes.eager import Eager

FLEETS = {
    "15 devices, a source and 3 types": (1, 11, 2, 1),
    "32 devices, a source and 4 types": (1, 8, 8, 8, 7),
}
BOUNDS = dict(zip(FLEETS, ("below 2 s", "below 20 s"), strict=True))
INSTANCES, LAYERS = 300, 80
RATES = [1, 10, 50]  # Mbps
TOKENS = 48


def fleet_of(counts: tuple[int, ...], layers: int) -> Problem:
    """Devices of some types, the first of which is the source; no type holds the model alone."""
    kinds = np.repeat(np.arange(len(counts)), counts)
    bandwidth = np.full((len(kinds), len(kinds)), 50.0)
    bandwidth[0, kinds == 2] = bandwidth[kinds == 2, 0] = 1.0
    return Problem(
        seconds=np.tile(np.array([10.0, 4.0, 1.0, 6.0, 2.0])[kinds], (layers, 1)),
        handed=np.full(layers, 8.0),
        memory=np.ones(layers),
        room=np.array([0.3, 0.4, 0.35, 0.2, 0.25])[kinds] * layers,
        bandwidth=bandwidth,
    )


def drawn(seed: int, layers: int = 7, devices: int = 4) -> Problem:
    """Random times and links, and memory that binds: all devices hold between once and twice the model."""
    random = np.random.default_rng(seed)
    memory = random.integers(1, 6, layers).astype(float)
    room = (random.dirichlet(np.ones(devices)) * memory.sum() * random.uniform(1, 2)).round()
    room[0] = max(room[0], memory[0])
    return Problem(
        seconds=random.uniform(0.5, 10, (layers, devices)),
        handed=random.uniform(1, 10, layers),
        memory=memory,
        room=room,
        bandwidth=random.uniform(0.2, 5, (devices, devices)),
        delay=random.uniform(0, 1, (devices, devices)),
    )


def rows() -> Iterator[tuple[str, str, str]]:
    for name, counts in FLEETS.items():
        for objective in ("latency", "throughput"):
            started = time.perf_counter()
            planners.exact(fleet_of(counts, LAYERS), objective)
            yield (
                f"{name}, {LAYERS} layers, {objective}, s",
                f"{time.perf_counter() - started:.2f}",
                BOUNDS[name],
            )
    kinds, more = Counter(), {"worse": [], "returning": []}
    for seed in range(INSTANCES):
        problem = drawn(seed)
        best = planners.plan_or_none("exact", problem, "latency")
        if best is None:
            kinds["no plan of one run fits"] += 1
            continue
        theirs = planners.plan_or_none("edgeshard", problem, "latency")
        kind = planners.verdict(problem, theirs, best)
        kinds[kind] += 1
        if kind in more:
            more[kind].append(100 * (theirs.cost / best.cost - 1))
    for kind, count in kinds.most_common():
        amount = f", median {statistics.median(more[kind]):+.1f} %" if more.get(kind) else ""
        yield f"EdgeShard's latency plan, {INSTANCES} instances: {kind}", f"{count}{amount}", ""
    for cell in published.compared().itertuples():
        bound = "within 35 %" if cell.confirmed and cell.model == "Llama-2-7B" and not cell.fitted else ""
        said = (
            f"{cell.planned_ms:.1f} ({cell.error_percent:+.0f} %)" if cell.planned_ms > 0 else "does not fit"
        )
        yield f"{cell.model}, {cell.planner}: ms per token, published {cell.published_ms:.1f}", said, bound
        said = f"{cell.planned_tok_s:.2f} ({cell.tok_s_error_percent:+.0f} %)"
        said += f", always full {cell.full_pipeline_tok_s:.0f}"
        if cell.planned_ms > 0:
            yield f"{cell.model}, {cell.planner}: tokens/s, published {cell.published_tok_s:.2f}", said, bound

    yield from executed()


def executed() -> Iterator[tuple[str, str, str]]:
    """Two stages of the embedded model on one thread each, cut where they take the same time."""
    cut = _balanced()
    with running(f"none @ partition:fleet=two_here,cut={cut}") as found:
        for one in over_rates(found, RATES, TOKENS).itertuples():
            off = 100 * (one.executed_ms / one.predicted_ms - 1)
            yield (
                f"two stages, cut at {cut}, {one.name}: ms per token, predicted {one.predicted_ms:.1f}",
                f"{one.executed_ms:.1f} ({off:+.0f} %)",
                "within 15 %",
            )
        rates = in_flight(found, [1, 2])
        formula, gain = (
            rates[name].iloc[1] / rates[name].iloc[0] for name in ("formula_tok_s", "executed_tok_s")
        )
        yield (
            f"two requests in flight over one: gain, {formula:.2f} by the formula from measured stages",
            f"{gain:.2f} ({gain / formula:.2f} of it)",
            "at least 0.85 of it, and 1.4",
        )
        account = found.session.account()
        yield (
            "bytes over links per token, without framing",
            f"{account['sent_bytes_per_token']:.0f}",
            f"{account['predicted_bytes_per_token']:.0f} by the formula",
        )
        yield from _killed(found)
        yield _whole(found.session.folder)


def _killed(found: Running) -> Iterator[tuple[str, str, str]]:
    prompt, tokens = ["Once upon a time there was a"], 24
    cluster = found.session.running()
    expected = "".join(piece for _, piece, _ in found.write(prompt, tokens))
    said = ""
    for count, (_, piece, _) in enumerate(found.write(prompt, tokens)):
        said += piece
        if count == tokens // 2:
            cluster.kill("cloud")
    (cost,) = cluster.recoveries
    parts = cost.detected_s, cost.planning_s, cost.loading_s, cost.reading_s
    yield (
        f"a stage is killed, s to the next token; {' + '.join(f'{one:.2f}' for one in parts)} (noticing, planning, "
        "loading, reading again)",
        f"{cost.whole_s:.2f} ({100 * (sum(parts) / cost.whole_s - 1):+.0f} %), "
        f"{'same' if said == expected else 'other'} tokens",
        "within 25 %, same tokens",
    )


def _whole(folder: Path) -> tuple[str, str, str]:
    timed = Timed(Eager(folder), PROMPT)
    timed.prefill()
    threads = torch.get_num_threads()
    return (
        f"the whole model on {threads} threads: ms per token",
        f"{statistics.median(timed.decode(TOKENS)):.1f}",
        "",
    )


def _balanced() -> int:
    """The part before which half of the time is spent."""
    spent = profile("none").decode_s(160).cumsum()
    return int(np.abs(spent - spent[-1] / 2).argmin()) + 1


if __name__ == "__main__":
    for what, value, bound in rows():
        print(what, "|", value, "|", bound)
