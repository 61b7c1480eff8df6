"""Starting and stopping the cloud: in this process until a signal comes, or in one of its own.

The token is made when a server starts. A child hands it to its parent over a pipe; the command line writes it into a
file that only its owner reads, or on standard output. It is in no argument, no URL and no log.

A server in a process of its own ends with whoever started it: it listens for the end of its standard input.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import logging
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from edgelab import recipes
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.errors import EdgeLabError
from edgelab.network import LOCAL
from edgelab.reference import EMBEDDED, resolve

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 5
STARTING_S = 300.0  # a variant may have to be made, and exported


class ServingError(EdgeLabError):
    """A server that cannot be started as asked."""


@dataclass(frozen=True)
class Settings:
    """What is served, and where. port: 0 for a free one. cut: layers that the edge runs in split inference.

    certificate, key: files in PEM for TLS, without which no address but this machine's own is listened on, unless
    `insecure` says that the network is trusted. name: what clients call the model. whole_context: prompts may be as
    long as the context of the model and the free memory allow, in place of `limits.prompt_tokens`.
    """

    recipe: str = "none"
    model: str = EMBEDDED
    seed: int = 0
    host: str = LOCAL
    port: int = 0
    certificate: str = ""
    key: str = ""
    insecure: bool = False
    cut: int | None = None
    name: str = ""
    threads: int | None = None
    whole_context: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        deployment = recipes.parse(self.recipe).deployment  # raises RecipeError
        if not hasattr(deployment, "engine"):
            raise ServingError(
                f"@ {deployment.name} shares requests between edge and cloud, and a server runs one engine; give one, "
                "such as @ torch."
            )
        if not 0 <= self.port <= 65_535:
            raise ServingError(f"port={self.port} should be 0 to 65535, 0 for a free one.")
        if bool(self.certificate) != bool(self.key):
            raise ServingError("TLS needs a certificate and its key; one of the two files is not named.")
        for file in filter(None, (self.certificate, self.key)):
            if not Path(file).is_file():
                raise ServingError(f"There is no file {file}; give a certificate and its key in PEM.")
        if not (self.certificate or self.insecure or is_local(self.host)):
            raise ServingError(
                f"On {self.host} the token and all texts would travel in clear; give certificate and key, or "
                "insecure=True where the network is trusted."
            )

    @cached_property
    def called(self) -> str:
        """What clients call the model: its name, or model and recipe."""
        return self.name or f"{resolve(self.model).name}: {recipes.parse(self.recipe)}"

    @property
    def scheme(self) -> str:
        """Of its URL."""
        return "https" if self.certificate else "http"


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    settings: Settings, announce: Callable[[str, str], None], until: Callable[[], None] | None = None
) -> None:
    """Load what is served and answer requests until SIGTERM, SIGINT, or the return of `until`, on a thread of its own.

    announce: told the URL and the token once requests are taken. Answers under way get `closing_s` to end.
    Raises an EdgeLabError where nothing can be served.
    """
    check_installed()
    with listening(settings.host, settings.port) as place:
        import torch
        import uvicorn

        from edgelab.deployments.hybrid.server.app import create_app
        from edgelab.deployments.hybrid.server.connections import Guarded
        from edgelab.deployments.hybrid.server.handshakes import Handshake
        from edgelab.deployments.hybrid.server.service import Service

        connection = partial(Guarded, limits=settings.limits)
        if settings.certificate:
            context = tls_context(settings.certificate, settings.key)
            connection = partial(Handshake, limits=settings.limits, context=context)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        service = Service.load(
            settings.recipe, settings.model, seed=settings.seed, cut=settings.cut, name=settings.called
        )
        try:
            limits, longest = settings.limits, service.longest_prompt()
            if settings.whole_context and longest:
                limits = replace(limits, prompt_tokens=longest)
            token = secrets.token_urlsafe(32)
            config = uvicorn.Config(
                create_app(service, token, limits),
                http=connection,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(settings.limits.closing_s)),
            )
            server = uvicorn.Server(config)
            if until is not None:
                threading.Thread(target=_end_after, args=(until, server), daemon=True).start()
            announce(url_of(settings, place), token)
            with _signals_end_it_only():
                server.run([place])
        finally:
            service.close()


def check_installed() -> None:
    """Raises EngineMissing where the packages of a server are not installed."""
    from edgelab.runtimes import EngineMissing

    for package, name in (("fastapi", "FastAPI"), ("uvicorn", "uvicorn")):
        if importlib.util.find_spec(package) is None:
            raise EngineMissing(name, "hybrid")


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that takes connections. Raises ServingError where the port is taken or the address is none of ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        place = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ServingError(
            f"Port {port} of {host} cannot be had ({error.strerror or error}); give another one, or 0 for a free one."
        ) from None
    # The connections that it takes inherit this. asyncio does it for sockets that name their protocol, which this one
    # does not, and an answer in two pieces then waits 40 ms for the client's delayed acknowledgement.
    place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with place:
        yield place


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """What TLS is agreed upon with. Raises ServingError where the two files are no certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ServingError(
            f"{certificate} and {key} are no certificate and key that belong together ({error.strerror or error}); "
            "give both in PEM."
        ) from None
    return context


