"""The server in a process of its own: what arrives on its socket, many clients at once, how it starts and ends."""

import dataclasses
import errno
import http.client
import json
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from edgelab import runtimes
from edgelab.deployments.hybrid.client.cloud import Cloud
from edgelab.deployments.hybrid.client.failures import CloudBusy, CloudDown, CloudError
from edgelab.deployments.hybrid.server import serving
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.serving import Running, ServingError, Settings, started
from edgelab.network import LOCAL
from edgelab.recipes import RecipeError
from tests.server.sockets import PATIENCE_S, code, say

LIMITS = Limits(body_bytes=20_000, waiting=16, head_s=5.0, body_s=3.0, request_s=30.0, closing_s=2.0)
CLIENTS = 200
GROWTH_MB = 40  # of resident memory from one crowd to the next


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    """EDGELAB_HOME of the servers."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGELAB_HOME", str(home))
        yield partial(patch.setenv, "EDGELAB_HOME", str(home))


@pytest.fixture(scope="module")
def settings(tiny):
    return Settings(model=str(tiny), name="tiny", threads=1, limits=LIMITS)


@pytest.fixture(scope="module")
def running(at_home, settings):
    at_home()
    with started(settings) as running:
        yield running


@pytest.fixture
def cloud(running):
    with Cloud(running.url, running.token, deadline_s=PATIENCE_S) as cloud:
        yield cloud


def address(running: Running) -> tuple[str, int]:
    host, _, port = running.url.partition("://")[2].rpartition(":")
    return host, int(port)


# What arrives on the socket


@pytest.mark.parametrize(
    "line",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # without a host
        b"POST /verify HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /verify HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /verify HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 1_000_000 + b"\r\n\r\n",
        b"GET /" + b"z" * 1_000_000,
    ],
)
def test_what_is_no_http_is_answered_and_ended(running, cloud, line):
    status, body = say(address(running), line)
    assert (status, code(body)) == (400, "malformed_request") if status == 400 else status in (0, 501)
    assert status != 0 or len(line) > 50_000  # what is still being sent may be lost with the connection
    assert cloud.health()["status"] == "ok"


def request(running, body=b"", more="", path="/v1/completions") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: edge\r\nauthorization: Bearer {running.token}\r\n"
        f"content-type: application/json\r\n{more or f'content-length: {len(body)}'}\r\n\r\n"
    ).encode() + body


def test_a_body_that_is_too_large_is_refused_by_its_head(running):
    status, body = say(address(running), request(running, more="content-length: 20001"))
    assert (status, code(body)) == (413, "body_too_large")


def test_a_body_without_a_length_is_counted(running, cloud):
    piece = b"1000\r\n" + b" " * 4096 + b"\r\n"
    status, body = say(address(running), request(running, more="transfer-encoding: chunked"), *[piece] * 1000)
    assert (status, code(body)) == (413, "body_too_large")
    assert cloud.health()["status"] == "ok"


def test_a_chunk_that_is_none_ends_the_connection(running):
    status, body = say(address(running), request(running, more="transfer-encoding: chunked"), b"xyz\r\n")
    assert (status, code(body)) == (400, "malformed_request")


def test_a_slow_head_is_ended(running, cloud):
    head = request(running)
    status, body = say(
        address(running), *[head[place : place + 1] for place in range(len(head))], pause_s=0.1
    )
    assert (status, code(body)) == (408, "slow_head")
    assert cloud.health()["status"] == "ok"


def test_a_slow_body_is_ended(running):
    head = request(running, more="content-length: 1000")
    status, body = say(address(running), head, *[b" "] * 100, pause_s=0.1)
    assert (status, code(body)) == (408, "slow_body")


def test_a_connection_on_which_nothing_comes_is_ended(running):
    assert say(address(running))[0] == 408
    status, body = say(address(running), request(running)[:30])
    assert (status, code(body)) == (408, "slow_head")


def test_the_head_of_a_second_request_has_its_time_too(running):
    first = f"GET /health HTTP/1.1\r\nhost: edge\r\nauthorization: Bearer {running.token}\r\n\r\n".encode()
    status, body = say(address(running), first, b"", b"", b"GET /hea", pause_s=0.2)
    assert status == 200
    assert body.endswith(b"}}") and code(body[body.rindex(b'{"error"') :]) == "slow_head"


def test_requests_that_come_together_are_answered_in_order(running):
    bodies = [
        json.dumps({"prompt": [5, 6], "max_tokens": count, "temperature": 0}).encode() for count in (1, 2, 3)
    ]
    with socket.create_connection(address(running), PATIENCE_S) as connection:
        connection.sendall(b"".join(request(running, body) for body in bodies))
        for count in (1, 2, 3):
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            told = json.loads(answer.read())
            assert told["usage"]["completion_tokens"] == count


def test_whoever_asks_and_hangs_up_at_once_leaves_nothing_behind(running, cloud):
    body = json.dumps({"prompt": [5, 6], "max_tokens": 500, "stream": True}).encode()
    for _ in range(5):
        with socket.create_connection(address(running), PATIENCE_S) as connection:
            connection.sendall(request(running, body))
    assert cloud.complete([5, 6], 2).finish == "length"  # waits for a turn, and has it
    assert cloud.health()["waiting"] == 0


def test_the_token_is_in_no_argument_and_no_environment(running):
    process = psutil.Process(running.pid)
    assert not any(running.token in text for text in [*process.cmdline(), *process.environ().values()])
    assert running.token not in repr(running)


# Many at once


def crowd(running: Running, expected: dict[int, list[int]]) -> tuple[int, float]:
    """Everyone asks at once, and asks again when told to; refusals, and resident megabytes of the server afterwards."""
    refusals, start = [], threading.Barrier(CLIENTS)

    def ask(number: int) -> tuple[int, list[int]]:
        with Cloud(running.url, running.token, deadline_s=120, waits=False) as cloud:
            start.wait()
            while True:
                try:
                    return number, cloud.complete([2 + number, 5, 7], 6, seed=number).ids
                except CloudBusy as busy:
                    refusals.append(number)
                    time.sleep(busy.retry_s)

    with ThreadPoolExecutor(CLIENTS) as everyone:
        found = list(everyone.map(ask, range(CLIENTS)))
    assert len(found) == CLIENTS
    assert dict(found) == expected
    return len(refusals), psutil.Process(running.pid).memory_info().rss / 1e6


def test_two_hundred_clients_at_once_lose_nothing_and_mix_nothing_up(running, cloud, at_home, settings):
    at_home()
    from edgelab.deployments.hybrid.server.service import Service

    session = Service.load("none", settings.model).session
    expected = {}
    for number in range(CLIENTS):
        token = session.prefill([2 + number, 5, 7])
        expected[number] = [token]
        while len(expected[number]) < 6:
            expected[number].append(session.decode(expected[number][-1]))
        if 1 in expected[number]:  # the end of a text
            expected[number] = expected[number][: expected[number].index(1)]
    assert len({tuple(ids) for ids in expected.values()}) > CLIENTS / 2
    refused, before = crowd(running, expected)
    assert refused > 0  # more came than wait at a time
    again, after = crowd(running, expected)
    assert after - before < GROWTH_MB, (before, after, refused, again)
    told = cloud.health()
    assert (told["waiting"], told["conversations"]) == (0, 0)
    deadline = time.monotonic() + PATIENCE_S
    while len(psutil.Process(running.pid).net_connections()) > 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(psutil.Process(running.pid).net_connections()) <= 3  # it listens, and `cloud` is connected


def test_a_client_that_waits_is_served_without_more_ado(running):
    def ask(number):
        with Cloud(running.url, running.token, deadline_s=120) as cloud:
            return cloud.complete([5, 6, 7], 30).ids

    with ThreadPoolExecutor(40) as everyone:
        assert len({tuple(ids) for ids in everyone.map(ask, range(40))}) == 1


# How it starts and ends


def test_it_ends_with_a_signal_and_frees_its_port(at_home, settings):
    at_home()
    with started(settings) as running:
        place = address(running)
        with Cloud(running.url, running.token, deadline_s=PATIENCE_S) as cloud:
            pieces = cloud.stream([5, 6], 4)
            next(pieces)
            running.process.send_signal(signal.SIGTERM)
            assert len(list(pieces)) >= 3  # what was under way is finished
            assert running.process.wait(PATIENCE_S) == 0
            with pytest.raises(CloudDown, match="cannot be reached"):
                cloud.health()
        socket.create_server(place).close()
    assert running.stop() == 0


def test_a_server_that_is_killed_is_noticed_within_the_deadline(at_home, settings):
    at_home()
    with started(settings) as running, Cloud(running.url, running.token, deadline_s=5) as cloud:
        cloud.health()
        killer = threading.Timer(0.3, running.process.kill)
        began = time.monotonic()
        killer.start()
        with pytest.raises(CloudError):
            while True:
                list(cloud.stream([5, 6], 500))
        assert time.monotonic() - began < PATIENCE_S
        began = time.monotonic()
        with pytest.raises(CloudDown):
            cloud.health()
        assert time.monotonic() - began < 6


def test_over_tls_and_until_its_parent_is_gone(at_home, settings, certificate):
    at_home()
    file, key = certificate
    with started(dataclasses.replace(settings, host="0.0.0.0", certificate=file, key=key)) as running:
        url = running.url.replace("0.0.0.0", LOCAL)
        assert url.startswith("https://")
        with Cloud(url, running.token, certificate=file, deadline_s=PATIENCE_S) as cloud:
            assert cloud.health()["model"] == "tiny"
        with Cloud(url, running.token, deadline_s=PATIENCE_S) as cloud, pytest.raises(CloudError):
            cloud.health()  # nobody vouches for this certificate
        plain = Cloud(url.replace("https", "http"), running.token, deadline_s=PATIENCE_S)
        with plain as cloud, pytest.raises(CloudError):
            cloud.health()
        running.process.stdin.close()
        assert running.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"host": "0.0.0.0"}, "would travel in clear"),
        ({"host": "192.168.1.5"}, "would travel in clear"),
        ({"host": "::"}, "would travel in clear"),
        ({"host": "edge.example"}, "would travel in clear"),
        ({"certificate": "a.pem"}, "one of the two files is not named"),
        ({"certificate": "a.pem", "key": "b.pem"}, "There is no file a.pem"),
        ({"port": 65_536}, "0 to 65535"),
        *(
            (
                {"recipe": f"none @ {way}"},
                f"@ {way} shares requests between edge and cloud, and a server runs one",
            )
            for way in ("cloud", "cascade", "speculative", "redact", "split")
        ),
    ],
)
def test_what_is_not_served(change, sentence):
    with pytest.raises(ServingError, match=sentence):
        Settings(**change)


@pytest.mark.parametrize("host", [LOCAL, "127.8.9.10", "::1", "localhost"])
def test_this_machine_needs_no_tls(host):
    assert Settings(host=host).scheme == "http"
    assert Settings(host="0.0.0.0", insecure=True).scheme == "http"


def test_a_server_that_does_not_start_says_why(at_home, settings):
    at_home()
    with socket.create_server((LOCAL, 0)) as taken:
        port = taken.getsockname()[1]
        for change, sentence in (
            ({"port": port}, f"Port {port} of {LOCAL} cannot be had"),
            ({"model": "nowhere/at-all/really"}, "There is no model at"),
        ):
            with (
                pytest.raises(ServingError, match=sentence),
                started(dataclasses.replace(settings, **change)),
            ):
                pass


def test_a_certificate_and_another_key(certificate, tmp_path):
    file, key = certificate
    for pair in ((key, file), (file, file)):
        with pytest.raises(ServingError, match="no certificate and key that belong together"):
            serving.tls_context(*pair)


def test_a_cut_that_is_none(at_home, settings):
    at_home()
    from edgelab.deployments.hybrid import CutError
    from edgelab.deployments.hybrid.server.service import Service

    with pytest.raises(CutError, match="cut=3 is none of a model of 2 layers"):
        Service.load("none", settings.model, cut=3)
    with pytest.raises(RecipeError, match="nothing"):
        Settings(recipe="nothing.like=that")


def test_without_the_packages_one_sentence(monkeypatch):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(runtimes.EngineMissing, match=r"pip install --editable '.\[hybrid\]'"),
        started(Settings()),
    ):
        pass


def test_a_token_in_a_file_is_for_its_owner(tmp_path):
    file = tmp_path / "token"
    file.write_text("an old one, which anybody reads")
    file.chmod(0o644)
    serving.write_token(file, "secret")
    assert file.read_text() == "secret\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nofolder/token", "There is no folder .*nofolder for the token"),
        ("folder", "folder is there and no file"),
        ("file/token", "There is no folder .*file for the token"),
        ("a" * 300, "cannot be written to .*File name too long"),
    ],
)
def test_a_token_that_cannot_be_written_is_one_sentence(tmp_path, name, sentence):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("another")
    with pytest.raises(ServingError, match=sentence) as raised:
        serving.write_token(tmp_path / name, "secret")
    assert "secret" not in str(raised.value)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "folder"]


def test_a_token_whose_folder_takes_no_file_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*given):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(serving.os, "open", refuse)
    with pytest.raises(ServingError, match=r"cannot be written to .*token \(Permission denied\)"):
        serving.write_token(tmp_path / "token", "secret")


def test_serving_in_this_process_ends_when_told(at_home, settings):
    at_home()
    told, end = {}, threading.Event()

    def announce(url, token):
        told.update(url=url, token=token)

    def use():
        while not told:
            time.sleep(0.01)
        with Cloud(told["url"], told["token"], deadline_s=PATIENCE_S) as cloud:
            told["health"] = cloud.health()
            told["answer"] = cloud.complete([5, 6, 7], 1)
        end.set()

    user = threading.Thread(target=use)
    user.start()
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    few = dataclasses.replace(settings, whole_context=True, limits=Limits(prompt_tokens=1))
    serving.serve(few, announce, end.wait)
    user.join()
    assert told["health"]["model"] == "tiny"
    assert told["answer"].read == 3
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address(Running(told["url"], "", None)), 5)


def test_without_a_name_it_is_model_and_recipe(tiny):
    assert Settings("quantize.bf16", str(tiny)).called == f"{tiny.name}: quantize.bf16"
    assert Settings("quantize.bf16", str(tiny), name="small").called == "small"


@pytest.mark.embedded
def test_the_embedded_model_on_another_engine():
    pytest.importorskip("xllamacpp")
    settings = Settings(recipe="none @ llamacpp", threads=1, name="small")
    with started(settings) as running, Cloud(running.url, running.token, deadline_s=120) as cloud:
        said = cloud.chat([{"role": "user", "content": "Name the capital of France."}], 24, logprobs=2)
        assert "Paris" in said.text
        assert len(said.ids) == len(said.logprobs) == len(said.top)
        assert cloud.complete(said.text, 4).ids is not None


def test_answers_do_not_wait_for_acknowledgements():
    with serving.listening(LOCAL, 0) as place, socket.create_connection(place.getsockname()):
        taken, _ = place.accept()
        with taken:
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
