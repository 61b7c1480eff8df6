"""The fresh process: results and errors come over, and whatever happens there stays there."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from edgelab.errors import EdgeLabError
from edgelab.measure import forking
from edgelab.measure.isolation import Isolated, IsolatedError, Stop, Stopped, report
from edgelab.measure.turn import timing_lock

SUBJECT = """
import os, signal, subprocess, sys, tempfile, time
import torch
from edgelab.errors import EdgeLabError
from edgelab.measure.isolation import report

class Subject:
    def __init__(self, name="nobody", fail=False):
        self.name = name
        print("constructed on standard output")
        if fail:
            raise EdgeLabError("It cannot be made.")

    def whoami(self):
        return {"name": self.name, "pid": os.getpid(), "main": sys.modules["__main__"].__spec__.name}

    def echo(self, value):
        return value

    def grow(self, megabytes):
        from edgelab.measure.memory import peak_rss_mb
        before = peak_rss_mb()
        self.kept = bytearray(megabytes * 10**6)
        self.kept[::1024] = b"x" * len(self.kept[::1024])
        return peak_rss_mb() - before

    def surroundings(self):
        return [os.environ.get("EDGELAB_TEST"), os.getcwd(), sys.path[0], tempfile.gettempdir()]

    def threads(self):
        return [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]]

    def last_words(self, path):
        try:
            report(1, 2)
            time.sleep(60)
        except KeyboardInterrupt:
            with open(path, "w") as file:
                file.write("kept")
            raise

    def talk(self):
        print("from Python")
        sys.stdout.flush()
        os.write(1, b"from the file descriptor\\n")
        subprocess.run(["echo", "from a child"], check=True)
        return "said"

    def count(self, total):
        for done in range(1, total + 1):
            report(done, total)
        return total

    def wrong(self):
        raise ValueError("three is\\nnot two")

    def silent(self):
        raise ValueError

    def sentence(self):
        raise EdgeLabError("Group size 7 does not fit; use 8.")

    def unprintable(self):
        return object()

    def full(self):
        raise MemoryError

    def huge(self):
        return torch.empty(10**16).numel()

    def leave(self, code, last):
        print(last, file=sys.stderr, flush=True)
        os._exit(code)

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep(self):
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A module `isolated_subject` that fresh processes can import."""
    folder = tmp_path_factory.mktemp("subject")
    (folder / "isolated_subject.py").write_text(SUBJECT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield "isolated_subject:Subject"


FORKING = pytest.mark.skipif(not forking.SUPPORTED, reason="processes are not forked here")
WAYS = pytest.mark.parametrize("way", [pytest.param(False, id="spawned"), pytest.param(True, id="forked")])


@pytest.fixture(scope="module", params=[False, True], ids=["spawned", "forked"])
def shared(place, request):
    """One process for everything that does not end it, made in either way."""
    if request.param and not forking.SUPPORTED:
        pytest.skip("processes are not forked here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forking, "SUPPORTED", request.param)
        with Isolated(place, threads=1, timeout_s=60, name="Ada") as process:
            yield process


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if alive(child.pid)}


def test_the_object_lives_in_another_process(shared):
    answer = shared.call("whoami")
    assert answer["name"] == "Ada"
    assert answer["pid"] != os.getpid() and answer["pid"] in children()
    assert answer["main"].startswith("edgelab.measure.")  # not the main module of the caller


@pytest.mark.parametrize("value", [None, 1.5, float("inf"), "«é»\n", [1, {"a": [True]}], "x" * 1_000_000])
def test_arguments_and_results_come_over(shared, value):
    assert shared.call("echo", value=value) == value


def test_threads_are_pinned(shared):
    assert shared.call("threads") == [1, "1", "1"]


def test_the_peak_of_memory_is_what_the_process_itself_took(shared):
    assert shared.call("grow", megabytes=300) == pytest.approx(300, abs=15)


@WAYS
def test_a_process_has_the_surroundings_of_the_moment(place, way, monkeypatch, tmp_path):
    """Although the server that forks it was started in others."""
    monkeypatch.setattr(forking, "SUPPORTED", way and forking.SUPPORTED)
    for value in ("one", "two"):
        folder = tmp_path / value
        folder.mkdir()
        monkeypatch.setenv("EDGELAB_TEST", value)
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.chdir(folder)
        with Isolated(place, threads=1, timeout_s=60) as process:
            assert process.call("surroundings") == [value, str(folder), str(folder), str(folder)]


def mapped_mb(pid: int) -> float:
    """Memory that a process has of the files it maps, libraries above all."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024 / 1e6


