"""Requests: sentences to be gone on with, answered by a whole deployment one after the other.

Right is an answer that begins with the word that the sentence ends in. The first third of the items is not measured:
what a deployment has to choose, such as a threshold, it chooses there.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelab import assets, corpora, tasks
from edgelab.devices.prices import prices
from edgelab.measure import Subject, measurement
from edgelab.measure.intervals import accuracy

if TYPE_CHECKING:
    from edgelab.deployments.hybrid.answering import Answer

CORPUS = "wiki"
CHOOSING = 1 / 3  # of the items
WARM = 3  # requests before the first that is timed
WRITINGS, WRITINGS_FAST, WRITING_TOKENS = 12, 3, 32


@measurement(
    "requests",
    part="requests",
    needs="deployment",
    fields=(
        "link",
        "requests",
        "requests_items",
        "requests_right",
        "delta_requests",
        "delta_requests_low",
        "delta_requests_high",
        "requests_lost",
        "requests_won",
        "request_ms_p50",
        "request_ms_p95",
        "sent_bytes_per_request",
        "received_bytes_per_request",
        "cloud_share",
        "alone_share",
        "unanswered_share",
        "edge_j_per_request",
        "usd_per_1k_requests",
        "served",
    ),
    version=2,
)
def requests(subject: Subject) -> dict[str, Any]:
    """Accuracy of the answers, what a request takes, and what travels and what it costs."""
    items = tasks.requests(corpora.read(CORPUS))
    count = round(CHOOSING * len(items))
    choosing, measured = items[:count], items[count:]
    service = subject.service
    service.prepare(choosing, lambda done, total: subject.report(done, total + len(measured)))
    for request in choosing[:WARM]:
        service.answer(request)
    answers = []
    for request in measured:
        answers.append(service.answer(request))
        subject.report(count + len(answers), len(items))
    right = [[request.is_right(one.text)] for request, one in zip(measured, answers, strict=True)]
    return accuracy("requests", right, (subject.asked.baseline or {}).get("requests_right")) | {
        "link": service.link or None,
        **taken(answers, service.link, subject.asked.power_w),
        "served": json.dumps(service.account() | _each(answers)),
    }


@measurement(
    "writing",
    part="requests",
    needs="deployment",
    fields=("writing_ms_per_token", "acceptance", "tokens_per_round", "writing_sample"),
    version=2,
)
def writing(subject: Subject) -> dict[str, Any]:
    """Longer answers to the last of the requests: time per token, and how much of what was drafted was accepted."""
    asked = tasks.requests(corpora.read(CORPUS))[-(WRITINGS_FAST if assets.fast() else WRITINGS) :]
    answers = []
    for request in asked:
        answers.append(subject.service.answer(replace(request, tokens=WRITING_TOKENS)))
        subject.report(len(answers), len(asked))
    rounds, drafted = (sum(getattr(one, name) for one in answers) for name in ("rounds", "drafted"))
    times = [1e3 * one.seconds / one.tokens for one in answers if one.tokens]
    return {
        "writing_ms_per_token": float(np.median(times)) if times else None,
        "acceptance": sum(one.accepted for one in answers) / drafted if drafted else None,
        "tokens_per_round": sum(one.tokens for one in answers if one.rounds) / rounds if rounds else None,
        "writing_sample": [one.text for one in answers],
    }


def taken(answers: list[Answer], link: str, power_w: float | None) -> dict[str, Any]:
    """Fields of time, bytes, shares, energy and price of answers.

    Times are of the requests that were answered, None where none was: a split answers none while its cloud is down,
    and gives up at once. Bytes, energy and price are of all of them.
    """
    count = len(answers)
    joules = power_w * sum(one.edge_s for one in answers) if power_w else None
    usd = prices().of(
        read=sum(one.read for one in answers),
        written=sum(one.written for one in answers),
        n_bytes=sum(one.sent_bytes + one.received_bytes for one in answers),
        link=link,
        joules=joules or 0.0,
    )
    answered = [1e3 * one.seconds for one in answers if one.by != "nobody"]
    p50, p95 = map(float, np.percentile(answered, [50, 95])) if answered else (None, None)
    return {
        "request_ms_p50": p50,
        "request_ms_p95": p95,
        "sent_bytes_per_request": sum(one.sent_bytes for one in answers) / count,
        "received_bytes_per_request": sum(one.received_bytes for one in answers) / count,
        "cloud_share": sum(one.by == "cloud" for one in answers) / count,
        "alone_share": sum(one.wanted_cloud and one.by == "edge" for one in answers) / count,
        "unanswered_share": (count - len(answered)) / count,
        "edge_j_per_request": None if joules is None else joules / count,
        "usd_per_1k_requests": 1e3 * usd / count,
    }


def times(answers: list[Answer]) -> dict[str, list[float]]:
    """Of each answer: ms from the question to its end, and edge_ms, in which the edge computed."""
    return {
        "ms": [round(1e3 * one.seconds, 1) for one in answers],
        "edge_ms": [round(1e3 * one.edge_s, 1) for one in answers],
    }


def _each(answers: list[Answer]) -> dict[str, Any]:
    """What is known of every request, as lists in their order. Scores are there where every answer has them."""
    names = [name for name in answers[0].scores if all(name in one.scores for one in answers)]
    return {
        "scores": {name: [round(one.scores[name], 5) for one in answers] for name in names},
        "sent": "".join("01"[one.by == "cloud"] for one in answers),
        "answered": "".join("01"[one.by != "nobody"] for one in answers),
        **times(answers),
        "said": sorted({one.said for one in answers if one.said}),
    }
