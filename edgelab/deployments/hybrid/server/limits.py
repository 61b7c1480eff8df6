"""What one server takes on before it says no."""

from __future__ import annotations

from dataclasses import dataclass, fields

from edgelab.errors import EdgeLabError


class LimitError(EdgeLabError):
    """A limit that would let nothing through."""


@dataclass(frozen=True)
class Limits:
    """Sizes of requests, how many at once, and how long each part of one may take.

    prompt_tokens: of a prompt, or of what is read at once. max_tokens: of an answer. draft_tokens: of a draft to
    verify. waiting: requests in the queue behind the one that computes; the next one is answered 429. connections:
    open at once, those that have not agreed upon TLS yet among them; the next one is answered 429 and closed.
    conversations: of verifying, where the one that is idle longest makes room, and of split inference, where a new one
    is answered 429. sequences: conversations of verifying whose keys and values are kept; sequence_bytes: of those of
    them that do not compute. Where there are more, the one used least recently is read again when it comes back. Keys
    and values of split inference may have as many bytes again. Those cannot be read again here: a step for which there
    is no room is answered 429, and what is kept stays. idle_s: after which a conversation is forgotten. head_s: until
    TLS is agreed upon, and then until the head of a request is there; body_s: until its body is; waiting_s: from then
    until its turn comes; request_s: from there to the end of the answer. closing_s: for answers under way at the end.
    """

    body_bytes: int = 4_000_000
    prompt_tokens: int = 2048
    max_tokens: int = 512
    draft_tokens: int = 16
    waiting: int = 32
    connections: int = 512
    conversations: int = 64
    sequences: int = 8
    sequence_bytes: int = 512_000_000
    idle_s: float = 120.0
    head_s: float = 5.0
    body_s: float = 10.0
    waiting_s: float = 60.0
    request_s: float = 60.0
    closing_s: float = 5.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), 0 if one.name == "waiting" else 1
            if one.type == "float" and not value > 0:
                raise LimitError(f"{one.name} is {value} and should be above 0 seconds.")
            if one.type == "int" and not value >= least:
                raise LimitError(f"{one.name} is {value} and should be at least {least}.")
