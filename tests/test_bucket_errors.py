"""Buckets that are not there, that refuse, or that do not answer: one sentence and exit code 2."""

import http.server
import threading
import time

import pytest
from clouds import forget, run
from tiny import practice

from blip3o_jax.jobs import work

SCHEMES = pytest.mark.parametrize("scheme", ["gs", "s3"])


@pytest.fixture
def config(tmp_path):
    """A config file of a run that reads no data."""
    values = {"stage": "pretrain_ar", "model": practice().model, "batch_size": 8, "num_steps": 1}
    values |= {"data": {"exercises": {"recital": 1.0}, "row_length": 34}}
    # ml_collections knows no key with a dot, as the changes to a model have.
    code = "from types import SimpleNamespace\ndef get_config():\n"
    code += f"    return SimpleNamespace(to_dict=lambda: {values!r})\n"
    (tmp_path / "config.py").write_text(code)
    return tmp_path / "config.py"


@SCHEMES
def test_a_bucket_that_is_not_there_is_named(cloud, scheme, config, capfd):
    workdir = f"{scheme}://nowhere/run"
    code, last = run(capfd, "train", "--config", config, "--workdir", workdir)
    sentence = f"blip3o-jax: The workdir {workdir} cannot be written: there is no such bucket."
    assert (code, last) == (2, sentence)
    code, last = run(capfd, "generate", "--status", "--out", workdir)
    assert (code, last) == (2, f"blip3o-jax: {workdir} holds no job (no job/job.json).")


@SCHEMES
def test_a_place_that_cannot_be_is_refused_before_the_model_is_loaded(cloud, scheme, capfd):
    out = f"{scheme}://nowhere/pictures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "load_for", lambda args: pytest.fail("the model is loaded"))
        code, last = run(capfd, "generate", "x", "--out", out)
    assert (code, last) == (2, f"blip3o-jax: {out} cannot be written: there is no such bucket.")


def test_a_name_that_no_bucket_has_is_said_in_the_clients_words(cloud, capfd):
    code, last = run(capfd, "generate", "--status", "--out", "s3://A Bucket/out")
    assert code == 2
    assert 'Invalid bucket name "A Bucket"' in last


class Refusing(http.server.BaseHTTPRequestHandler):
    """Refuses every request, as a server does whose credentials are others."""

    protocol_version = "HTTP/1.1"  # S3 clients ask first whether they may send

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def elsewhere(monkeypatch):
    """Sends all clients of this process to another server: a function of its port."""

    def send(port: int) -> None:
        for client in ("gcsfs", "s3fs"):
            forget(client)
        for name in ("AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")

    yield send
    for client in ("gcsfs", "s3fs"):
        forget(client)


@SCHEMES
def test_refused_credentials_are_one_sentence(cloud, scheme, config, elsewhere, capfd):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        elsewhere(server.server_port)
        workdir = f"{scheme}://team/run"
        code, last = run(capfd, "train", "--config", config, "--workdir", workdir)
        server.shutdown()
    assert code == 2
    assert last.startswith(f"blip3o-jax: The workdir {workdir} cannot be written: ")
    assert "Forbidden" in last


@SCHEMES
def test_a_server_that_is_gone_is_one_sentence(cloud, scheme, elsewhere, capfd):
    elsewhere(9)  # where nobody listens
    name = f"{scheme}://team/run"
    begin = time.monotonic()
    code, last = run(capfd, "generate", "x", "--checkpoint", name, "--out", "x.png")
    assert code == 2
    assert last.startswith(f"blip3o-jax: {name}")
    assert "onnect" in last  # in the words of the client
    assert time.monotonic() - begin < 60
