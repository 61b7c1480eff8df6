"""A plan on a clock: stages and links work on one thing at a time, requests wait in line, tokens come out.

    one request    tokens one after the other: sum of stages, links and the way back
    no bubbles     every request asks for its next token as soon as it has one
    bubbles        the next token of all requests begins when all of them have theirs

With m requests and stage times tau, a step gives tokens at m / max(m max tau, sum tau) without bubbles and at
m / ((m - 1) max tau + sum tau) with them, links counted as stages. Zhang et al. 2024 (EdgeShard), arXiv:2405.14371.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import pandas as pd

from edgelab.deployments.partition.problem import NoPlan, Problem, stages

BACK = "back"


@dataclass(frozen=True)
class Chain:
    """Stages and links of a plan in order. seconds: busy with one token; delay: on the way behind it.

    busy: what each of them keeps busy, by number; the source has two stages where the head comes back to it.
    """

    names: tuple[str, ...]
    seconds: np.ndarray
    delay: np.ndarray
    is_link: np.ndarray
    busy: np.ndarray

    @property
    def latency_s(self) -> float:
        """Of one token of one request."""
        return float(self.seconds.sum() + self.delay.sum())

    @property
    def busy_s(self) -> np.ndarray:
        """Seconds that each device and each link is busy with one token."""
        return np.bincount(self.busy, weights=self.seconds)


def chain(problem: Problem, placement: tuple[int, ...]) -> Chain:
    """What a token passes under a placement that gives each device one run, the head at home apart."""
    if not np.isfinite(problem.cost(placement, "latency")):
        raise NoPlan("This placement hands on between devices that no link connects.")
    runs, names, seconds, delay, links, busy = stages(placement), [], [], [], [], []
    for place, run in enumerate(runs):
        names.append(problem.names[run.device])
        seconds.append(problem.seconds[run.first : run.last, run.device].sum())
        delay.append(0.0)
        links.append(False)
        busy.append(("device", run.device))
        following = runs[place + 1].device if place + 1 < len(runs) else 0
        if following != run.device and problem.handed[run.last - 1]:
            names.append(f"{problem.names[run.device]} > {problem.names[following]}")
            seconds.append(problem.handed[run.last - 1] / problem.bandwidth[run.device, following])
            delay.append(problem.delay[run.device, following] + problem.hand_over_s)
            links.append(True)
            busy.append(("link", place))
    numbers = {what: number for number, what in enumerate(dict.fromkeys(busy))}
    return Chain(
        tuple(names),
        np.array(seconds),
        np.array(delay),
        np.array(links),
        np.array([numbers[what] for what in busy]),
    )


def pipeline_tok_s(seconds: np.ndarray, requests: int, bubbles: bool = False, delay_s: float = 0.0) -> float:
    """Tokens per second of all requests together, by formula. delay_s: on the way, when nothing is busy."""
    longest, whole = seconds.max(), seconds.sum() + delay_s
    step = (requests - 1) * longest + whole if bubbles else max(requests * longest, whole)
    return requests / step


def simulate(
    line: Chain,
    requests: int = 1,
    tokens: int = 8,
    *,
    prompt_tokens: int = 0,
    prefill: np.ndarray | None = None,
    bubbles: bool = False,
    jitter: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """When every stage and link works on what: columns request, token, place, name, start and end, in seconds.

    prefill: seconds of the first pass at each place, `prompt_tokens` times those of links if not given. jitter:
    standard deviation of the logarithm of every time. Token 0 is the first one, which the prompt's pass gives.
    """
    random = np.random.default_rng(seed)
    first = (
        prefill if prefill is not None else line.seconds * np.where(line.is_link, max(1, prompt_tokens), 1)
    )
    free = np.zeros(len(line.busy_s))
    done: list[tuple[int, int, int, str, float, float]] = []
    waiting: list[tuple[float, float, int, int, int, int]] = []  # now, ready, order, request, token, place
    order, finished = 0, {}

    def ask(ready: float, request: int, token: int, place: int, later: float = 0.0) -> None:
        nonlocal order
        heapq.heappush(waiting, (max(ready, later), ready, order, request, token, place))
        order += 1

    for request in range(requests):
        ask(0.0, request, 0, 0)
    while waiting:
        now, ready, _, request, token, place = heapq.heappop(waiting)
        start = max(now, free[line.busy[place]])
        if start > now:  # busy: looked at again when it is free, and who has waited longest comes first
            ask(ready, request, token, place, start)
            continue
        spent = (first if token == 0 else line.seconds)[place]
        if jitter:
            spent *= np.exp(random.normal(0, jitter))
        free[line.busy[place]] = start + spent
        done.append((request, token, place, line.names[place], start, start + spent))
        arrived = start + spent + line.delay[place]
        if place + 1 < len(line.seconds):
            ask(arrived, request, token, place + 1)
        elif token + 1 < tokens:
            if not bubbles:
                ask(arrived, request, token + 1, 0)
            else:
                finished[request] = arrived
                if len(finished) == requests:
                    begin = max(finished.values())
                    finished = {}
                    for one in range(requests):
                        ask(begin, one, token + 1, 0)
    return pd.DataFrame(done, columns=["request", "token", "place", "name", "start", "end"])


@dataclass(frozen=True)
class Predicted:
    """What a plan should do: time to first token and per token of one request, tokens per second of `requests` of them.

    bytes: of a token and of a prompt over every link, by its two ends, without framing.
    """

    ttft_ms: float
    tpot_ms: float
    tok_s: float
    requests: int
    token_bytes: dict[tuple[str, str], float]
    prompt_bytes: dict[tuple[str, str], float]


def predict(
    problem: Problem, placement: tuple[int, ...], prefill: np.ndarray, prompt: int, requests: int = 2
) -> Predicted:
    """From times of parts. prefill: (parts, devices), seconds for a prompt of so many tokens."""
    line, runs = chain(problem, placement), stages(placement)
    first, per_token, per_prompt = [], {}, {}
    for place, run in enumerate(runs):
        first.append(prefill[run.first : run.last, run.device].sum())
        following = runs[place + 1].device if place + 1 < len(runs) else 0
        size = problem.handed[run.last - 1]
        if following != run.device and size:
            whole = (
                size if run.last >= problem.layers - 1 else size * prompt
            )  # the head wants the last one alone
            first.append(whole / problem.bandwidth[run.device, following])
            ends = problem.names[run.device], problem.names[following]
            per_token[ends], per_prompt[ends] = float(size), float(whole)
    return Predicted(
        ttft_ms=1e3 * float(sum(first) + line.delay.sum()),
        tpot_ms=1e3 * line.latency_s,
        tok_s=pipeline_tok_s(line.busy_s, requests, delay_s=line.delay.sum()),
        requests=requests,
        token_bytes=per_token,
        prompt_bytes=per_prompt,
    )


def rates(tasks: pd.DataFrame) -> dict[str, float]:
    """Of a simulated run: time_to_first_token_s, latency_s per token behind the first, and tok_s of all together."""
    last = tasks[tasks["place"] == tasks["place"].max()]
    ends = last.pivot(index="token", columns="request", values="end")
    steady = ends.diff().iloc[1:]
    return {
        "time_to_first_token_s": float(ends.iloc[0].mean()),
        "latency_s": float(steady.to_numpy().mean()) if len(steady) else float("nan"),
        "tok_s": float(ends.size / ends.to_numpy().max()),
    }
