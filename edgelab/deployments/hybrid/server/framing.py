"""Numbers behind a line of JSON: how probabilities and hidden states travel without the third that base64 adds.

A body is JSON alone (application/json), or a line of JSON, a newline, and numbers as they are, little-endian
(application/octet-stream). JSON on one line holds no newline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.deployments.hybrid.server.strict import ONLY

JSON, BINARY = "application/json", "application/octet-stream"

Model = TypeVar("Model", bound=BaseModel)


def packed(head: BaseModel, numbers: bytes = b"") -> tuple[str, bytes]:
    """Type and bytes of a body; fields that say nothing are left out."""
    line = head.model_dump_json(exclude_none=True).encode()
    return (BINARY, line + b"\n" + numbers) if numbers else (JSON, line)


def check_kind(headers: Mapping[str, str], *kinds: str) -> str:
    """The type of a body. Raises Refusal, 415, for none of `kinds`, and for one that is compressed."""
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = headers.get("content-encoding", "identity").strip().lower()
    wanted = f"send JSON with the header Content-Type: {' or '.join(kinds)}"
    if given not in kinds:
        what = f"of type {given[:60]!a}" if given else "without a type"
    elif coding != "identity":
        what, wanted = f"encoded as {coding[:60]!a}", f"{wanted}, and not encoded"
    else:
        return given
    raise Refusal(415, "unsupported_media_type", f"The body is {what}; {wanted}.")


def parsed(body: bytes) -> Any:
    """What a body of JSON holds. Raises Refusal where it is none, whatever is wrong with it."""
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1}: not UTF-8"
    except json.JSONDecodeError as error:
        what = f"character {error.pos + 1}: {error.msg.removesuffix(' at')}"
    except ValueError:
        what = "a number has too many digits"
    except RecursionError:
        what = "it is nested too deeply"
    raise Refusal(400, "invalid_json", f"The body is no JSON ({what}).")


def unpacked(headers: Mapping[str, str], body: bytes, model: type[Model]) -> tuple[Model, bytes]:
    """What `packed` made. Raises Refusal for anything else."""
    kind = check_kind(headers, JSON, BINARY)
    line, _, numbers = body.partition(b"\n") if kind == BINARY else (body, b"", b"")
    try:
        return model.model_validate(parsed(line)), numbers
    except ValidationError as error:
        raise Refusal(
            400, "invalid_body", sentence(error.errors(include_url=False, include_input=False))
        ) from None


def sentence(errors: list[dict]) -> str:
    """The first of pydantic's findings, without what the client has sent."""
    first = errors[0]
    where = ".".join(str(place) for place in first["loc"] if place != "body")
    colon = "" if first["type"] == ONLY else ":"
    return f"{where[:100] or 'The body'}{colon} {first['msg'][:300].rstrip('.')}."


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
