"""OpenAI's shapes of what was written: answers in one piece, and pieces of answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgelab.deployments.hybrid.server.messages import (
    Chat,
    ChatAnswer,
    ChatChoice,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Finish,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from edgelab.deployments.hybrid.server.spelling import Spelling
from edgelab.deployments.hybrid.server.writing import Token


@dataclass
class Written:
    """Some tokens of an answer with the text that they add; offsets: where in the answer each one's text begins.

    begins: whether no token before it has a text. prompt_tokens: that were read before, known of a whole answer.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    begins: list[bool] = field(default_factory=list)
    finish: Finish | None = None
    prompt_tokens: int = 0

    def placed(self) -> Iterator[tuple[Token, bool]]:
        """Each token, and whether it begins the text."""
        return zip(self.tokens, self.begins, strict=True)

    def __iadd__(self, more: Written) -> Written:
        self.text += more.text
        self.tokens += more.tokens
        self.offsets += more.offsets
        self.begins += more.begins
        self.finish = more.finish or self.finish
        return self


@dataclass(frozen=True)
class Reply:
    """What all answers to one request have in common. with_logprobs: whether they were asked for."""

    spelling: Spelling
    model: str
    with_logprobs: bool
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, written: Written, usage: bool = True) -> Completion:
        """Of /v1/completions; without usage, a piece of one."""
        logprobs = None
        if self.with_logprobs:
            logprobs = CompletionLogprobs(
                tokens=[self.spelling.name(token.id, begins) for token, begins in written.placed()],
                token_logprobs=[token.logprob for token in written.tokens],
                top_logprobs=[self._by_name(token.top, begins) for token, begins in written.placed()],
                text_offset=written.offsets,
            )
        choice = CompletionChoice(
            index=0,
            text=written.text,
            token_ids=[token.id for token in written.tokens],
            logprobs=logprobs,
            finish_reason=written.finish,
        )
        return Completion(
            id=f"cmpl-{self.name}",
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=self.usage(written) if usage else None,
        )

    def chat(self, written: Written) -> Chat:
        """Of /v1/chat/completions."""
        choice = ChatChoice(
            index=0,
            message=ChatAnswer(role="assistant", content=written.text),
            token_ids=[token.id for token in written.tokens],
            logprobs=self._chat_logprobs(written),
            finish_reason=written.finish,
        )
        return Chat(
            id=f"chatcmpl-{self.name}",
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[choice],
            usage=self.usage(written),
        )

    def chat_piece(self, written: Written, is_first: bool) -> dict[str, Any]:
        """A piece of a chat as it is streamed."""
        logprobs = self._chat_logprobs(written)
        return {
            "id": f"chatcmpl-{self.name}",
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [
                {
                    "index": 0,
                    "delta": ({"role": "assistant"} if is_first else {}) | {"content": written.text},
                    "token_ids": [token.id for token in written.tokens],
                    "logprobs": logprobs.model_dump() if logprobs else None,
                    "finish_reason": written.finish,
                }
            ],
            "usage": None,
        }

    def usage(self, written: Written) -> Usage:
        """Tokens of a whole answer and its prompt."""
        read, count = written.prompt_tokens, len(written.tokens)
        return Usage(prompt_tokens=read, completion_tokens=count, total_tokens=read + count)

    def _chat_logprobs(self, written: Written) -> ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        content = [
            TokenLogprob(
                **self._ranked(token.id, token.logprob, begins),
                top_logprobs=[TopLogprob(**self._ranked(*one, begins)) for one in token.top],
            )
            for token, begins in written.placed()
        ]
        return ChatLogprobs(content=content)

    def _ranked(self, token: int, logprob: float, begins: bool) -> dict[str, Any]:
        found = self.spelling.bytes_of(token, begins)
        return {
            "id": token,
            "token": self.spelling.name(token, begins),
            "logprob": logprob,
            "bytes": None if found is None else list(found),
        }

    def _by_name(self, top: tuple[tuple[int, float], ...], begins: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in top:
            name = self.spelling.name(token, begins)
            found[name if name not in found else f"token_id:{token}"] = logprob
        return found
