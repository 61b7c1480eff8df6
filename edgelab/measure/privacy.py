"""Personal data under a policy: how much of it leaves the device, and what the policy costs in answers and in time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from edgelab.measure import Subject, measurement


@measurement(
    "privacy",
    part="privacy",
    needs="deployment",
    deployment="redact",
    fields=("leaked_share", "private_right", "private_ms_p50", "private_cloud_share", "private"),
)
def privacy(subject: Subject) -> dict[str, Any]:
    """Entities sent ÷ entities present, and the share of questions about messages that are answered rightly."""
    service, found = subject.service, []
    items = service.items()
    for item in items:
        found.append(service.private(item))
        subject.report(len(found), len(items))
    kinds = sorted({one.item.asks for one in found})
    by_kind = {
        kind: [int(one.is_right) for one in found if one.item.asks == kind] for kind in kinds
    }  # what is asked for: an entity, a part of one, or something else
    return {
        "leaked_share": service.leaked(found),
        "private_right": sum(one.is_right for one in found) / len(found),
        "private_ms_p50": float(np.median([1e3 * one.answer.seconds for one in found])),
        "private_cloud_share": sum(one.answer.by == "cloud" for one in found) / len(found),
        "private": json.dumps(
            {
                "right_by_kind": {kind: sum(right) / len(right) for kind, right in by_kind.items()},
                "items": len(found),
                "answers": [one.answer.text for one in found[:6]],
                "said": sorted({one.answer.said for one in found if one.answer.said}),
            }
        ),
    }
