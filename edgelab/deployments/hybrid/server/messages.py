"""What is asked of the server, and what it answers: OpenAI's shapes where there are some, and two of our own.

Beside OpenAI's fields a choice holds `token_ids`, and nothing that is not known here is let pass in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from edgelab.deployments.hybrid import MOST_TEMPERATURE
from edgelab.errors import EdgeLabError

LARGEST_SEED = 2**63
MOST_TOP = 20  # alternatives that are told of each token


def _whole(text: str) -> str:
    """JSON can name half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate) is no text") from None
    return text


Item = TypeVar("Item")
# The first wrong item is enough: a description of all of them would be far larger than the body.
Several = Annotated[list[Item], Field(fail_fast=True)]
Text = Annotated[str, AfterValidator(_whole)]
TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[Several[TokenId], Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=64)]


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "list"


# One of the two is looked at, and not both
TextOrTokens = Annotated[
    Annotated[Text, Field(min_length=1), Tag("text")] | Annotated[Tokens, Tag("list")], Discriminator(_kind)
]
Stops = Annotated[
    Annotated[Stop, Tag("text")] | Annotated[Several[Stop], Field(max_length=4), Tag("list")],
    Discriminator(_kind),
]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{8,64}$")]
Step = Annotated[int, Field(ge=0, lt=2**31)]


class Refusal(EdgeLabError):
    """Something that the server does not do: status and code of HTTP, and one sentence."""

    def __init__(
        self, status: int, code: str, sentence: str, kind: str = "invalid_request_error", retry_s: int = 0
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.kind, self.retry_s = status, code, kind, retry_s

    def body(self) -> dict[str, dict[str, str]]:
        """OpenAI's shape of an error."""
        return {"error": {"message": str(self), "type": self.kind, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """What goes with it."""
        return {"retry-after": str(self.retry_s)} if self.retry_s else {}


class Strict(BaseModel):
    """A message without unknown fields, without conversions between types, without NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _stop_at_unknown(cls, given: Any) -> Any:
        """The first unknown field is enough: pydantic itself describes every one of them."""
        if isinstance(given, dict) and any(name not in cls.model_fields for name in given):
            raise PydanticCustomError("extra_forbidden", "a field is not known here")
        return given


# Errors


class ErrorDetail(Strict):
    """What went wrong: a sentence, its kind, and a code for programs."""

    message: str
    type: str
    code: str


class ErrorBody(Strict):
    """Every answer that is none."""

    error: ErrorDetail


# Writing


class Writing(Strict):
    """What completions and chats have in common. Temperatures below 0.001 are greedy."""

    model: Text | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=MOST_TEMPERATURE)
    seed: int | None = Field(None, ge=0, lt=LARGEST_SEED)
    stop: Stops | None = None
    stream: bool = False

    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def most(self) -> int | None:
        """Tokens that the answer may have; None for as many as there is room for."""
        return self.max_tokens


class CompletionRequest(Writing):
    """prompt: text, or token ids. logprobs: how many alternatives to tell of each token; null for none."""

    prompt: TextOrTokens
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(Writing):
    """messages: oldest first. logprobs: whether to tell them, with `top_logprobs` alternatives.

    max_completion_tokens: OpenAI's newer name of max_tokens. Without either the answer ends where the model ends it, or
    where there is no more room.
    """

    messages: Several[ChatMessage] = Field(min_length=1, max_length=256)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Usage(Strict):
    """Tokens read and written; the end of a text is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


Finish = Literal["stop", "length"]


class CompletionLogprobs(Strict):
    """Of each token: its text, log-probability, alternatives by their text, and where in the answer it begins.

    Of alternatives with equal texts, such as parts of characters, all but the likeliest are named token_id:NUMBER.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Strict):
    """The answer, or a piece of one. token_ids: of its tokens, one that completed a stop text among them."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(Strict):
    """Answer of /v1/completions; streamed, one for each token, and usage is null."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(Strict):
    """A token with its log-probability. id: its number, beside OpenAI's fields; bytes: of its text."""

    id: int
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A written token, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Strict):
    """Of each token."""

    content: list[TokenLogprob]


class ChatAnswer(Strict):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Strict):
    """The answer to a conversation."""

    index: int
    message: ChatAnswer
    token_ids: list[int]
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class Chat(Strict):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


# Verifying drafts, and the second part of a split model


class VerifyRequest(Strict):
    """One step of speculative decoding in a conversation that the client names.

    step: from 0; the last one may be sent again and is not done again. prompt: token ids, with step 0 and only there,
    together with temperature (0 is greedy) and seed. draft: token ids behind all that is known so far. When sampling,
    their probabilities follow, (draft, vocabulary) float16, in the order of the draft.
    """

    conversation: Name
    step: Step
    draft: Several[TokenId]
    prompt: Tokens | None = None
    temperature: float | None = Field(None, ge=0, le=MOST_TEMPERATURE)
    seed: int | None = Field(None, ge=0, lt=LARGEST_SEED)


class Verified(Strict):
    """How many drafted tokens stay, and the token behind them."""

    step: int
    accepted: int
    next: int


class HiddenRequest(Strict):
    """One step of split inference: hidden states of the next tokens of a conversation follow.

    step: from 0; the last one may be sent again and is not done again. tokens: how many. wire: how they are written,
    as `split.py` says. top: how many of the likeliest next tokens to tell with their log-probabilities.
    """

    conversation: Name
    step: Step
    tokens: int = Field(ge=1)
    wire: str = "float32"
    top: int = Field(0, ge=0, le=MOST_TOP)


class Ranked(Strict):
    """A token with its log-probability."""

    id: int
    logprob: float


class HiddenAnswer(Strict):
    """The likeliest next token, and the first few with their log-probabilities, best first."""

    step: int
    next: int
    top: list[Ranked]


class Health(Strict):
    """What runs here. context: tokens that fit; cut: layers that the edge runs in split inference, null for none.

    tokenizer: a fingerprint of the vocabulary, so that a client knows whether its own tokens mean the same here.
    """

    status: Literal["ok"]
    model: str
    kernel: str
    vocabulary: int
    tokenizer: str
    context: int | None
    cut: int | None
    waiting: int
    conversations: int
