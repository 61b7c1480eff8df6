"""What it took to make a variant: seconds of all its stages, tokens seen, and what techniques have to say."""

from __future__ import annotations

from typing import Any

from edgelab.measure import Subject, measurement


@measurement(
    "cost",
    part="variant",
    needs="variant",
    fields=(
        "apply_s",
        "export_s",
        "calibration_tokens",
        "train_tokens",
        "train_corpus",
        "predicted_kld",
        "notes",
    ),
)
def cost(subject: Subject) -> dict[str, Any]:
    """As the variant was made, which may be an earlier run."""
    record = subject.about["record"]
    return {
        "apply_s": subject.about["apply_s"],
        "export_s": subject.export and subject.export.seconds,
        "calibration_tokens": record["calibration_tokens"],
        "train_tokens": record["train_tokens"],
        "train_corpus": record["train_corpus"],
        "notes": " ".join(record["notes"]) or None,
        **record["numbers"],
    }
