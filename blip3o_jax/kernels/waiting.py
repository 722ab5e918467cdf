"""What is said while XLA compiles: nothing of a moment's work, one line of a long one."""

import contextlib
import logging
import threading
from collections.abc import Iterator

import jax

PATIENCE = 5.0  # seconds before it is said
STARTED = "/jax/compilation_cache/compile_requests_use_cache"
ENDED = "/jax/core/compile/backend_compile_duration"

log = logging.getLogger(__name__)
_timers: list[threading.Timer] = []  # of the programs that are being compiled


def tell_of_compilation() -> None:
    """From now on, says so when a program that the cache on disk may hold takes long to compile."""
    jax.monitoring.register_event_listener(started)
    jax.monitoring.register_event_duration_secs_listener(ended)


def started(event: str, **_) -> None:
    """Takes JAX's events: a program is looked up in the cache, and compiled if it is not there."""
    if event == STARTED:
        _timers.append(_timer())


def ended(event: str, _seconds: float, **_) -> None:
    """Takes JAX's measurements: a program is there."""
    if event == ENDED and _timers:
        _timers.pop().cancel()


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Says so when what is compiled here, without JAX's cache, takes long."""
    timer = _timer()
    try:
        yield
    finally:
        timer.cancel()


def _timer() -> threading.Timer:
    timer = threading.Timer(PATIENCE, _tell)
    timer.daemon = True
    timer.start()
    return timer


def _tell() -> None:
    usual = "a small model takes a minute or two on a CPU, a large one up to a quarter of an hour"
    folder = jax.config.jax_compilation_cache_dir
    log.info("Compiling: %s. Later starts take it from %s.", usual, folder)
