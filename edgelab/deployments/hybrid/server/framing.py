"""Numbers behind a line of JSON: how probabilities and hidden states travel without the third that base64 adds.

A body is JSON alone (application/json), or a line of JSON, a newline, and numbers as they are, little-endian
(application/octet-stream). JSON on one line holds no newline.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from edgelab.deployments.hybrid.server.messages import Refusal

JSON, BINARY = "application/json", "application/octet-stream"

Model = TypeVar("Model", bound=BaseModel)


def packed(head: BaseModel, numbers: bytes = b"") -> tuple[str, bytes]:
    """Type and bytes of a body; fields that say nothing are left out."""
    line = head.model_dump_json(exclude_none=True).encode()
    return (BINARY, line + b"\n" + numbers) if numbers else (JSON, line)


def unpacked(kind: str, body: bytes, model: type[Model]) -> tuple[Model, bytes]:
    """What `packed` made. Raises Refusal for anything else."""
    kind = kind.partition(";")[0].strip().lower()
    if kind not in (JSON, BINARY):
        raise Refusal(
            415, "unsupported_media_type", f"A body is {JSON} or {BINARY}, not {kind[:60] or 'untyped'!r}."
        )
    line, _, numbers = body.partition(b"\n") if kind == BINARY else (body, b"", b"")
    try:
        return model.model_validate_json(line), numbers
    except ValidationError as error:
        raise Refusal(
            400, "invalid_body", sentence(error.errors(include_url=False, include_input=False))
        ) from None


def sentence(errors: list[dict]) -> str:
    """The first of pydantic's findings, without what the client has sent."""
    first = errors[0]
    where = ".".join(str(place) for place in first["loc"] if place != "body")
    return f"{where[:100] or 'The body'}: {first['msg'][:200].rstrip('.')}."


def probabilities_bytes(probabilities: Tensor) -> bytes:
    """(draft, vocabulary) as float16. What is drafted has to be sampled from the rounded values."""
    return probabilities.detach().cpu().numpy().astype("<f2").tobytes()


def probabilities_of(numbers: bytes, draft: int, vocabulary: int) -> Tensor:
    """(draft, vocabulary) float64, as sent. Raises Refusal where bytes are missing or one is no probability."""
    if len(numbers) != 2 * draft * vocabulary:
        raise Refusal(
            400,
            "invalid_probabilities",
            f"{len(numbers)} bytes of probabilities came, and a draft of {draft} has {2 * draft * vocabulary}: "
            f"{vocabulary} in float16 for each token.",
        )
    found = torch.from_numpy(np.frombuffer(numbers, "<f2").astype(np.float64).reshape(draft, vocabulary))
    if not found.isfinite().all() or (found < 0).any() or ((found.sum(1) - 1).abs() > 0.1).any():
        raise Refusal(400, "invalid_probabilities", "Probabilities are at least 0 and sum to 1 in every row.")
    return found
