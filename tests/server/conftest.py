"""A server in this process with a tiny model and its second part, and a client that knows the token."""

import shutil
import subprocess

import pytest
from starlette.testclient import TestClient

from edgelab.deployments.hybrid.server.app import create_app
from edgelab.deployments.hybrid.server.service import Service
from edgelab.deployments.partition.stage import Stage
from edgelab.network import LOCAL
from edgelab.runtimes.eager import Eager
from tests.server.requests import AUTHORIZED, CUT, LIMITS, TOKEN


@pytest.fixture
def service(new_model, byte_tokenizer):
    second = Stage(new_model("llama"), CUT + 1, 4)
    return Service(Eager(new_model("llama")), byte_tokenizer, "tiny", 96, second, CUT)


@pytest.fixture
def app(service):
    return create_app(service, TOKEN, LIMITS)


@pytest.fixture
def client(app):
    with TestClient(app, headers=AUTHORIZED) as client:
        yield client


@pytest.fixture(scope="module")
def twin(new_model):
    """The same model in a session of the test's own."""
    return Eager(new_model("llama"))


@pytest.fixture(scope="module")
def first_part(new_model):
    return Stage(new_model("llama"), 0, CUT + 1)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate for this machine and its key, files of PEM."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate of this test, and is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", "key.pem", "-out", "certificate.pem", "-days", "2", "-subj", "/CN=edgelab",
         "-addext", f"subjectAltName=IP:{LOCAL}"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return str(folder / "certificate.pem"), str(folder / "key.pem")
