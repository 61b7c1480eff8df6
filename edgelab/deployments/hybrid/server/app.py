"""The cloud as a server: one session behind HTTP, for whoever has the token.

| request                    | what it does                                                        |
| -------------------------- | ------------------------------------------------------------------- |
| POST /v1/completions       | goes on with a text or token ids, as OpenAI's servers do            |
| POST /v1/chat/completions  | answers a conversation, as OpenAI's servers do                      |
| POST /verify               | speculative decoding: which tokens of a draft stay, and the next one |
| POST /hidden               | split inference: hidden states in, the next token out               |
| DELETE /conversations/NAME | forgets a conversation of the last two                              |
| GET /v1/models, and /NAME  | the model that is served, as OpenAI's servers tell theirs           |
| GET /health                | what runs here                                                      |

One request computes at a time; `gate.py` looks at all of them first, `turns.py` keeps the queue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from edgelab.deployments.hybrid.server import framing
from edgelab.deployments.hybrid.server.conversations import SecondPart, Verifying
from edgelab.deployments.hybrid.server.events import AT_FAULT, EVENTS, Events, Tell, unable, until_gone
from edgelab.deployments.hybrid.server.gate import ClientGone, Gate
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import (
    Chat,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    HiddenAnswer,
    HiddenRequest,
    ModelEntry,
    ModelList,
    Refusal,
    Verified,
    VerifyRequest,
    Writing,
)
from edgelab.deployments.hybrid.server.replies import Reply, Written
from edgelab.deployments.hybrid.server.service import Service
from edgelab.deployments.hybrid.server.spelling import Spelling
from edgelab.deployments.hybrid.server.strict import Strict
from edgelab.deployments.hybrid.server.turns import Turns
from edgelab.deployments.hybrid.server.writing import TextSoFar, Writer
from edgelab.errors import EdgeLabError
from edgelab.runtimes.session import Session
from edgelab.runtimes.streaming import conversation_ids
from edgelab.tasks import endings, vocabulary_fingerprint

T = TypeVar("T")
ERRORS = {
    "4XX": {"model": ErrorBody, "description": "What is wrong with the request, or a limit that it meets"},
    "5XX": {"model": ErrorBody, "description": "What is wrong with the server"},
}
STREAMED = {200: {"content": {EVENTS: {"schema": {"type": "string"}}}}}
Name = Annotated[str, InPath(pattern="^[A-Za-z0-9_-]{8,64}$")]


def create_app(service: Service, token: str, limits: Limits | None = None) -> FastAPI:
    """The application over a service, which closes with it."""
    limits = limits or Limits()
    desk = Desk(service, limits)
    fingerprint = vocabulary_fingerprint(service.tokenizer)
    entry = ModelEntry(id=service.name, created=int(time.time()))

    @asynccontextmanager
    async def alive(app: FastAPI) -> Any:
        yield
        desk.close()

    app = FastAPI(
        title="edgelab", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=alive, responses=ERRORS,
        dependencies=[Security(HTTPBearer(auto_error=False))],
    )  # fmt: skip
    app.router.route_class = LookedAt
    app.add_middleware(Gate, token=token, limits=limits)
    _explain_errors(app)

    @app.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        desk.check(asked)
        prompt: list[int] | Callable[[], list[int]] = (
            asked.prompt if isinstance(asked.prompt, list) else desk.reader(asked.prompt)
        )
        reply = desk.reply(asked.logprobs is not None)
        if asked.stream:
            return desk.streamed(asked, prompt, asked.logprobs, lambda piece: (
                reply.completion(piece, usage=False).model_dump()))  # fmt: skip
        return reply.completion(await until_gone(request.receive, desk.write(asked, prompt, asked.logprobs)))

    @app.post("/v1/chat/completions", response_model=Chat, responses=STREAMED)
    async def chat(asked: ChatRequest, request: Request) -> Any:
        desk.check(asked)
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refusal(400, "invalid_body", "top_logprobs is for logprobs=true.")
        if None not in (asked.max_tokens, asked.max_completion_tokens):
            raise Refusal(
                400, "invalid_body", "max_tokens and max_completion_tokens say the same; give one of them."
            )
        prompt = desk.chat_reader(asked.messages)
        reply = desk.reply(asked.logprobs)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.stream:
            first = iter([True])
            return desk.streamed(
                asked, prompt, top, lambda piece: reply.chat_piece(piece, next(first, False))
            )
        return reply.chat(await until_gone(request.receive, desk.write(asked, prompt, top)))

    @app.post("/verify", response_model=Verified, openapi_extra=_body_of(VerifyRequest))
    async def verify(request: Request) -> Any:
        asked, numbers = await desk.framed(request, VerifyRequest)
        return await until_gone(request.receive, desk.in_turn(desk.verifying.step, asked, numbers))

    @app.post("/hidden", response_model=HiddenAnswer, openapi_extra=_body_of(HiddenRequest))
    async def hidden(request: Request) -> Any:
        asked, numbers = await desk.framed(request, HiddenRequest)
        return await until_gone(request.receive, desk.in_turn(desk.second.step, asked, numbers))

    @app.delete("/conversations/{name}", status_code=204)
    async def forget(name: Name, request: Request) -> Response:
        if not await until_gone(request.receive, desk.in_turn(desk.forget, name)):
            raise Refusal(404, "unknown_conversation", "No such conversation is open.")
        return Response(status_code=204)

    @app.get("/v1/models", response_model=ModelList)
    async def models() -> Any:
        return ModelList(data=[entry])

    @app.get("/v1/models/{name:path}", response_model=ModelEntry)
    async def model(name: str) -> Any:
        desk.check_model(name)
        return entry

    @app.get("/health", response_model=Health)
    async def health() -> Any:
        return Health(
            status="ok", model=service.name, kernel=service.session.kernel, vocabulary=service.session.vocabulary,
            tokenizer=fingerprint, context=service.context, cut=service.cut, waiting=desk.turns.waiting,
            conversations=len(desk.verifying.open) + len(desk.second.open),
        )  # fmt: skip

    return app


class Desk:
    """A service with its queue and conversations. longest_token: characters of the longest one in the vocabulary."""

    def __init__(self, service: Service, limits: Limits) -> None:
        self.service, self.limits = service, limits
        self.turns = Turns(limits)
        self.verifying = Verifying(service, limits)
        self.second = SecondPart(service, limits)
        self.spelling = Spelling(service.tokenizer)
        self.longest_token = max(map(len, service.tokenizer.get_vocab()))

    def check_model(self, name: str) -> None:
        """Raises Refusal for another model."""
        if name != self.service.name:
            raise Refusal(
                404,
                "model_not_found",
                f"This server runs {self.service.name!r}; leave 'model' out or name it so.",
            )

    def check(self, asked: Writing) -> None:
        """Raises Refusal for another model, and for more tokens than an answer may have."""
        if asked.model is not None:
            self.check_model(asked.model)
        if asked.stream_options is not None and not asked.stream:
            raise Refusal(400, "invalid_body", "stream_options is for stream=true.")
        if (asked.most() or 0) > self.limits.max_tokens:
            raise Refusal(
                400,
                "too_many_tokens",
                f"max_tokens may be {self.limits.max_tokens} at most, and more were asked for.",
            )

    def check_characters(self, characters: int) -> None:
        """Raises Refusal for a text that is too long whatever its tokens are, so that nobody need find them.

        No token has more characters than the longest one, so that prompt_tokens of them have at most so many times
        prompt_tokens. A text beyond that is refused even where a tokenizer would shorten it before it counts.
        """
        tokens = self.limits.prompt_tokens
        if characters > (most := tokens * self.longest_token):
            raise Refusal(
                400,
                "prompt_too_long",
                f"The prompt has {characters} characters, and at most {most} are read: {tokens} tokens of "
                f"{self.longest_token}.",
            )

    def reader(self, text: str) -> Callable[[], list[int]]:
        """What finds the token ids of a text; a tokenizer is not made for several at once, and this takes a turn.

        Raises Refusal for a text that is too long.
        """
        self.check_characters(len(text))
        return lambda: self.service.tokenizer(text)["input_ids"]

    def chat_reader(self, messages: list[ChatMessage]) -> Callable[[], list[int]]:
        """The same for a conversation. What it returns raises Refusal where the model's template does not take it."""
        said = [one.said() for one in messages]
        self.check_characters(sum(len(one["content"]) for one in said))
        return partial(self._ids_of_chat, said)

    def _ids_of_chat(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return conversation_ids(self.service.tokenizer, messages)
        except (TemplateError, ValueError) as error:
            raise Refusal(
                400,
                "invalid_messages",
                f"The model's template takes no such conversation: {str(error)[:200]}",
            ) from None

    async def framed(self, request: Request, model: type[Strict]) -> tuple[Any, bytes]:
        """What is asked, and the numbers behind it."""
        return framing.unpacked(request.headers, await request.body(), model)

    async def in_turn(self, step: Callable[..., T], *arguments: object) -> T:
        """One step, when its turn comes."""
        async with self.turns.turn():
            return await self.turns.run(step, *arguments)

    def forget(self, name: str) -> bool:
        """Whether a conversation of that name was open."""
        return any([self.verifying.open.forget(name), self.second.open.forget(name)])

    def reply(self, with_logprobs: bool) -> Reply:
        """What all answers to one request have in common."""
        return Reply(self.spelling, self.service.name, with_logprobs)

    def begin(self) -> Session:
        """The session for a new answer. What nobody has asked for in a while is forgotten first."""
        self.verifying.open.expire()
        self.second.open.expire()
        return self.verifying.sequences.free()

    def close(self) -> None:
        """Wait for what computes, and let go of every sequence."""
        self.turns.close()
        self.verifying.sequences.close()

    def room(self, asked: Writing, ids: list[int]) -> int:
        """Tokens that an answer may have: as many as were asked for, or as limits and context allow.

        Raises Refusal for a prompt that is empty or too long, and for a token that the model has not.
        """
        if not ids:
            raise Refusal(400, "empty_prompt", "The prompt has no tokens.")
        self.service.check_ids(ids)
        self.service.check_room(len(ids), self.limits, asked.most() or 1)
        context = self.service.context or math.inf
        return asked.most() or min(self.limits.max_tokens, context - len(ids))

    async def write(
        self,
        asked: Writing,
        prompt: list[int] | Callable[[], list[int]],
        top: int | None,
        tell: Callable[[Written], object] | None = None,
    ) -> Written:
        """Write an answer, and tell every piece of it. Whoever is cancelled leaves between two tokens.

        prompt: token ids, or what finds them once its turn has come.
        """
        if not callable(prompt):
            self.room(asked, prompt)
        text = TextSoFar(self.service.tokenizer, asked.stops())
        async with self.turns.turn():
            ids = await self.turns.run(prompt) if callable(prompt) else prompt
            room, whole, begins = self.room(asked, ids), Written(prompt_tokens=len(ids)), True
            session = await self.turns.run(self.begin)
            writer = Writer(
                session, ids, room, ends=endings(self.service.tokenizer),
                temperature=asked.temperature, seed=asked.seed, top=top,
            )  # fmt: skip
            while not whole.finish:
                token = await self.turns.run(writer.step)
                if token is None:
                    piece = Written(text.rest(), finish=writer.finish)
                else:
                    added, finish = text.add(token.id), "stop" if text.stopped else None
                    piece = Written(added, [token], [text.offset], [begins], finish)
                    begins = begins and self.spelling.bytes_of(token.id) is None
                whole += piece
                if tell is not None:
                    tell(piece)
        return whole

    def streamed(
        self,
        asked: Writing,
        prompt: list[int] | Callable[[], list[int]],
        top: int | None,
        told: Callable[[Written], dict[str, Any]],
    ) -> Events:
        """The same as a stream: what is told of each piece, and at the end of all their tokens where that was asked."""

        async def write(tell: Tell) -> None:
            whole = await self.write(asked, prompt, top, lambda piece: tell(told(piece)))
            if asked.counts():
                usage = self.reply(False).usage(whole).model_dump()
                tell(told(Written()) | {"choices": [], "usage": usage})

        return Events(write)


class Parsed(Request):
    """A request whose JSON has been read."""

    found: Any = None

    async def json(self) -> Any:
        return self.found


class LookedAt(APIRoute):
    """A route that reads the JSON of its body itself: FastAPI has several answers to what is none."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        answer = super().get_route_handler()

        async def look(request: Request) -> Response:
            if self.body_field is not None:
                framing.check_kind(request.headers, framing.JSON)
                request = Parsed(request.scope, request.receive)
                request.found = framing.parsed(await request.body())
            return await answer(request)

        return look


def _body_of(model: type[Strict]) -> dict[str, Any]:
    """How a body of `framing` is described in OpenAPI."""
    schema = model.model_json_schema()
    binary = {
        "type": "string",
        "format": "binary",
        "description": "A line of this JSON, and numbers behind it",
    }
    content = {framing.JSON: {"schema": schema}, framing.BINARY: {"schema": binary}}
    return {"requestBody": {"required": True, "content": content}}


def _explain_errors(app: FastAPI) -> None:
    """Every error in one shape."""

    def answer(refusal: Refusal, headers: Any = None) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, {**(headers or {}), **refusal.headers()})

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return answer(error)

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(Refusal(400, "invalid_body", framing.sentence(error.errors())))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        code = str(error.detail).lower().replace(" ", "_")[:60]
        return answer(Refusal(error.status_code, code, f"{error.detail}."), error.headers)

    @app.exception_handler(EdgeLabError)
    async def failed(request: Request, error: EdgeLabError) -> Response:
        return answer(unable(error))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(Refusal(500, "server_error", AT_FAULT, "server_error"))
