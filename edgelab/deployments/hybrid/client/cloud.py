"""The edge's side of HTTP: asks the cloud within a deadline, and believes nothing that it has not checked.

`Cloud` speaks to our own server, and for completions and chats to any server of OpenAI's kind, such as llama.cpp's own.
Whatever goes wrong is one CloudError with one sentence: no answer, none in time, half of one, something else.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import httpcore
import httpx

from edgelab.deployments.hybrid import MOST_DEADLINE_S, is_deadline
from edgelab.deployments.hybrid.client.answers import (
    Completion,
    Cost,
    Next,
    Piece,
    Verification,
    checked,
    completion_of,
    events,
    limited,
    next_of,
    parsed,
    piece_of,
    refusal,
    verification_of,
)
from edgelab.deployments.hybrid.client.counting import CountingTransport, Meter
from edgelab.deployments.hybrid.client.failures import (
    CloudBusy,
    CloudDown,
    CloudError,
    CloudGarbled,
    CloudLacking,
    CloudRefused,
    CloudSlow,
    TooLate,
)
from edgelab.deployments.hybrid.server.serving import is_local

if TYPE_CHECKING:
    from torch import Tensor

DONE = "[DONE]"
Asked = TypeVar("Asked")


class Cloud:
    """A server, and one connection to it; requests of several threads wait for each other.

    deadline_s: for each request, whole. model: the name to ask for, where the server has several. certificate: to
    trust, in PEM, for a server with one of its own. waits: a busy server is asked again after the seconds that it
    names, as long as the deadline allows. The token goes to a server on another machine only over TLS, unless
    `insecure` says that the network is trusted.
    """

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        deadline_s: float = 30.0,
        model: str | None = None,
        certificate: str = "",
        insecure: bool = False,
        waits: bool = True,
    ) -> None:
        try:
            found = httpx.URL(url)
        except httpx.InvalidURL:
            found = httpx.URL("")
        if found.scheme not in ("http", "https") or not found.host:
            raise CloudError(f"{url!r} is no address of a server; it should begin with https:// or http://.")
        if found.scheme == "http" and token and not (insecure or is_local(found.host)):
            raise CloudError(
                f"The token would go to {found.host} in clear; use https, or insecure=True on a network you trust."
            )
        if not (token.isascii() and token.isprintable()):
            raise CloudError("The token holds characters that no header may; give it as the server made it.")
        if not is_deadline(deadline_s):
            raise CloudError(
                f"deadline_s={deadline_s} should be above 0 and at most {MOST_DEADLINE_S:g}, a day."
            )
        self.url = str(found).rstrip("/").removesuffix("/v1")  # as other clients are given it
        self.deadline_s, self.model, self.waits = deadline_s, model, waits
        self.meter = Meter()
        headers = {"accept-encoding": "identity", "user-agent": "edgelab"}
        if token:
            headers["authorization"] = f"Bearer {token}"
        try:
            transport = CountingTransport(self.meter, certificate)
        except OSError as error:
            raise CloudError(
                f"{certificate} is no certificate to trust ({error.strerror or error}); give one in PEM."
            ) from None
        self._http = httpx.Client(
            transport=transport,
            headers=headers,
            timeout=None,  # the meter's
            trust_env=False,
        )
        self._lock = threading.Lock()

    def __enter__(self) -> Cloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Cloud({self.url!r}, deadline_s={self.deadline_s})"

    def close(self) -> None:
        """Hang up."""
        self._http.close()

    def cut(self) -> None:
        """End the request that is under way, from any thread: it fails with CloudDown, as all do until `mend`."""
        self.meter.cut()

    def mend(self) -> None:
        """Let requests through again, over a new connection."""
        self.meter.is_cut.clear()

    # What OpenAI's servers do

    def complete(
        self,
        prompt: str | list[int],
        max_tokens: int = 16,
        logprobs: int | None = None,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: list[str] | None = None,
    ) -> Completion:
        """Go on with a text or token ids. logprobs: alternatives to tell of each token. Raises CloudError."""
        asked = self._asked(max_tokens, temperature, seed, stop) | {"prompt": prompt}
        if logprobs is not None:
            asked["logprobs"] = logprobs
        answer, cost = self._json("POST", "/v1/completions", asked)
        return checked(lambda: completion_of(answer, cost, logprobs))

    def chat(
        self,
        messages: list[dict[str, str]],
        max_tokens: int = 128,
        logprobs: int | None = None,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: list[str] | None = None,
    ) -> Completion:
        """Answer a conversation, oldest message first. logprobs as in `complete`. Raises CloudError."""
        asked = self._asked(max_tokens, temperature, seed, stop) | {"messages": messages}
        if logprobs is not None:
            asked |= {"logprobs": True, "top_logprobs": logprobs}
        answer, cost = self._json("POST", "/v1/chat/completions", asked)
        return checked(lambda: completion_of(answer, cost, logprobs))

    def stream(
        self,
        prompt: str | list[int],
        max_tokens: int = 16,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: list[str] | None = None,
    ) -> Iterator[Piece]:
        """As `complete`, piece by piece as it is written. Raises CloudError, also where the end is missing.

        Nobody else uses this connection until the last piece has come or the iterator is closed, which tells the
        server to stop.
        """
        asked = self._asked(max_tokens, temperature, seed, stop) | {"prompt": prompt, "stream": True}
        with self._answer("POST", "/v1/completions", json.dumps(asked).encode()) as response:
            is_whole = False
            for data in events(limited(response)):
                if is_whole := data == DONE:
                    continue  # to the end of the body, so that the connection can be used again
                told = parsed(data)
                if (piece := checked(lambda told=told: piece_of(told))) is not None:
                    yield piece
        if not is_whole:
            raise CloudGarbled("The cloud's answer ended before its end.")

    def _asked(
        self, max_tokens: int, temperature: float, seed: int | None, stop: list[str] | None
    ) -> dict[str, Any]:
        asked = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop": stop or None,
        }
        return {name: value for name, value in asked.items() if value is not None}

    # What only our server does

    def health(self) -> dict[str, Any]:
        """What runs there."""
        return self._json("GET", "/health")[0]

    def vocabulary(self) -> str | None:
        """Fingerprint of the tokens there, as `tasks.vocabulary_fingerprint` makes it; None where none is told.

        A server that tells none, as all but ours, is asked in text. Raises CloudError where it does not answer.
        """
        try:
            told = self.health().get("tokenizer")
        except (CloudLacking, CloudGarbled):
            return None
        return told if isinstance(told, str) else None

    def verify(
        self,
        conversation: str,
        step: int,
        draft: list[int],
        *,
        prompt: list[int] | None = None,
        probabilities: Tensor | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> Verification:
        """Which tokens of a draft stay. prompt, temperature and seed go with step 0.

        probabilities: those that the draft was sampled from, (draft, vocabulary) float16, when sampling. A step whose
        answer was lost may be asked for again. Raises CloudError.
        """
        from edgelab.deployments.hybrid.server.framing import packed, probabilities_bytes
        from edgelab.deployments.hybrid.server.messages import VerifyRequest

        asked = _made(
            VerifyRequest,
            conversation=conversation,
            step=step,
            draft=draft,
            prompt=prompt,
            temperature=temperature,
            seed=seed,
        )
        numbers = b"" if probabilities is None else probabilities_bytes(probabilities)
        answer, cost = self._framed("/verify", *packed(asked, numbers))
        return checked(lambda: verification_of(answer, step, len(draft), cost))

    def verifier(
        self, prompt: list[int], temperature: float = 0.0, seed: int = 0
    ) -> Callable[[int, list[int], Tensor | None], tuple[int, int]]:
        """`verify(step, ids, probabilities)` of a new conversation, as `drafting.Drafting` asks for it."""
        name = secrets.token_urlsafe(16)

        def verify(step: int, ids: list[int], probabilities: Tensor | None = None) -> tuple[int, int]:
            begin = {"prompt": prompt, "temperature": temperature, "seed": seed} if step == 0 else {}
            found = self.verify(name, step, ids, probabilities=probabilities, **begin)
            return found.accepted, found.next

        return verify

    def hidden(
        self, conversation: str, step: int, states: Tensor, wire: str = "float32", top: int = 0
    ) -> Next:
        """The token behind hidden states (tokens, hidden) of the next tokens of a conversation. Raises CloudError."""
        from edgelab.deployments.hybrid.server.framing import packed
        from edgelab.deployments.hybrid.server.messages import HiddenRequest
        from edgelab.deployments.partition.wire import encoded

        asked = _made(
            HiddenRequest, conversation=conversation, step=step, tokens=len(states), wire=wire, top=top
        )
        answer, cost = self._framed("/hidden", *packed(asked, encoded(states, wire)))
        return checked(lambda: next_of(answer, step, top, cost))

    def forget(self, conversation: str) -> None:
        """End a conversation of `verify` or `hidden`, which is forgotten by itself a while later."""
        with self._answer("DELETE", f"/conversations/{conversation}") as response:
            for _ in limited(response):
                pass

    # Asking

    def _json(
        self, method: str, path: str, asked: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], Cost]:
        return self._framed(
            path, "application/json", b"" if asked is None else json.dumps(asked).encode(), method
        )

    def _framed(self, path: str, kind: str, body: bytes, method: str = "POST") -> tuple[dict[str, Any], Cost]:
        started = time.monotonic()
        with self._answer(method, path, body, kind) as response:
            before = response.extensions["edgelab_before"]
            found = b"".join(limited(response))
            cost = Cost(
                self.meter.sent - before[0], self.meter.received - before[1], time.monotonic() - started
            )
        return parsed(found.decode("utf-8-sig", "replace")), cost

    @contextmanager
    def _answer(
        self, method: str, path: str, body: bytes = b"", kind: str = "application/json"
    ) -> Iterator[httpx.Response]:
        """The answer's head, its body still to be read. Raises CloudError for every other one than 200 and 204."""
        request = self._http.build_request(
            method, self.url + path, content=body or None, headers={"content-type": kind} if body else None
        )
        deadline = time.monotonic() + self.deadline_s
        if not self._lock.acquire(timeout=self.deadline_s):
            raise TooLate(f"Others used the connection to the cloud for all of {self.deadline_s:.1f} s.")
        try:
            self.meter.until = deadline
            before = self.meter.sent, self.meter.received
            with self._explained(before[1]):
                response = self._send(request, deadline)
                try:
                    response.extensions["edgelab_before"] = before
                    yield response
                finally:
                    response.close()
        finally:
            self._lock.release()

    def _send(self, request: httpx.Request, deadline: float) -> httpx.Response:
        while True:
            response = self._once(request)
            if response.status_code in (200, 204):
                return response
            try:
                error = refusal(response, b"".join(limited(response)))
            finally:
                response.close()
            if not (
                isinstance(error, CloudBusy) and self.waits and time.monotonic() + error.retry_s < deadline
            ):
                raise error
            self.meter.is_cut.wait(error.retry_s)

    def _once(self, request: httpx.Request) -> httpx.Response:
        """Send a request, a second time where an idle connection was closed by the server just then."""
        before = self.meter.opened, self.meter.received
        try:
            return self._http.send(request, stream=True)
        except (httpcore.ProtocolError, httpcore.NetworkError):
            if (self.meter.opened, self.meter.received) != before:
                raise
        return self._http.send(request, stream=True)

    @contextmanager
    def _explained(self, received: int) -> Iterator[None]:
        """httpx and httpcore raise a dozen errors; here each is one of three. received: bytes before this request."""
        try:
            yield
        except (httpcore.TimeoutException, httpx.TimeoutException):
            raise CloudSlow(
                f"The cloud at {self.url} did not answer within {self.deadline_s:g} s; give it more, or ask for less."
            ) from None
        except (httpcore.ProtocolError, httpx.DecodingError, httpx.ProtocolError) as error:
            if self.meter.received == received:
                raise CloudDown(
                    f"The cloud at {self.url} hung up without an answer ({_short(error)})."
                ) from None
            raise CloudGarbled(f"What {self.url} answers is no whole HTTP ({_short(error)}).") from None
        except (httpcore.NetworkError, httpx.HTTPError, OSError) as error:
            raise CloudDown(f"The cloud at {self.url} cannot be reached ({_short(error)}).") from None


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0][:120].rstrip(".")


def _made(kind: type[Asked], **fields: Any) -> Asked:
    """A message to the server. Raises CloudRefused where the server would refuse it anyway."""
    from pydantic import ValidationError

    from edgelab.deployments.hybrid.server.framing import sentence

    try:
        return kind(**fields)
    except ValidationError as error:
        raise CloudRefused(f"The cloud takes no such request: {sentence(error.errors())}", 400) from None
