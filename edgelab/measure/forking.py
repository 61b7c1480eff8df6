"""A server that has imported what measured processes need, and forks one whenever it is asked.

A fresh interpreter spends seconds on importing torch and transformers before it measures anything. The server is such
an interpreter, with the same pinned threads, that imports them once and then does nothing else: no parallel region has
run in it and no tokenizer, since OpenMP and tokenizers hang in a process that is forked after them. What it forks has
the memory of the imports and nothing more, threads of its own, and the environment of the moment.

The server ends with the process that started it, however that one ends: its socket is closed then, and it kills what
it has forked. What it has forked ends with the server: the kernel sees to it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

IMPORTS = (
    "torch",
    "scipy.stats",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "edgelab.lab.bench",
)
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "TORCH", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_")  # variables
MESSAGE = 1 << 18  # bytes, more than an environment has
PR_SET_PDEATHSIG = 1
SUPPORTED = sys.platform == "linux"


class ServerGone(OSError):
    """The server does not answer any more."""


class Server:
    """One server of this process, for one number of threads. It imports while the caller goes on."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgelab.measure.forking", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the parent alone
            )

    def fork(self, environment: dict[str, str], descriptors: list[int]) -> int:
        """The pid of a new process that has these three descriptors as its standard streams, and serves `isolation`.

        Raises ServerGone.
        """
        return self._ask({"environment": environment, "folder": str(Path.cwd())}, descriptors)["pid"]

    def reap(self, pid: int) -> int:
        """Wait until a forked process has ended; its exit code, negative for a signal."""
        with contextlib.suppress(ServerGone):
            return self._ask({"reap": pid})["code"]
        return -signal.SIGKILL  # it went with the server

    def _ask(self, request: dict[str, Any], descriptors: list[int] | None = None) -> dict[str, Any]:
        with self._lock:
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors or [])
                answer = self._socket.recv(MESSAGE)
            except OSError as error:
                raise ServerGone(str(error)) from None
        if not answer:
            raise ServerGone("it has ended")
        return json.loads(answer)

    def close(self) -> None:
        """End it, and what it has forked."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


_servers: dict[tuple, Server] = {}
_starting = threading.Lock()


def server(pinned: dict[str, str], fresh: bool = False) -> Server:
    """The server of this process for such an environment, started where there is none; `fresh`: the old one is gone."""
    environment = os.environ | pinned
    decides = sorted((name, value) for name, value in environment.items() if name.startswith(READ_AT_IMPORT))
    place = (os.getpid(), *decides)  # a process that somebody forked from this one starts its own
    with _starting:
        if fresh and place in _servers:
            _servers.pop(place).close()
        if place not in _servers:
            _servers[place] = Server(environment)
        return _servers[place]


@atexit.register
def _close_all() -> None:
    for (pid, *_), one in _servers.items():
        if pid == os.getpid():
            one.close()


# The other end


def serve(connection: socket.socket) -> None:
    """Import, then fork and reap as asked, until the other end of the socket is closed."""
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector of a child would touch, and so copy, all of it
    children: set[int] = set()
    while True:
        data, descriptors, *_ = socket.recv_fds(connection, MESSAGE, 3)
        if not data:
            break
        request = json.loads(data)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            children.discard(request["reap"])
            connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
            continue
        here = os.getpid()
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(request, descriptors, here)
        children.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(json.dumps({"pid": pid}).encode())
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any], descriptors: list[int], parent: int) -> None:
    """Turn a forked process into a measured one; does not return."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended in between
            return
        os.setsid()
        for standard, descriptor in enumerate(descriptors):
            os.dup2(descriptor, standard)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
        from edgelab.measure import isolation

        isolation.serve()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201 (the last words of this process)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