@FORKING
def test_a_forked_process_has_the_libraries_in_memory_that_its_server_has(place):
    """Else they would be charged to what it measures."""
    with Isolated(place, threads=1, timeout_s=60) as process:
        process.wait()
        server = psutil.Process(process.pid).ppid()
        assert mapped_mb(process.pid) == pytest.approx(mapped_mb(server), rel=0.1)


class Interrupt(Exception):
    pass


@FORKING
def test_an_answer_that_an_interrupt_kept_from_its_reader_is_not_taken_for_another(place):
    def interrupt(*_):
        raise Interrupt

    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Isolated(place, threads=1, timeout_s=60) as process:
            process.wait()
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(Interrupt):
                process._process.wait()  # for the end of a process that goes on
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert not alive(process.pid)
    with Isolated(place, threads=1, timeout_s=60) as process:
        assert process.call("echo", value=1) == 1


@FORKING
def test_several_threads_may_ask_at_once(place):
    def pid(_):
        with Isolated(place, threads=1, timeout_s=60) as process:
            return process.call("whoami")["pid"]

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(pid, range(8)))) == 8


@FORKING
def test_a_copy_of_this_process_has_a_server_of_its_own(place):
    """Otherwise the copy would hold the socket, and take answers that are not its own."""
    finish(
        place,
        """
if (copy := os.fork()) == 0:
    other = server()
    os._exit(0 if other != first and psutil.Process(other).ppid() == os.getpid() else 1)
assert os.waitpid(copy, 0)[1] == 0
assert server() == first
""",
    )


@FORKING
def test_a_server_that_starts_before_its_caller_imports_torch_is_the_one_that_forks(place):
    """Libraries set variables when they are imported; none of them may ask for another server."""
    finish(
        place, "import edgelab.lab.bench, edgelab.lab.road, torch._inductor.config\nassert server() == first"
    )


SERVERS = """
import os, psutil, sys
from edgelab.measure.isolation import Isolated
def server():
    with Isolated(sys.argv[1], threads=1) as process:
        process.wait()
        return psutil.Process(process.pid).ppid()
first = server()
"""


