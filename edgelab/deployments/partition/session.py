"""A partition as a session: planned for a fleet from times measured here, and run by workers over shaped links.

Every number that the stages compute is what one stage of all parts computes, so texts are scored in this process, by
the same stages and with the rounding of the wire; what is timed goes through workers and links.

Where a device of the fleet is faster than this machine, time runs slower for all of them: workers, links and delays
take `pace` times as long, and measured times are divided by it.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from edgelab.deployments.partition import Partition, actors, wire
from edgelab.deployments.partition.cluster import Cluster
from edgelab.deployments.partition.fleet import Fleet, load
from edgelab.deployments.partition.planners import explained
from edgelab.deployments.partition.planning import PROMPT, plan_of, profile_for
from edgelab.deployments.partition.problem import Plan, stages
from edgelab.deployments.partition.profile import Timings, scales
from edgelab.deployments.partition.profiling import count_of, measured
from edgelab.deployments.partition.seats import Start
from edgelab.deployments.partition.stage import Stage
from edgelab.deployments.partition.wire import FRAME_BYTES
from edgelab.devices.catalogue import HERE
from edgelab.devices.shapes import ModelShape, ShapeError
from edgelab.network import LOCAL
from edgelab.runtimes.session import Can, TwoGraphs
from edgelab.storage import variants
from edgelab.storage.description import Description

IN_FLIGHT_TOKENS = 16  # of each request, for the throughput


class Partitioned(TwoGraphs):
    """A variant on a fleet. Planned when it is loaded; workers start when something is to be written or timed."""

    badge = "packed"
    can = Can(rewind=False)
    elsewhere = True
    tolerance = 1e-4  # float32 sums in another order

    @classmethod
    def _refusal(cls, about: Description) -> str | None:
        if about.marks.native is not None:
            return (
                f"native.{about.marks.native} is rounded by an engine itself, and stages are run by PyTorch."
            )
        try:
            ModelShape.from_config(AutoConfig.for_model(**about.config))
        except (ShapeError, ValueError) as error:
            return f"This model is not cut into stages: {error}"
        return None

    def __init__(self, variant: Path, deployment: Partition) -> None:
        super().__init__()
        self.folder, self.settings = variant, deployment
        self.slow_down: dict[str, float] = {}
        self._launch: Start | None = None
        fleet = load(deployment.fleet)
        self.vocabulary = variants.load_config(variant).get_text_config().vocab_size
        self._stack = ExitStack()
        self.cluster: Cluster | None = None
        try:
            timings = self._timings(fleet)
            self.planned = plan_of(deployment, profile_for(deployment, timings, fleet), fleet)
        except BaseException:
            self._stack.close()
            raise
        self.plan, self.problem = self.planned.plan, self.planned.problem
        if not deployment.address:
            self._stand_in(timings, fleet)
        self.kernel = f"{len(set(self.plan.placement))} stages, {deployment.wire} states"

    def _timings(self, fleet: Fleet) -> Timings | dict[str, Timings]:
        """What the parts take: on this machine, or on each one of a cluster."""
        about = variants.read_about(self.folder)
        names = str(about.get("model", "")), str(about.get("recipe", ""))
        threads = self.settings.threads
        if not self.settings.address:
            return measured(self.folder, *names, threads=threads, contexts=(32, 256), prompts=(32, PROMPT))
        start = self._stack.enter_context(actors.started(self.settings.address, threads))
        there = {name: start(name, place) for place, name in enumerate(fleet.names)}
        self._stack.callback(lambda: [worker.kill() for worker in there.values()])  # those of no stage
        self._launch = lambda name, place: there.pop(name, None) or start(name, place)
        asked = str(self.folder), *names, threads
        waiting = {name: worker.begin("profile", *asked) for name, worker in there.items()}
        return {name: Timings(**wait()) for name, wait in waiting.items()}

    def _stand_in(self, timings: Timings, fleet: Fleet) -> None:
        """How this machine plays all others: how much slower each of them is, and time with it."""
        used = sorted(set(self.plan.placement))
        factors = scales(timings, fleet)
        self.pace = max(1.0, float(1 / factors[used].min()))
        self.slow_down = {
            name: float(factor * self.pace) for name, factor in zip(fleet.names, factors, strict=True)
        }
        if any(fleet.members[place].device.name != HERE for place in used):
            self.badge = "analytic"

    def running(self) -> Cluster:
        """The workers, started now if they are not running."""
        if self.cluster is None:
            if self._launch is None:
                self._launch = self._stack.enter_context(actors.started(threads=self.settings.threads))
            real = bool(self.settings.address)
            self.cluster = self._stack.enter_context(
                Cluster(
                    self.folder, self.problem, self.plan, self._launch, wire=self.settings.wire,
                    slow_down=self.slow_down, pace=self.pace, shaped=not real, host=actors.here() if real else LOCAL,
                )
            )  # fmt: skip
        return self.cluster

    def prefill(self, ids: list[int]) -> int:
        """Start a new sequence; only a token comes back over the link."""
        self._start()
        return self._token(ids)

    def decode(self, token: int) -> int:
        """Go on by one token; only a token comes back over the link."""
        return self._token([token])

    def _token(self, ids: list[int]) -> int:
        graph = self._graphs.setdefault(False, _There(self.running()))
        found = graph.token(self.ids[graph.length :] + ids)
        self.ids, self._last = self.ids + ids, None
        return found

    def _open(self, every: bool) -> _Here | _There:
        return _Here(self.folder, self.plan, self.settings.wire) if every else _There(self.running())

    def in_flight_tok_s(self, requests: int, tokens: int = IN_FLIGHT_TOKENS) -> float:
        """Tokens per second of so many requests at once, behind the first token of each."""
        prompts, times = [[11 + place] * 8 for place in range(requests)], []
        for _ in self.running().stream(prompts, tokens):
            times.append(time.perf_counter())
        return self.pace * (len(times) - requests) / (times[-1] - times[requests - 1])

    def account(self) -> dict[str, Any]:
        """Fields of a row: the plan, what it predicts, and what was measured beside time per token."""
        cluster = self.running()
        predicted = self.planned.predicted
        before = {ends: proxy.traffic.up for ends, proxy in cluster.links.items()}
        tok_s = self.in_flight_tok_s(self.settings.requests)
        spent, peak_mb = cluster.spent(), cluster.peak_mb()
        runs = list(cluster.runs().items())
        following = [*(run.device for _, run in runs[1:]), 0]
        sent = [
            float(np.median([one.sent - FRAME_BYTES for one in spent[name] if one.tokens == 1]))
            for (name, run), target in zip(runs, following, strict=True)
            if run.device != target
        ]
        return {
            "devices": len(set(self.plan.placement)),
            "predicted_ttft_ms": predicted.ttft_ms,
            "predicted_tpot_ms": predicted.tpot_ms,
            "predicted_tok_s": predicted.tok_s,
            "in_flight": self.settings.requests,
            "in_flight_tok_s": tok_s,
            "sent_bytes_per_token": sum(sent),
            "predicted_bytes_per_token": sum(predicted.token_bytes.values()),
            "framing_bytes_per_token": FRAME_BYTES * len(sent),
            "plan": json.dumps(
                {
                    "planner": self.plan.planner if not self.settings.cut else "cut",
                    "pace": self.pace,
                    "threads": self.settings.threads,
                    "stages": [
                        stage
                        | {
                            "measured_ms": 1e3 * _median(spent[name]) / self.pace,
                            "weights_mb": cluster.loaded[name]["bytes"] / 1e6,
                            "peak_rss_mb": peak_mb[name],
                        }
                        for name, stage in zip(spent, self.planned.stages(), strict=True)
                    ],
                    "explained": explained(self.problem, self.plan, self.planned.profile.names),
                    "link_bytes": {
                        " > ".join(ends): cluster.links[ends].traffic.up - passed for ends, passed in before.items()
                    },
                }
            ),
        }  # fmt: skip

    def close(self) -> None:
        """Stop the workers."""
        super().close()
        self._stack.close()
        self.cluster = None


def _median(steps: list) -> float:
    return float(np.median([one.done - one.begun for one in steps if one.tokens == 1]))


class _Here:
    """The stages in this process, for texts: logits of every position, with the rounding of the wire."""

    def __init__(self, folder: Path, plan: Plan, format_: str) -> None:
        runs = stages(plan.placement) if format_ != "float32" else []
        ends = [run.first for run in runs[1:]]
        count = count_of(folder)
        self.stages = [Stage.load(folder, first, last) for first, last in pairwise([0, *ends, count])]
        self.wire, self.length = format_, 0

    def read(self, ids: list[int]) -> Tensor:
        given = torch.tensor(ids)
        for stage in self.stages[:-1]:
            given = wire.through(stage.read(given, self.length, every=True), self.wire)
        found = self.stages[-1].read(given, self.length, every=True)
        self.length += len(ids)
        return found

    def cut(self, length: int) -> None:
        for stage in self.stages:
            stage.forget()
        self.length = 0


class _There:
    """The workers, for what is written: the next token, or its logits."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.length = cluster, 0
        self.request: int | None = None

    def token(self, ids: list[int]) -> int:
        return wire.ids_of(self._read(ids, logits=False))[0]

    def read(self, ids: list[int]) -> Tensor:
        return torch.frombuffer(bytearray(self._read(ids, logits=True)), dtype=torch.float32)[None]

    def _read(self, ids: list[int], logits: bool) -> bytes:
        if self.request is None:
            self.request = self.cluster.begin()
        found = self.cluster.read(self.request, ids, logits)
        self.length += len(ids)
        return found

    def cut(self, length: int) -> None:
        if self.request is not None:
            self.cluster.forget(self.request)
        self.request, self.length = None, 0
