"""Text as it comes: greedy decoding of a conversation, piece by piece, with the rate so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from edgelab.corpora import check_tokens
from edgelab.runtimes.session import Session
from edgelab.tasks import endings

UNFINISHED = "\ufffd"  # what decoding shows for a character of which not all bytes are there


@dataclass(frozen=True)
class Piece:
    """Text that one token added, tokens written so far, and the engine's rate after the first; None for the first."""

    text: str
    tokens: int
    tok_s: float | None


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the model answers; without a chat template, its lines as plain text.

    messages: {"role": "user" | "assistant" | "system", "content": text}, oldest first.
    """
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return tokenizer("\n".join(message["content"] for message in messages) + "\n")["input_ids"]


def stream(
    session: Session, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], limit: int = 128
) -> Iterator[Piece]:
    """The answer to a conversation, token by token, until the model ends it or `limit` tokens are written.

    Raises CorpusError for a conversation with a token that the model has not.
    """
    ids = conversation_ids(tokenizer, messages)
    check_tokens(ids, session.vocabulary, tokenizer)
    token, ends = session.prefill(ids), endings(tokenizer)
    written: list[int] = []
    shown, spent = "", 0.0
    while token not in ends and len(written) < limit:
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        whole = shown if text.endswith(UNFINISHED) and len(written) < limit else text
        yield Piece(
            whole[len(shown) :], len(written), (len(written) - 1) / spent if len(written) > 1 else None
        )
        shown = whole
        if len(written) < limit:
            started = time.perf_counter()
            token = session.decode(token)
            spent += time.perf_counter() - started