def finish(place: str, script: str) -> None:
    command = [sys.executable, "-c", SERVERS + script, place]
    fresh = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    done = subprocess.run(command, env=fresh, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@FORKING
def test_a_server_that_has_died_is_replaced(place):
    with Isolated(place, threads=1, timeout_s=60) as process:
        psutil.Process(process.pid).parent().kill()
        wait_for_the_end_of([process.pid])
        with pytest.raises(IsolatedError):
            process.call("echo", value=1)
    with Isolated(place, threads=1, timeout_s=60) as process:
        assert process.call("echo", value=2) == 2


PARENT = """
import sys
from edgelab.measure import forking
from edgelab.measure.isolation import Isolated
forking.SUPPORTED = sys.argv[2] == "True"
process = Isolated(sys.argv[1], threads=1)
process.wait()
print(process.pid, flush=True)
process.call("sleep")
"""


@WAYS
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_ends_leaves_no_process(place, how, way):
    command = [sys.executable, "-c", PARENT, place, str(way and forking.SUPPORTED)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        left = [int(parent.stdout.readline())]
        left += [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
        time.sleep(0.5)  # into the call
        parent.send_signal(how)
    wait_for_the_end_of(left)


def wait_for_the_end_of(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_processes_are_never_timed_at_once():
    script = (
        "import time\nfrom edgelab.measure.turn import timing_lock\nwith timing_lock():\n print(flush=True)"
    )
    with timing_lock():
        other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(3)
    assert other.wait(30) == 0


def test_what_the_child_prints_does_not_reach_the_answers(shared):
    assert shared.call("talk") == "said"
    assert shared.call("echo", value=1) == 1


@pytest.mark.parametrize("total", [3, 2000])
def test_progress_arrives_in_order(place, total):
    """Also where many lines arrive at once: none may wait in a buffer for the next one."""
    seen = []
    with Isolated(place, threads=1, timeout_s=20) as process:
        assert process.call("count", progress=lambda *pair: seen.append(pair), total=total) == total
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_progress_outside_of_a_child_goes_nowhere(capfd):
    assert report(1, 2) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("method", "message", "status"),
    [
        ("wrong", "ValueError: three is", "error"),
        ("silent", "ValueError: ValueError", "error"),
        ("sentence", "Group size 7 does not fit; use 8.", "error"),
        ("full", "MemoryError: MemoryError", "oom"),
        ("missing", "AttributeError: 'Subject' object has no attribute 'missing'", "error"),
    ],
)
def test_errors_come_over_and_the_process_goes_on(shared, method, message, status):
    with pytest.raises(IsolatedError) as caught:
        shared.call(method)
    assert (str(caught.value), caught.value.status) == (message, status)
    assert isinstance(caught.value, EdgeLabError)
    assert shared.call("echo", value="still here") == "still here"


def test_a_result_that_is_no_json_is_an_error(shared):
    with pytest.raises(IsolatedError, match="TypeError: Object of type object is not JSON serializable"):
        shared.call("unprintable")
    assert shared.call("echo", value=2) == 2


def test_an_allocation_that_fails_is_out_of_memory(shared):
    with pytest.raises(IsolatedError, match="memory") as caught:
        shared.call("huge")
    assert caught.value.status == "oom"
    assert "\n" not in str(caught.value)


def test_a_crash_gives_the_exit_code_and_the_last_words(place):
    with Isolated(place, threads=1, timeout_s=60) as process:
        with pytest.raises(
            IsolatedError, match=r"^The process ended with exit code 3: last words$"
        ) as caught:
            process.call("leave", code=3, last="last words")
        assert caught.value.status == "error"


def test_kill_9_is_out_of_memory(place):
    with Isolated(place, threads=1, timeout_s=60) as process:
        with pytest.raises(
            IsolatedError, match=r"was killed, most likely because memory ran out\.$"
        ) as caught:
            process.call("killed")
        assert caught.value.status == "oom"


def test_time_limit_ends_the_process(place):
    with Isolated(place, threads=1, timeout_s=30) as process:
        pid = process.call("whoami")["pid"]
        process.timeout_s = 0.3
        started = time.monotonic()
        with pytest.raises(IsolatedError, match="longer than the limit of 0 s") as caught:
            process.call("sleep")
        assert caught.value.status == "timeout"
        assert time.monotonic() - started < 20
        assert not alive(pid)


def test_a_call_after_the_end_is_an_error_of_the_package(place):
    with Isolated(place, threads=1, timeout_s=60) as process:
        with pytest.raises(IsolatedError):
            process.call("killed")
        with pytest.raises(IsolatedError):
            process.call("echo", value=1)


def test_leaving_the_context_ends_the_process(place):
    with Isolated(place, threads=1, timeout_s=60) as process:
        pid = process.call("whoami")["pid"]
    assert not alive(pid)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("isolated_subject:Subject", {"fail": True}, r"^It cannot be made\.$"),
        ("isolated_subject:Nobody", {}, "^AttributeError: .*Nobody"),
        ("no_such_module:Subject", {}, "^ModuleNotFoundError: No module named 'no_such_module'$"),
    ],
)
def test_an_object_that_cannot_be_made_leaves_no_process(target, arguments, message, place):
    before = children()
    process = Isolated(target, threads=1, timeout_s=60, **arguments)
    with pytest.raises(IsolatedError, match=message):
        process.call("whoami")
    assert children() == before
    with pytest.raises(IsolatedError, match="has ended already"):
        process.call("whoami")


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_a_process_that_is_asked_to_stop_may_keep_what_it_has(place, tmp_path, how):
    """By a button in another thread, and by Ctrl-C here; then it is gone."""
    stop = Stop()

    def halt(done: int, total: int) -> None:
        if how == "interrupt":
            raise KeyboardInterrupt
        stop()

    with (
        stop,
        pytest.raises(Stopped if how == "stop" else KeyboardInterrupt),
        Isolated(place, threads=2) as one,
    ):
        pid = one.call("whoami")["pid"]
        one.call("last_words", progress=halt, path=str(tmp_path / "words"))
    assert (tmp_path / "words").read_text() == "kept" and not psutil.pid_exists(pid)


IGNORING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as Jupyter's kernel does between two cells
from edgelab.measure.isolation import Isolated

def halt(done, total):
    raise KeyboardInterrupt

try:
    with Isolated("isolated_subject:Subject", threads=2) as one:
        one.call("last_words", progress=halt, path=sys.argv[1])
except KeyboardInterrupt:
    pass
"""


def test_a_parent_that_ignores_interrupts_can_still_ask(place, tmp_path):
    subprocess.run([sys.executable, "-c", IGNORING, str(tmp_path / "words")], check=True, timeout=120)
    assert (tmp_path / "words").read_text() == "kept"
