"""The server's routes, and what every call goes through: its id, keys, the state of the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip3o_jax.errors import InputError
from blip3o_jax.pictures import Limits
from blip3o_jax.pipeline import Pipeline, shape
from blip3o_jax.request import encode
from blip3o_jax.sample.settings import EditSettings, defaults
from blip3o_jax.serve import answers, forms, metrics, openapi, page
from blip3o_jax.serve.answers import Refusal
from blip3o_jax.serve.batches import AHEAD, Batches
from blip3o_jax.serve.bodies import (
    EDITS,
    GENERATIONS,
    Asked,
    FieldError,
    Offer,
    check_field,
    read_body,
)
from blip3o_jax.serve.gate import admit, digests
from blip3o_jax.serve.lines import read_line
from blip3o_jax.serve.queue import Call, Done, QueueFull, Step
from blip3o_jax.serve.store import Store
from blip3o_jax.serve.worker import COMPILED, Worker

log = logging.getLogger(__name__)

PIXELS = Limits(pixels=1 << 24)  # of a source image
METHODS = ("GET", "HEAD", "POST", "DELETE")
PATIENCE = 1.0  # seconds between signs of life of a stream


def offer_of(pipeline: Pipeline, store: Store) -> Offer:
    """What a server of a model offers, with the files of a store as images."""

    def file(id_: str) -> bytes | None:
        with contextlib.suppress(Refusal):
            return store.file(id_).read_bytes()

    models = pipeline.identity, pipeline.identity.partition("@")[0]
    config, formats = pipeline.model.config, ("png", "jpeg", "webp")
    settings = {"settings": defaults(config), "edit_settings": defaults(config, EditSettings)}
    more = {**settings, "fixed": COMPILED, "is_server": True, "limits": PIXELS, "file": file}
    return Offer(models, config, formats, **more)


class EventStream(StreamingResponse):
    """Server-sent events, after which something is done whoever ends them."""

    def __init__(self, events: AsyncIterator[bytes], after: Callable[[], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._after()


class Server:
    """One model behind HTTP. `keys` are those that a call may have, none if it needs none; a call
    that is not answered after `timeout` seconds is given up."""

    def __init__(
        self, worker: Worker, offer: Offer, store: Store, keys: tuple[str, ...], timeout: float
    ):
        self.worker, self.offer, self.timeout = worker, offer, timeout
        self.batches = Batches(store, self._answer_line, AHEAD * worker.pipeline.batch_size)
        self.queue, self.metrics, self.pipeline = worker.queue, worker.metrics, worker.pipeline
        self.keys = digests(keys)
        self.is_draining = False
        self.open_calls = 0
        self.created = int(time.time())
        self.config = self.pipeline.model.config

    def app(self) -> ASGIApp:
        """What an ASGI server runs."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/ready", self.is_ready),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.document),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route(GENERATIONS, self.images, methods=["POST"]),
            Route(EDITS, self.images, methods=["POST"]),
            *self.batches.routes(),
        ]
        handlers = {
            Refusal: _refused,
            HTTPException: _not_found,
            InputError: _bad_input,
            Exception: _failed,
        }
        return self._outer(Starlette(routes=routes, exception_handlers=handlers))

    def _outer(self, app: ASGIApp) -> ASGIApp:
        """Gives every response its id, counts it, and refuses whom it does not answer."""

        async def outer(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            # Whatever comes of the call, its response has an id and is counted.
            id_ = f"req_{uuid.uuid4().hex}".encode()

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"x-request-id", id_)]
                    route = getattr(scope.get("route"), "path", "other")
                    # No more rows than there are routes, whatever a client sends.
                    method = scope["method"] if scope["method"] in METHODS else "other"
                    self.metrics.responses.labels(method, route, str(message["status"])).inc()
                await send(message)

            # Before the body is read, and before there is a route.
            request = Request(scope, receive)
            try:
                admit(request, self.keys)
            except Refusal as refusal:
                self.metrics.rejected.labels("forbidden").inc()
                await _refused(request, refusal)(scope, receive, send_with_id)
                return
            await app(scope, receive, send_with_id)

        return outer

    # What says how the server is.

    async def health(self, request: Request) -> Response:
        return answers.as_json({"status": "alive"})

    async def is_ready(self, request: Request) -> Response:
        self._check_state()
        return answers.as_json({"status": "ready"})

    def _check_state(self) -> None:
        """Refuses what comes before all is compiled, and after the server was told to stop."""
        if self.is_draining:
            raise self._rejected("stopping", Refusal(503, "The server stops.", "server_error"))
        if not self.worker.ready.is_set():
            starting = "The server is not ready: it compiles its programs."
            raise self._rejected("starting", Refusal(503, starting, "server_error", retry_after=5))

    def _rejected(self, reason: str, refusal: Refusal) -> Refusal:
        self.metrics.rejected.labels(reason).inc()
        return refusal

    async def show_metrics(self, request: Request) -> Response:
        self.metrics.waiting.set(len(self.queue))
        return Response(self.metrics.text(), media_type=metrics.TYPE)

    async def document(self, request: Request) -> Response:
        return answers.as_json(openapi.document(self.offer))

    async def page(self, request: Request) -> Response:
        body, headers = page.page()
        return Response(body, headers=headers, media_type="text/html; charset=utf-8")

    # The API.

    async def models(self, request: Request) -> Response:
        return answers.as_json({"object": "list", "data": [self._model(self.offer.models[0])]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.offer.models:
            message = f"There is no model {name!r}; this server has {self.offer.models[0]}."
            raise Refusal(404, message, param="model", code="model_not_found")
        return answers.as_json(self._model(name))

    def _model(self, name: str) -> dict:
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "blip3o-jax"}
        # For a form: what a body may leave out.
        defaults = {"generate": self.offer.settings, "edit": self.offer.edit_settings}
        model |= {"defaults": {name: asdict(settings) for name, settings in defaults.items()}}
        model |= {"few_steps": self.config.sana.few_steps}
        return model | {"checkpoint": self.pipeline.identity}

    async def images(self, request: Request) -> Response:
        """/v1/images/generations and /v1/images/edits."""
        self._check_state()
        if len(self.queue) >= self.queue.limit:  # before a large body is read
            raise self._full()
        self.open_calls += 1
        loop = asyncio.get_running_loop()
        try:
            path = request.url.path
            fields = await forms.read_fields(request, takes_forms=path == EDITS)
            # A thread decodes the pictures.
            call, events, used = await asyncio.to_thread(self._read, request, path, fields, loop)
            # The call is open until its response, or until the end of its stream.
            if not call.asked.stream:
                return await self._answer(request, call, used, events)
            self.open_calls += 1  # until the stream's end
            stream = self._stream(path, call, used, events)
            return EventStream(stream, functools.partial(self._close, call))
        finally:
            self.open_calls -= 1

    def _read(
        self, request: Request, path: str, fields: dict, loop: asyncio.AbstractEventLoop
    ) -> tuple[Call, asyncio.Queue, dict]:
        """As `_call`, of a body."""
        # Who shares places with whom: a key says it, else a connection is somebody.
        key = request.headers.get("authorization", "")
        client = key if self.keys else ":".join(map(str, request.client or ()))
        return self._call(client, read_body(path, fields, "", self.offer), loop)

    def _call(
        self, client: str, asked: Asked, loop: asyncio.AbstractEventLoop, is_batch: bool = False
    ) -> tuple[Call, asyncio.Queue, dict]:
        """The call in the queue, what is told of it, and its use of tokens."""
        # All that can be wrong with a body is found before it waits.
        events: asyncio.Queue[Step | Done] = asyncio.Queue()
        try:
            tokens = encode(asked.requests[0], self.config, self.pipeline.text)
        except InputError as error:
            raise FieldError("prompt", str(error)) from error

        # The worker's thread hands over what it has to the loop's.
        def tell(event: Step | Done) -> None:
            with contextlib.suppress(RuntimeError):  # of a loop that has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        call = Call(client, asked, shape(asked.requests[0], tokens, self.config), tell, is_batch)
        try:
            self.queue.put(call)
        except QueueFull:
            raise self._full() from None
        return call, events, answers.usage(asked, len(tokens[0]), self.config)

    def _close(self, call: Call) -> None:
        """Makes room for others at the end of a stream."""
        self.queue.cancel(call)
        self.open_calls -= 1

    async def _answer_line(self, where: str, id_: str, row: dict) -> tuple[int, dict]:
        """The status and body of a line of a batch."""
        loop = asyncio.get_running_loop()
        try:
            asked = await asyncio.to_thread(read_line, where, id_, row, self.offer)
            check_field(not asked.stream, "stream", "a line of a batch has one answer.")
            call, events, used = await asyncio.to_thread(self._call, "batch", asked, loop, True)
            try:
                images = await self._images(call, events)
            finally:
                self.queue.cancel(call)
            return 200, answers.response(asked, images, used, self.config)
        except InputError as error:
            return 400, answers.error_body(f"{where}: {error}", getattr(error, "param", None))
        except Refusal as refusal:
            return refusal.status, refusal.body

    def _full(self) -> Refusal:
        """With about the time that the queue takes."""
        batches = len(self.queue) / self.pipeline.batch_size
        seconds = min(60, max(1, math.ceil(batches * self.worker.batch_seconds)))
        message = f"The queue is full; try again in {seconds} s."
        refusal = Refusal(
            429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=seconds
        )
        return self._rejected("queue_full", refusal)

    async def _answer(
        self, request: Request, call: Call, used: dict, events: asyncio.Queue
    ) -> Response:
        """The response of a call that does not stream. Whoever has gone makes room for others."""
        # The body is read, so that the next message is the client's leaving.
        finished = asyncio.ensure_future(self._images(call, events))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            done, _ = await asyncio.wait(
                {finished, gone}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if finished in done:
                body = answers.response(call.asked, finished.result(), used, self.config)
                return answers.as_json(body)
            raise self._rejected("disconnected" if done else "timeout", self._too_late())
        finally:
            # Of a call that is answered nothing waits.
            self.queue.cancel(call)
            finished.cancel()
            gone.cancel()

    async def _images(self, call: Call, events: asyncio.Queue) -> list[str]:
        # In the order of their indexes, whichever is made first.
        images: dict[int, str] = {}
        while len(images) < len(call.asked.requests):
            event = await events.get()
            if isinstance(event, Done):
                images[event.index] = await self._encoded(call, event)
        self.metrics.seconds.labels("call").observe(time.monotonic() - call.begun)
        return [images[index] for index in sorted(images)]

    async def _encoded(self, call: Call, done: Done) -> str:
        if done.error:
            raise Refusal(500, done.error, "server_error")
        begun = time.monotonic()
        arguments = call.asked, done.sample, self.pipeline.identity
        image = await asyncio.to_thread(answers.encoded, *arguments)
        self.metrics.seconds.labels("encode").observe(time.monotonic() - begun)
        return image

    def _too_late(self) -> Refusal:
        message = f"The call was not answered within {self.timeout:g} s."
        return Refusal(504, message, "server_error", code="timeout")

    async def _stream(
        self, url: str, call: Call, used: dict, events: asyncio.Queue
    ) -> AsyncIterator[bytes]:
        """Server-sent events; comments say the place in the queue and the step, and that the server
        is alive."""
        missing, shown = len(call.asked.requests), dict.fromkeys(range(10), 0)
        end = time.monotonic() + self.timeout
        try:
            while missing:
                # The status is sent, so that an error is an event too.
                if time.monotonic() > end:
                    raise self._rejected("timeout", self._too_late())
                try:
                    event = await asyncio.wait_for(events.get(), PATIENCE)
                except TimeoutError:
                    # Nothing is new; that is said before a proxy takes the connection for dead.
                    ahead = self.queue.ahead(call)
                    yield b": working\n\n" if ahead is None else f": queue {ahead}\n\n".encode()
                    continue
                # A finished image, or a step with a partial image if one is due.
                if isinstance(event, Done):
                    image = await self._encoded(call, event)
                    missing -= 1
                    yield answers.event(
                        url, call.asked, image, event.index, self.config, usage=used
                    )
                    continue
                yield f": step {event.step}/{event.steps} of image {event.index}\n\n".encode()
                if event.partial is not None:
                    request = call.asked.requests[event.index]
                    arguments = call.asked, request, event.partial
                    image = await asyncio.to_thread(answers.encoded_partial, *arguments)
                    place = {"partial_image_index": shown[event.index]}
                    shown[event.index] += 1
                    yield answers.event(url, call.asked, image, event.index, self.config, **place)
            self.metrics.seconds.labels("call").observe(time.monotonic() - call.begun)
        except Refusal as refusal:
            yield answers.sent(refusal.body, "error")


async def _until_gone(request: Request) -> None:
    """Ends when the client does."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(request: Request, refusal: Exception) -> Response:
    return answers.as_json(refusal.body, refusal.status, refusal.headers)


def _bad_input(request: Request, error: Exception) -> Response:
    return answers.as_json(answers.error_body(str(error), getattr(error, "param", None)), 400)


def _not_found(request: Request, error: Exception) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}."
    return answers.as_json(answers.error_body(message, None), error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    message = "The server failed; its log says why."
    return answers.as_json(answers.error_body(message, None, "server_error"), 500)
