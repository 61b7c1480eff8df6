"""What is asked of the server, and what it answers: OpenAI's shapes where there are some, and two of our own.

Beside OpenAI's fields a choice holds `token_ids`, and nothing that is not known here is let pass in silence.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from edgelab.deployments.hybrid import MOST_TEMPERATURE
from edgelab.deployments.hybrid.server.strict import (
    Empty,
    No,
    Nothing,
    Null,
    One,
    PlainText,
    Several,
    Stops,
    Strict,
    Text,
    TextOrTokens,
    TokenId,
    Tokens,
    Zero,
    alone,
    kind,
)
from edgelab.errors import EdgeLabError

LARGEST_SEED = 2**63
MOST_TOP = 20  # alternatives that are told of each token

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


class StreamOptions(Strict):
    """include_usage: whether a stream ends with the number of its tokens."""

    null_is_default = True

    include_usage: bool = False


class Writing(Strict):
    """What completions and chats have in common; null is the default of every field.

    Temperatures below 0.001 are greedy. Of what does nothing here, `user` may be anything, and the others the one value
    at which they do nothing elsewhere either.
    """

    null_is_default = True

    model: Text | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=MOST_TEMPERATURE)
    seed: int | None = Field(None, ge=0, lt=LARGEST_SEED)
    stop: Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: One = 1
    top_p: One = 1
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: Nothing = Field(default_factory=dict)
    user: Text = ""

    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def most(self) -> int | None:
        """Tokens that the answer may have; None for as many as there is room for."""
        return self.max_tokens

    def counts(self) -> bool:
        """Whether a stream ends with the number of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Writing):
    """prompt: text, or token ids; a list of one of them is taken too.

    logprobs: how many alternatives to tell of each token; null for none.
    """

    prompt: Annotated[TextOrTokens, BeforeValidator(alone)]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    best_of: One = 1
    echo: No = False
    suffix: Null = None


class TextPart(Strict):
    """A part of what is said."""

    type: Literal["text"]
    text: Text


TextOrParts = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Several[TextPart], Tag("list")], Discriminator(kind)
]


class ChatMessage(Strict):
    """One turn of a conversation. content: text, or parts of text, each of which begins a line.

    developer: OpenAI's newer name of system. name: of who speaks, which the model is not told.
    """

    null_is_default = True

    role: Literal["system", "developer", "user", "assistant"]
    content: TextOrParts
    name: Text = ""
    refusal: Null = None
    tool_calls: Empty = Field(default_factory=list)
    function_call: Null = None

    def said(self) -> dict[str, str]:
        """As the templates of models take it."""
        is_text = isinstance(self.content, str)
        text = self.content if is_text else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Writing):
    """messages: oldest first. logprobs: whether to tell them, with `top_logprobs` alternatives.

    max_completion_tokens: OpenAI's newer name of max_tokens. Without either the answer ends where the model ends it, or
    where there is no more room.
    """

    messages: Several[ChatMessage] = Field(min_length=1, max_length=256)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    response_format: PlainText = Field(default_factory=lambda: {"type": "text"})
    store: No = False

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

    A part of a character is named by its bytes, as in bytes:\\xf0\\x9f; of alternatives with equal names all but the
    likeliest are named token_id:NUMBER.
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
    """A token with its log-probability. id: its number, beside OpenAI's fields.

    bytes: what it adds to the text, in UTF-8; null for special tokens, and where the tokenizer does not tell.
    """

    id: int
    token: str
    logprob: float
    bytes: list[int] | None


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


class ModelEntry(Strict):
    """The model that is served. created: when the server began, in seconds since 1970."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["edgelab"] = "edgelab"


class ModelList(Strict):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


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
