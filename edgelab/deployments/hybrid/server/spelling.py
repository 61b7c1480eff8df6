"""Tokens in bytes: what each adds to a text, where it is a part of a character too.

A byte-level BPE writes every byte as a character of its alphabet. SentencePiece writes a space as ▁, and bytes as
<0xNN> where it has no token for a character. Which of them it is, the decoder of the tokenizer tells.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"
BYTE = re.compile("<0x([0-9A-F]{2})>")


class Spelling:
    """What the tokens of a vocabulary are in bytes, and what they are called."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        self._special = {number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
        self._steps = {step["type"]: step for step in _decoding(tokenizer)}

    def bytes_of(self, token: int, begins: bool = False) -> bytes | None:
        """What a token adds to a text; None for a special token, and where nobody knows.

        begins: whether it is the first of its text, which loses its space in most kinds of SentencePiece.
        """
        text = self._tokenizer.convert_ids_to_tokens(token)
        if text is None or token in self._special:
            return None
        if "ByteLevel" in self._steps:
            known = all(character in self._alphabet for character in text)
            return bytes(map(self._alphabet.__getitem__, text)) if known else text.encode()
        if "ByteFallback" in self._steps and (byte := BYTE.fullmatch(text)):
            return bytes.fromhex(byte[1])
        if not self._steps.keys() & {"ByteFallback", "Metaspace"}:
            return None
        text = text.replace(SPACE, " ")
        return (text.removeprefix(" ") if begins and self._strips else text).encode()

    def name(self, token: int, begins: bool = False) -> str:
        r"""The text of a token; a part of a character is called bytes:\xf0\x9f, as OpenAI does."""
        found = self.bytes_of(token, begins)
        if found is None:
            return self._tokenizer.decode([token])
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + repr(found)[2:-1]

    @property
    def _strips(self) -> bool:
        metaspace = self._steps.get("Metaspace", {"prepend_scheme": "never"})
        return "Strip" in self._steps or metaspace["prepend_scheme"] != "never"


def _decoding(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The steps of a tokenizer's decoder; none of one that is not of the library tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str())["decoder"]
    return [] if decoder is None else decoder.get("decoders", [decoder])
