"""Personal data under a policy: how much of it leaves the device, and what the policy costs.

Time, bytes, energy and price are counted as those of requests are, but have fields of their own: a question about a
message has a longer prompt and a longer answer than a sentence to be gone on with.
"""

from __future__ import annotations

import json
from typing import Any

from edgelab.measure import Subject, measurement
from edgelab.measure.requests import WARM, taken, times

KEPT = 6  # answers, of different templates
TAKEN = {
    "private_ms_p50": "request_ms_p50",
    "private_ms_p95": "request_ms_p95",
    "private_cloud_share": "cloud_share",
    "private_sent_bytes": "sent_bytes_per_request",
    "private_received_bytes": "received_bytes_per_request",
    "private_edge_j": "edge_j_per_request",
    "private_usd_per_1k": "usd_per_1k_requests",
}  # fields here, by those of requests that mean the same


@measurement(
    "privacy",
    part="privacy",
    needs="deployment",
    deployment="redact",
    fields=("leaked_share", "private_right", *TAKEN, "private"),
    version=3,
)
def privacy(subject: Subject) -> dict[str, Any]:
    """Entities sent ÷ entities present, the share of questions about messages answered rightly, and what one takes."""
    service, found = subject.service, []
    items = service.items()
    service.prepare([], lambda done, total: None)  # nothing has to be chosen
    for item in service.others(WARM):
        service.private(item)
    for item in items:
        found.append(service.private(item))
        subject.report(len(found), len(items))
    answers = [one.answer for one in found]
    spent = taken(answers, service.link, subject.asked.power_w)
    kinds = sorted({one.item.asks for one in found})
    by_kind = {
        kind: [int(one.is_right) for one in found if one.item.asks == kind] for kind in kinds
    }  # what is asked for: an entity, a part of one, or something else
    return {
        "leaked_share": service.leaked(found),
        "private_right": sum(one.is_right for one in found) / len(found),
        **{name: spent[same] for name, same in TAKEN.items()},
        "private": json.dumps(
            {
                "right_by_kind": {kind: sum(right) / len(right) for kind, right in by_kind.items()},
                "items": len(found),
                "answers": [one.text for one in answers[:: max(len(answers) // KEPT, 1)][:KEPT]],
                "said": sorted({one.said for one in answers if one.said}),
                **times(answers),
            }
        ),
    }
