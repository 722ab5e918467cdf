"""The process around a server: its socket, and its end."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn

from blip3o_jax.errors import InputError
from blip3o_jax.serve.app import Server

log = logging.getLogger(__name__)

TICK = 0.1  # seconds between looks at what is left to do
LINGER = 5  # seconds that connections may take to close


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; InputError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        return listener
    except OSError as error:
        listener.close()
        raise InputError(f"{host}:{port} cannot be listened at: {error.strerror}.") from error


class Process(uvicorn.Server):
    """Stops at the first signal as soon as all that was asked before is answered, or after `drain`
    seconds; at the second one at once. Until then new calls are answered with 503."""

    def __init__(self, server: Server, drain: float):
        how = {"lifespan": "off", "ws": "none", "log_config": None, "access_log": False}
        how |= {"server_header": False, "timeout_graceful_shutdown": LINGER}
        super().__init__(uvicorn.Config(server.app(), **how))
        self.served, self.drain, self.cut_off = server, drain, 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tasks = [
            asyncio.ensure_future(work) for work in (self._watch(), self.served.batches.run())
        ]

    async def _watch(self) -> None:
        """Ends the process if the model cannot be used, or once a signal came."""
        worker, server = self.served.worker, self.served
        while not (server.is_draining or worker.error):
            await asyncio.sleep(TICK)
        # Batches go on at the next start.
        server.batches.is_stopping = True
        # What is open may end; a server without a model has nothing to wait for.
        end = time.monotonic() + self.drain * server.is_draining
        while server.open_calls and time.monotonic() < end:
            await asyncio.sleep(TICK)
        self.cut_off = server.open_calls
        server.queue.close()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would end by the signal itself; this process ends by its exit code.
        if self.served.is_draining:
            self.cut_off, self.should_exit, self.force_exit = self.served.open_calls, True, True
        else:
            log.info("Stopping: %d calls are left.", self.served.open_calls)
        self.served.is_draining = True


def serve(server: Server, listener: socket.socket, drain: float) -> int:
    """Runs a server until a signal ends it; 0 if all calls were answered, else 1."""
    process = Process(server, drain)
    server.worker.start()
    host, port, *_ = listener.getsockname()
    log.info("%s at http://%s:%d", server.pipeline.identity, host, port)
    process.run([listener])
    server.queue.close()
    # The model's thread must not end in the middle of a program.
    server.worker.join()
    if server.worker.error:
        raise server.worker.error
    if process.cut_off:
        log.warning("%d calls were cut off.", process.cut_off)
    return int(process.cut_off > 0)
