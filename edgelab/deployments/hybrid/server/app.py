"""The cloud as a server: one session behind HTTP, for whoever has the token.

| request                    | what it does                                                        |
| -------------------------- | ------------------------------------------------------------------- |
| POST /v1/completions       | goes on with a text or token ids, as OpenAI's servers do            |
| POST /v1/chat/completions  | answers a conversation, as OpenAI's servers do                      |
| POST /verify               | speculative decoding: which tokens of a draft stay, and the next one |
| POST /hidden               | split inference: hidden states in, the next token out               |
| DELETE /conversations/NAME | forgets a conversation of the last two                              |
| GET /health                | what runs here                                                      |

One request computes at a time; `gate.py` looks at all of them first, `turns.py` keeps the queue.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from edgelab.deployments.hybrid.server import framing
from edgelab.deployments.hybrid.server.conversations import SecondPart, Verifying
from edgelab.deployments.hybrid.server.gate import EVENTS, ClientGone, Gate, event
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
    Refusal,
    Strict,
    Verified,
    VerifyRequest,
    Writing,
)
from edgelab.deployments.hybrid.server.replies import Reply, Written
from edgelab.deployments.hybrid.server.service import Service
from edgelab.deployments.hybrid.server.turns import Turns
from edgelab.deployments.hybrid.server.writing import TextSoFar, Writer
from edgelab.errors import EdgeLabError
from edgelab.runtimes.session import Session
from edgelab.runtimes.streaming import conversation_ids
from edgelab.tasks import endings, vocabulary_fingerprint

log = logging.getLogger(__name__)

T = TypeVar("T")
AT_FAULT = "Something went wrong in the server; its log says what."
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

    @asynccontextmanager
    async def alive(app: FastAPI) -> Any:
        yield
        desk.close()

    app = FastAPI(
        title="edgelab", docs_url=None, redoc_url=None, lifespan=alive, responses=ERRORS,
        dependencies=[Security(HTTPBearer(auto_error=False))],
    )  # fmt: skip
    app.add_middleware(Gate, token=token, limits=limits)
    _explain_errors(app)

    @app.post("/v1/completions", response_model=Completion, responses=STREAMED)
    async def completions(asked: CompletionRequest, request: Request) -> Any:
        desk.check(asked)
        prompt: list[int] | Callable[[], list[int]] = (
            asked.prompt if isinstance(asked.prompt, list) else desk.reader(asked.prompt)
        )
        reply = Reply(service.tokenizer, service.name, asked.logprobs is not None)
        if asked.stream:
            return Events(lambda tell: desk.write(asked, prompt, asked.logprobs, lambda piece: tell(
                reply.completion(piece, usage=False).model_dump())))  # fmt: skip
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
        reply = Reply(service.tokenizer, service.name, asked.logprobs)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.stream:
            first = iter([True])
            return Events(lambda tell: desk.write(asked, prompt, top, lambda piece: tell(
                reply.chat_piece(piece, next(first, False)))))  # fmt: skip
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
        self.turns = Turns(limits.waiting)
        self.verifying = Verifying(service, limits)
        self.second = SecondPart(service, limits)
        self.longest_token = max(map(len, service.tokenizer.get_vocab()))

    def check(self, asked: Writing) -> None:
        """Raises Refusal for another model, and for more tokens than an answer may have."""
        if asked.model not in (None, self.service.name):
            raise Refusal(
                404,
                "model_not_found",
                f"This server runs {self.service.name!r}; leave 'model' out or name it so.",
            )
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
        self.check_characters(sum(len(one.content) for one in messages))
        return partial(self._ids_of_chat, [one.model_dump() for one in messages])

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
        return framing.unpacked(request.headers.get("content-type", ""), await request.body(), model)

    async def in_turn(self, step: Callable[..., T], *arguments: object) -> T:
        """One step, when its turn comes."""
        async with self.turns.turn():
            return await self.turns.run(step, *arguments)

    def forget(self, name: str) -> bool:
        """Whether a conversation of that name was open."""
        return any([self.verifying.open.forget(name), self.second.open.forget(name)])

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
            room, whole = self.room(asked, ids), Written(prompt_tokens=len(ids))
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
                    added = text.add(token.id)
                    piece = Written(added, [token], [text.offset], "stop" if text.stopped else None)
                whole += piece
                if tell is not None:
                    tell(piece)
        return whole


class Events(Response):
    """An answer as server-sent events. Nobody who computes waits for a client that reads slowly.

    write: computes, and tells each message as it comes. What it refuses before the first one is an answer like others.
    """

    def __init__(self, write: Callable[[Callable[[dict[str, Any]], None]], Awaitable[object]]) -> None:
        super().__init__(media_type=EVENTS, headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone):
            await until_gone(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        pieces: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        writing = asyncio.ensure_future(self._write(pieces.put_nowait))
        writing.add_done_callback(lambda done: pieces.put_nowait(None))
        has_begun = False
        try:
            while (piece := await pieces.get()) is not None:
                if not has_begun:
                    has_begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": event(piece), "more_body": True})
            try:
                await writing
                last = b"data: [DONE]\n\n"
            except Exception as error:
                if not has_begun:
                    raise
                last = event(_unable(error).body())
            await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled where the client leaves first. Raises ClientGone then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


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


def _unable(error: Exception) -> Refusal:
    """What is told of something that went wrong here."""
    log.error("A request could not be answered", exc_info=error)
    sentence = str(error) if isinstance(error, EdgeLabError) else AT_FAULT
    return Refusal(500, "server_error", sentence, "server_error")


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
    async def unable(request: Request, error: EdgeLabError) -> Response:
        return answer(_unable(error))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(Refusal(500, "server_error", AT_FAULT, "server_error"))
