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
        "teacher_s",
        "teacher_mb",
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
        "teacher_s": record.get("teacher_s"),  # an older variant does not say
        "teacher_mb": record.get("teacher_mb"),
        "notes": " ".join(record["notes"]) or None,
        **record["numbers"],
    }
