"""The thread that owns the model: compiles everything, then makes what waits, batch by batch."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from blip3o_jax.errors import InputError
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.request import Request, bucket, encode
from blip3o_jax.sample.settings import EditSettings, Settings
from blip3o_jax.serve.metrics import Metrics
from blip3o_jax.serve.queue import Done, Item, Queue, Step

log = logging.getLogger(__name__)

# Settings that are compiled into the programs: a request has the server's values.
COMPILED = ("top_k", "renorm_min", "reference_quirks")
# Scales of text and source for each set of forwards that guidance has (`condition.guidance`).
SCALES = ((1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (2.0, 3.0))


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
        begun = time.monotonic()
        requests = list(warm_up_requests(self.pipeline))
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


def warm_up_requests(own: Pipeline) -> Iterator[Request]:
    """A request for each shape of programs: for each length that prompts are padded to, and for
    each kind of guidance."""
    config = own.model.config
    sources = (np.zeros((config.image_size, config.image_size, 3), np.uint8),)
    kinds = [((), Settings(num_inference_steps=1))]
    if config.max_sources:
        kinds.append((sources, EditSettings(num_inference_steps=1)))
    for images, settings in kinds:
        # Longer and longer, until a length comes that was not there yet.
        lengths = set()
        for words in range(1, config.max_prompt_tokens):
            request = Request(" ".join(["a"] * words), images, settings=settings)
            try:
                length = bucket(request, encode(request, config, own.text), config)
            except InputError:  # longer than a prompt can be
                break
            if length not in lengths:
                lengths.add(length)
                yield request
    # Any prompt does here: denoising does not see its length. One of few steps guides by itself.
    if config.max_sources and not config.sana.few_steps:
        for text, image in SCALES[1:]:
            scales = {"guidance_scale": text, "image_guidance_scale": image}
            yield Request("a", sources, settings=EditSettings(num_inference_steps=1, **scales))
