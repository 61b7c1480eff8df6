"""A server that has imported what measured processes need, and forks one whenever it is asked.

A fresh interpreter spends seconds on importing torch and transformers before it measures anything. The server is such
an interpreter, with the same pinned threads, that imports them once and then does nothing else: no parallel region has
run in it and no tokenizer, since OpenMP and tokenizers hang in a process that is forked after them. (The threads that
OpenBLAS and pyarrow's allocator start at import stop for a fork and start again.) What it forks has the memory of the
imports and nothing more, threads of its own, and the environment, folder and search path of the moment.

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
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
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
READ_AT_IMPORT = (  # beginnings of variables that a running process does not read again
    *("HF_", "TRANSFORMERS_", "TORCH", "ATEN_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_"),
    *("DNNL_", "ONEDNN_", "LD_", "MALLOC_", "GLIBC_"),
)
READ_LATER = "TORCHINDUCTOR_CACHE_DIR"  # which torch sets when it is imported, here in the caller
MESSAGE = 1 << 18  # bytes, more than an environment has
PR_SET_PDEATHSIG = 1
MADV_POPULATE_READ = 22
SUPPORTED = sys.platform == "linux"


class ServerGone(OSError):
    """The server does not answer any more."""


class Server:
    """One server of this process, for one number of threads. It imports while the caller goes on."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._lock = threading.Lock()
        self._asked = 0
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
                self._asked += 1
                message = json.dumps(request | {"number": self._asked}).encode()
                socket.send_fds(self._socket, [message], descriptors or [])
                while data := self._socket.recv(MESSAGE):
                    answer = json.loads(data)
                    if answer["number"] == self._asked:  # not what Ctrl-C kept an earlier caller from reading
                        return answer
            except OSError as error:
                raise ServerGone(str(error)) from None
        raise ServerGone("it has ended")

    def leave(self) -> None:
        """Let go of it, without ending it."""
        self._socket.close()

    def close(self) -> None:
        """End it, and what it has forked."""
        self.leave()
        self._process.kill()
        self._process.wait()


_servers: dict[tuple, Server] = {}
_starting = threading.Lock()


def server(pinned: dict[str, str], gone: Server | None = None) -> Server:
    """The server of this process for such an environment, started where there is none but one that is gone."""
    environment = os.environ | pinned
    decides = tuple(
        (name, value)
        for name, value in sorted(environment.items())
        if name.startswith(READ_AT_IMPORT) and name != READ_LATER
    )
    with _starting:
        if gone is not None and _servers.get(decides) is gone:  # else another thread has replaced it
            _servers.pop(decides).close()
        if decides not in _servers:
            _servers[decides] = Server(environment)
        return _servers[decides]


@atexit.register
def _close_all() -> None:
    for one in _servers.values():
        one.close()


def _leave_all() -> None:
    """In a process that somebody forked from this one: its servers are not ours, and it may outlive this one."""
    global _starting
    _starting = threading.Lock()
    for one in _servers.values():
        one.leave()
    _servers.clear()


if SUPPORTED:
    os.register_at_fork(after_in_child=_leave_all)


# The other end


def serve(connection: socket.socket) -> None:
    """Import, then fork and reap as asked, until the other end of the socket is closed."""
    own_path = [place for place in sys.path if place not in _places()]
    for name in IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector of a child would touch, and so copy, all of it
    resident = _resident()
    here = os.getpid()
    codes: dict[int, int | None] = {}  # of what was forked; None: it may be running
    while True:
        data, descriptors, *_ = socket.recv_fds(connection, MESSAGE, 3)
        if not data:
            break
        request = json.loads(data)
        if pid := request.get("reap"):
            if codes[pid] is None:
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = {"code": codes[pid]}
        else:
            pid = os.fork()
            if pid == 0:
                connection.close()
                _become(request, descriptors, here, own_path, resident)
            codes[pid] = None
            for descriptor in descriptors:
                os.close(descriptor)
            answer = {"pid": pid}
        connection.send(json.dumps(answer | {"number": request["number"]}).encode())
    for pid in (pid for pid, code in codes.items() if code is None):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _places() -> list[str]:
    """What an interpreter that starts here with -m puts before the libraries when it looks for a module."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [str(Path.cwd() / place) for place in ("", *filter(None, named))]


def _resident() -> list[tuple[int, int]]:
    """Address and bytes of what this process has in memory of the files it has mapped, libraries above all."""
    import numpy as np

    page, found = mmap.PAGESIZE, []
    with Path("/proc/self/pagemap").open(
        "rb", buffering=0
    ) as pages:  # eight bytes each, the highest bit: present
        for line in Path("/proc/self/maps").read_text().splitlines():
            place, *_, name = line.split(maxsplit=5)
            if not name.startswith("/"):
                continue
            start, end = (int(address, 16) for address in place.split("-"))
            pages.seek(start // page * 8)
            present = np.frombuffer(pages.read((end - start) // page * 8), "<i8") < 0
            edges = np.flatnonzero(np.diff(present, prepend=False, append=False)).reshape(-1, 2).tolist()
            found += [(start + page * first, page * (last - first)) for first, last in edges]
    return found


def _become(
    request: dict[str, Any],
    descriptors: list[int],
    parent: int,
    own_path: list[str],
    resident: list[tuple[int, int]],
) -> None:
    """Turn a forked process into a measured one; does not return."""
    code = 1
    try:
        system = ctypes.CDLL(None)
        system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
        sys.path[:] = _places() + own_path
        tempfile.tempdir = None  # looked up again, in this environment
        # A fork does not take over pages of mapped files. The process would get them one by one as it goes, and what
        # it measures would be charged with libraries that a fresh interpreter has in memory before it.
        for address, size in resident:
            system.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), MADV_POPULATE_READ)
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
