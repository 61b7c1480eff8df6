"""The one place that makes keys: what a thing is made of is its address."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def key(*parts: object) -> str:
    """Twenty hexadecimal digits for JSON-able parts and paths; equal parts, equal key."""
    text = json.dumps(parts, sort_keys=True, default=_text)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _text(part: object) -> str:
    if isinstance(part, Path):
        return str(part)
    raise TypeError(f"A key is made of JSON-able parts, not of {type(part).__name__}.")
