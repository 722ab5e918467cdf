"""The thread that owns the model: compiles everything, then makes what waits, batch by batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from blip3o_jax.pipeline import Pipeline
from blip3o_jax.request import Request, of_each_shape
from blip3o_jax.serve.metrics import Metrics
from blip3o_jax.serve.queue import Done, Item, Queue, Step

log = logging.getLogger(__name__)

# Settings that are compiled into the programs: a request has the server's values.
COMPILED = ("top_k", "renorm_min", "reference_quirks")


class Worker(threading.Thread):
    """Makes the images of a queue with a pipeline, which nobody else may use."""

    def __init__(self, pipeline: Pipeline, queue: Queue, metrics: Metrics):
        super().__init__(name="model", daemon=True)
        self.pipeline, self.queue, self.metrics = pipeline, queue, metrics
        self.ready = threading.Event()
        self.error: BaseException | None = None  # why there is no server
        self.batch_seconds = 1.0  # of the last one
        self.now: list[Item] = []
        pipeline.watch(self._stops, self._seen)

    def run(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self.error = error
            return
        self.ready.set()
        self.metrics.ready.set(1)
        while batch := self.queue.take(self.pipeline.batch_size):
            self._make(batch)

    def _warm_up(self) -> None:
        """Runs every program that a request can ask for."""
        begun, own = time.monotonic(), self.pipeline
        # The programs of a server do for any number of steps.
        requests = list(of_each_shape(own.model.config, own.text, True, num_inference_steps=1))
        for number, request in enumerate(requests, 1):
            # A server that is told to stop by now need not compile the rest.
            if self.queue.is_closed:
                return
            list(self.pipeline.run([request]))
            log.info("Compiled %d of %d.", number, len(requests))
        log.info("Ready after %.0f s.", time.monotonic() - begun)

    def _make(self, batch: list[Item]) -> None:
        # An item leaves the dictionary when its call is told of it.
        begun, self.now = time.monotonic(), batch
        items = {id(item.request): item for item in batch}
        for item in batch:
            self.metrics.seconds.labels("queue").observe(begun - item.call.begun)

        def failed(request: Request, reason: str) -> None:
            _tell(items.pop(id(request)), None, reason)

        # All are of one shape and no more than a batch, so that this is one run of the programs.
        try:
            for sample in self.pipeline.run((item.request for item in batch), failed):
                _tell(items.pop(id(sample.request)), sample)
                kind = "edit" if sample.request.images else "generation"
                self.metrics.images.labels(kind).inc()
        # Out of memory, a bug: these calls fail, and the next ones may be served.
        except Exception:
            log.exception("A batch failed.")
            for item in items.values():
                _tell(item, None, "The model failed; the server's log says why.")
        self.now, self.batch_seconds = [], time.monotonic() - begun
        self.metrics.seconds.labels("batch").observe(self.batch_seconds)
        self.metrics.fill.observe(len(batch) / self.pipeline.batch_size)

    def _stops(self, steps: int) -> Iterator[int]:
        """Every step of a batch that somebody watches; else denoising does not stop."""
        return range(1, steps) if any(item.call.asked.stream for item in self.now) else ()

    def _seen(self, step: int, steps: int, show: Callable[[], jax.Array]) -> None:
        """Tells those who watch, and decodes the images once for all whose partial image is due."""
        # Warming up: what shows partial images is compiled too.
        if not self.now:
            show()
        due = [step in partial_steps(steps, i.call.asked.partial_images) for i in self.now]
        images = np.asarray(show()) if any(due) else ()
        # Rows of the batch are in the order of its requests: what could be refused was before.
        for row, (item, is_due) in enumerate(zip(self.now, due, strict=True)):
            if item.call.asked.stream:
                image = images[row] if is_due else None
                item.call.tell(Step(item.request.index, step, steps, image))


def _tell(item: Item, sample: object, error: str = "") -> None:
    item.call.tell(Done(item.request.index, sample, error))


def partial_steps(steps: int, count: int) -> list[int]:
    """After which steps `count` partial images are shown; fewer where there are few steps."""
    return sorted({steps * (i + 1) // (count + 1) for i in range(count)} - {0, steps})
