"""A partition's plan, what it predicts, and what its links carry: from a session that runs on several devices."""

from __future__ import annotations

from typing import Any

from edgelab.measure import Subject, measurement


@measurement(
    "partition",
    part="speed",
    needs="process",
    deployment="partition",
    fields=(
        "devices",
        "predicted_ttft_ms",
        "predicted_tpot_ms",
        "predicted_tok_s",
        "in_flight",
        "in_flight_tok_s",
        "plan",
        "sent_bytes_per_token",
        "predicted_bytes_per_token",
        "framing_bytes_per_token",
    ),
)
def partition(subject: Subject) -> dict[str, Any]:
    """What a session of several devices says of itself."""
    return subject.session.account()