def url_of(settings: Settings, place: socket.socket) -> str:
    """Where a server listens."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{settings.scheme}://{host}:{place.getsockname()[1]}"


def _end_after(until: Callable[[], None], server: Any) -> None:
    until()
    server.should_exit = True


@contextmanager
def _signals_end_it_only() -> Iterator[None]:
    """uvicorn raises a signal again after an orderly end, and this process has more to put in order then."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, lambda *_: None) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def check_token_file(path: Path) -> None:
    """Raises ServingError where no token can be written to a file: it is something else, or its folder is missing."""
    try:
        has_folder, is_other = path.parent.is_dir(), path.exists() and not path.is_file()
    except OSError as error:
        raise _no_token(path, error) from None
    if not has_folder:
        raise ServingError(
            f"There is no folder {path.parent} for the token; make it, or name a file elsewhere."
        )
    if is_other:
        raise ServingError(f"{path} is there and no file; name a file for the token.")


def write_token(path: Path, token: str) -> None:
    """Write a token into a file that nobody but its owner may read. Raises ServingError where that cannot be."""
    check_token_file(path)
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    except OSError as error:
        raise _no_token(path, error) from None


def _no_token(path: Path, error: OSError) -> ServingError:
    return ServingError(
        f"The token cannot be written to {path} ({error.strerror or error}); name a file elsewhere."
    )


# In a process of its own


@dataclass
class Running:
    """A server in a process of its own."""

    url: str
    token: str = field(repr=False)
    process: subprocess.Popen = field(repr=False)
    closing_s: float = 5.0

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    def stop(self) -> int:
        """Ask it to end, end it by force where it takes too long; returns its exit status, 0 for an orderly end."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(2 * self.closing_s + 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()
        return status


@contextmanager
def started(settings: Settings, starting_s: float = STARTING_S) -> Iterator[Running]:
    """A server in a process of its own, which takes requests already and ends with the context.

    Raises ServingError with the reason where it does not come up, or not within so many seconds.
    """
    check_installed()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
        )
        running = Running("", "", process, settings.limits.closing_s)
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(asdict(settings)).encode() + b"\n")
                process.stdin.flush()
            told = _first_line(process.stdout, starting_s)
            if "url" not in told:
                raise ServingError(told.get("error") or f"The server did not start: {_last_line(said)}")
            running.url, running.token = told["url"], told["token"]
            yield running
        finally:
            running.stop()


def _first_line(pipe: IO[bytes], seconds: float) -> dict[str, str]:
    """What the child announces; nothing of it where it ends before."""
    found: list[bytes] = []
    reading = threading.Thread(target=lambda: found.append(pipe.readline()), daemon=True)
    reading.start()
    reading.join(seconds)
    if not found:
        return {
            "error": f"The server did not start within {seconds:g} s; give it more time, or a smaller model."
        }
    return json.loads(found[0]) if found[0] else {}


def _last_line(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing.")


def main() -> None:
    """What the child runs: settings from standard input, URL and token or an error to standard output."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no announcement

    def tell(**told: str) -> None:
        pipe.write(json.dumps(told) + "\n")
        pipe.flush()

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        given = json.loads(sys.stdin.readline())
        settings = Settings(**given | {"limits": Limits(**given["limits"])})
        serve(settings, lambda url, token: tell(url=url, token=token), lambda: sys.stdin.read() and None)
    except EdgeLabError as error:
        tell(error=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
