"""Protocols of perplexity: window, which tokens score, whether a BOS token comes first, tokens or words.

Published perplexities of one model differ because protocols differ. So a protocol has a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgelab.errors import EdgeLabError


class ProtocolError(EdgeLabError):
    """An unknown protocol, or one that does not fit the model."""


@dataclass(frozen=True)
class Protocol:
    """How perplexity is computed.

    window: tokens the model sees. stride: tokens from one window to the next. scored: "all" but the first token, the
    second "half", or "rolling" (every token once, each window predicting `window` tokens after one of context).
    bos: "added" puts the BOS token in place of the first of each window, where the model's tokenizer itself adds one
    (llama.cpp's `add_bos`); "always" (rolling) puts it, or else EOS, before the text.
    unit: what the sum is divided by, "token" or "word". version: raised when the numbers change.
    """

    name: str
    window: int
    scored: Literal["all", "half", "rolling"] = "all"
    bos: Literal["", "added", "always"] = ""
    unit: Literal["token", "word"] = "token"
    version: int = 1

    @property
    def stride(self) -> int:
        return self.window  # none of the four overlaps its windows


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("edgelab-512", window=512),
        Protocol("gptq-2048", window=2048),
        Protocol("llamacpp-512", window=512, scored="half", bos="added", version=2),
        Protocol("lm-eval-word", window=2048, scored="rolling", bos="always", unit="word"),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of a name. Raises ProtocolError naming all of them."""
    if name not in PROTOCOLS:
        raise ProtocolError(f"There is no protocol '{name}'; use one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
