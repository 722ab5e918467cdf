"""A server of the tiny editing model, in this process, on loopback."""

import base64
import contextlib
import io
import pathlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2
import numpy as np
import openai
from PIL import Image

from blip3o_jax.pipeline import Pipeline
from blip3o_jax.serve import app, http
from blip3o_jax.serve.metrics import Metrics
from blip3o_jax.serve.queue import Queue
from blip3o_jax.serve.store import Store
from blip3o_jax.serve.worker import Worker

QUICK = {"num_inference_steps": 2, "temperature": 0.0}
FEW = {"extra_body": QUICK}


@dataclass
class Served:
    """A running server, what it is made of, and clients of it."""

    url: str
    server: app.Server
    process: http.Process
    http: httpx2.Client
    client: openai.OpenAI

    @property
    def address(self) -> tuple[str, int]:
        """Of its socket."""
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


@contextlib.contextmanager
def served(
    pipeline: Pipeline,
    folder: pathlib.Path,
    limit: int = 64,
    keys: tuple = (),
    timeout: float = 60,
    drain: float = 30,
) -> Iterator[Served]:
    """A server that is ready; it is stopped, and all its threads with it."""
    store = Store(folder)
    worker = Worker(pipeline, Queue(limit), Metrics())
    server = app.Server(worker, app.offer_of(pipeline, store), store, keys, timeout)
    process = http.Process(server, drain)
    listener = http.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.worker.start()
    thread = threading.Thread(target=process.run, args=[[listener]])
    thread.start()
    key = keys[0] if keys else "none"
    headers = {"authorization": f"Bearer {key}"}
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    with httpx2.Client(base_url=url, headers=headers, timeout=60) as plain:
        try:
            until(lambda: process.started and server.worker.ready.is_set())
            yield Served(url, server, process, plain, client)
        finally:
            client.close()
            process.handle_exit(15, None)
            thread.join(30)
            server.queue.close()
            server.worker.join(30)
            assert [thread.is_alive(), server.worker.is_alive()] == [False, False]


def until(holds, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def get(url: str) -> str:
    return httpx2.get(url).text


def pixels(image) -> np.ndarray:
    """Of an image in a response."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))).convert("RGB"))


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def data_url(array: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(array)).decode()}"


class Held:
    """Holds a server's model at its next batch, so that calls wait."""

    def __init__(self, served: Served):
        self._worker, self._make = served.server.worker, served.server.worker._make
        self.batches, self.free = [], threading.Event()
        self.begun = threading.Event()

    def __enter__(self) -> "Held":
        def make(batch):
            self.batches.append([item.request for item in batch])
            self.begun.set()
            self.free.wait(60)
            self._make(batch)

        self._worker._make = make
        return self

    def __exit__(self, *_) -> None:
        self.free.set()
        del self._worker._make
