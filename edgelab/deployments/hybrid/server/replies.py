"""OpenAI's shapes of what was written: answers in one piece, and pieces of answers."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
from edgelab.deployments.hybrid.server.writing import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Written:
    """Some tokens of an answer with the text that they add; offsets: where in the answer each one's text begins.

    prompt_tokens: that were read before, known of a whole answer.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: Finish | None = None
    prompt_tokens: int = 0

    def __iadd__(self, more: Written) -> Written:
        self.text += more.text
        self.tokens += more.tokens
        self.offsets += more.offsets
        self.finish = more.finish or self.finish
        return self


@dataclass(frozen=True)
class Reply:
    """What all answers to one request have in common. with_logprobs: whether they were asked for."""

    tokenizer: PreTrainedTokenizerBase
    model: str
    with_logprobs: bool
    name: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, written: Written, usage: bool = True) -> Completion:
        """Of /v1/completions; without usage, a piece of one."""
        logprobs = None
        if self.with_logprobs:
            logprobs = CompletionLogprobs(
                tokens=[self._text(token.id) for token in written.tokens],
                token_logprobs=[token.logprob for token in written.tokens],
                top_logprobs=[self._by_text(token.top) for token in written.tokens],
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
            usage=self._usage(written) if usage else None,
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
            usage=self._usage(written),
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
        }

    def _usage(self, written: Written) -> Usage:
        read, count = written.prompt_tokens, len(written.tokens)
        return Usage(prompt_tokens=read, completion_tokens=count, total_tokens=read + count)

    def _chat_logprobs(self, written: Written) -> ChatLogprobs | None:
        if not self.with_logprobs:
            return None
        content = [
            TokenLogprob(
                **self._ranked(token.id, token.logprob),
                top_logprobs=[TopLogprob(**self._ranked(*one)) for one in token.top],
            )
            for token in written.tokens
        ]
        return ChatLogprobs(content=content)

    def _ranked(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"id": token, "token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _by_text(self, top: tuple[tuple[int, float], ...]) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, logprob in top:
            text = self._text(token)
            found[text if text not in found else f"token_id:{token}"] = logprob
        return found

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])
