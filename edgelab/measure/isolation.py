"""A process of its own for every measurement: memory starts at zero, threads are pinned, a crash stays outside.

`Isolated("package.module:Class", threads=2, argument=...)` makes an object of that class in a new process;
`call("method", ...)` runs a method there. Arguments and results are JSON. No pickle, no import of `__main__`. The
process is forked from a server that has imported and done nothing else (`forking`), or where that cannot be had, it is
a fresh interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from edgelab.errors import EdgeLabError
from edgelab.measure import forking

WATCH_S = 1.0  # how often a fresh interpreter looks whether its parent is still there
GRACE_S = 20.0  # for a process that is asked to stop: training ends its step and keeps what it has


class IsolatedError(EdgeLabError):
    """Something went wrong in the other process. `status` is "error", "oom" or "timeout"."""

    def __init__(self, message: str, status: str = "error") -> None:
        super().__init__(message)
        self.status = status


class Stopped(BaseException):
    """A `Stop` was used. Like Ctrl-C it is no error of what was measured."""


class Stop:
    """Ends what one thread measures, from another: `with stop:` there, `stop()` here.

    The other thread's process ends, and what waits for it raises Stopped.
    """

    def __init__(self) -> None:
        self._asked, self.heard = socket.socketpair()

    def __call__(self) -> None:
        with suppress(OSError):  # it is over already
            self._asked.send(b".")

    def __enter__(self) -> Stop:
        self._before = _stop.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _stop.reset(self._before)
        self._asked.close()
        self.heard.close()


_stop: ContextVar[Stop | None] = ContextVar("stop", default=None)


def _ignore(done: int, total: int) -> None:
    pass


def pinned(threads: int) -> dict[str, str]:
    """Variables of a measured process, beside those of this one."""
    count = str(threads)
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    # Transparent huge pages spare torch a page fault for every 4 kB of a tensor.
    return counts | {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "THP_MEM_ALLOC_ENABLE": "1"}


def get_ready(threads: int) -> None:
    """Let the server import while the caller does something else."""
    if forking.SUPPORTED:
        with suppress(OSError):  # said again, and dealt with, when a process is wanted
            forking.server(pinned(threads))


class _Forked:
    """A process that a server has forked."""

    def __init__(self, threads: int, log: int) -> None:
        theirs_in, self.stdin = os.pipe()
        self.stdout, theirs_out = os.pipe()
        variables = pinned(threads)
        try:
            self._server = forking.server(variables)
            try:
                self.pid = self._server.fork(os.environ | variables, [theirs_in, theirs_out, log])
            except forking.ServerGone:
                self._server = forking.server(variables, gone=self._server)
                self.pid = self._server.fork(os.environ | variables, [theirs_in, theirs_out, log])
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._code: int | None = None

    def send(self, signal_: int) -> None:
        if self._code is None:  # until it is reaped the number is its own
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal_)

    def wait(self) -> int:
        if self._code is None:
            self._code = self._server.reap(self.pid)
        return self._code

    def close(self) -> None:
        os.close(self.stdin)
        os.close(self.stdout)


class _Spawned:
    """A fresh interpreter."""

    def __init__(self, threads: int, log: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgelab.measure.isolation"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | pinned(threads),
            start_new_session=True,  # Ctrl-C goes to the parent alone, which then ends the child
        )
        self.pid = self._process.pid
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()

    def send(self, signal_: int) -> None:
        self._process.send_signal(signal_)

    def wait(self) -> int:
        return self._process.wait()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()


class Isolated:
    """An object in a process of its own. Use it as a context manager: leaving it ends the process.

    The process makes its object while the caller goes on; `wait`, or the first call, raises what went wrong there.
    """

    def __init__(self, target: str, threads: int, timeout_s: float = 3600, **arguments: Any) -> None:
        self.timeout_s = timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._received = b""
        self._stop = _stop.get()
        self._process = _start(threads, self._log.fileno())
        self._made = self._closed = False
        self._send(target, arguments | {"_threads": threads})

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, progress: Callable[[int, int], None] = _ignore, **arguments: Any) -> Any:
        """Run a method of the object over there and return its result.

        progress(done, total) is called as the method reports it. Raises IsolatedError where the method raised (with
        its message), the process died, ran out of memory or took longer than the time limit.
        """
        if self._closed:
            raise IsolatedError("The process has ended already.")
        self.wait()
        self._send(method, arguments)
        return self._result(progress)

    def wait(self) -> None:
        """Wait until the object is made. Raises IsolatedError where it cannot be, and ends the process."""
        if self._made:
            return
        try:
            self._result(_ignore)
        except BaseException:
            self.close()
            raise
        self._made = True

    def _send(self, what: str, arguments: dict[str, Any]) -> None:
        data = json.dumps([what, arguments]).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._process.stdin, data) :]
        except BrokenPipeError:
            raise self._death() from None

    def _result(self, progress: Callable[[int, int], None]) -> Any:
        deadline = time.monotonic() + self.timeout_s
        while True:
            kind, value = json.loads(self._line(deadline))
            if kind == "result":
                return value
            if kind == "error":
                raise IsolatedError(value["message"], value["status"])
            progress(*value)

    def _line(self, deadline: float) -> bytes:
        # Read the descriptor itself: a buffered reader hides lines that have come already from the selector.
        pipe = self._process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            if self._stop is not None:
                selector.register(self._stop.heard, selectors.EVENT_READ, self._stop)
            while b"\n" not in self._received:
                ready = selector.select(timeout=max(deadline - time.monotonic(), 0))
                if any(key.data is not None for key, _ in ready):
                    try:
                        self._interrupt()
                    finally:
                        self.close()
                    raise Stopped
                if not ready:
                    self.close()
                    raise IsolatedError(
                        f"It took longer than the limit of {self.timeout_s:.0f} s.", "timeout"
                    )
                data = os.read(pipe, 1 << 16)
                if not data:
                    raise self._death()
                self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _death(self) -> IsolatedError:
        code = self._process.wait()
        self._log.seek(0)
        said = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        self.close()
        if code == -signal.SIGKILL:
            return IsolatedError("The process was killed, most likely because memory ran out.", "oom")
        last = said[-1].strip() if said else "it said nothing"
        return IsolatedError(f"The process ended with exit code {code}: {last}")

    def _interrupt(self) -> None:
        """Ask the process to end, and give it time to: it may have something to keep."""
        if self._closed or not self._made:
            return
        self._process.send(signal.SIGINT)
        pipe, deadline = self._process.stdout, time.monotonic() + GRACE_S
        while (left := deadline - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            if not os.read(pipe, 1 << 16):  # its end: the process is gone
                return

    def close(self) -> None:
        """End the process, at once."""
        if self._closed:
            return
        self._closed = True
        self._process.send(signal.SIGKILL)
        self._process.wait()
        self._process.close()
        self._log.close()

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is KeyboardInterrupt:
                self._interrupt()
        finally:  # a second Ctrl-C does not wait
            self.close()


def _start(threads: int, log: int) -> _Forked | _Spawned:
    if forking.SUPPORTED:
        with suppress(OSError):
            return _Forked(threads, log)
    return _Spawned(threads, log)


def report(done: int, total: int) -> None:
    """Tell the parent process how far a method has come; nothing where there is none."""
    if _answers is not None:
        _answer("progress", [done, total])


_answers: Any = None


def _answer(kind: str, value: Any) -> None:
    _answers.write(json.dumps([kind, value]) + "\n")
    _answers.flush()


def serve() -> None:
    """The other end: make the object of the first line, then call its methods, one line each."""
    global _answers
    # A process that Jupyter's kernel starts ignores Ctrl-C, as the kernel does between two cells.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Whatever libraries print must not reach the pipe: file descriptor 1 becomes the error stream.
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    subject: Any = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            if subject is None:
                import torch

                torch.set_num_threads(arguments.pop("_threads"))
                place, _, name = method.partition(":")
                subject = getattr(importlib.import_module(place), name)(**arguments)
                _answer("result", None)
            else:
                _answer("result", getattr(subject, method)(**arguments))
        except Exception as error:
            _answer("error", _described(error))


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, which would otherwise be noticed after the present call."""
    import psutil

    while psutil.pid_exists(parent) and os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)


def _described(error: Exception) -> dict[str, str]:
    text = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
    memory = isinstance(error, MemoryError) or "allocate memory" in text
    return {
        "message": text if isinstance(error, EdgeLabError) else f"{type(error).__name__}: {text}",
        "status": "oom" if memory else "error",
    }


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    importlib.import_module("edgelab.measure.isolation").serve()  # __main__ is another copy of this file
