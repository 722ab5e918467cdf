"""Leaving in the middle: a SIGTERM (pre-emption, a scheduler's time limit) ends the run after a
whole step, with everything saved."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

log = logging.getLogger(__name__)

RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers run the same command again


class Preempted(SystemExit):
    """Leaves with `RESTART`; the workdir holds a checkpoint of the last step."""

    def __init__(self, step: int):
        super().__init__(RESTART)
        self.step = step


@contextlib.contextmanager
def watch() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step just dispatched: whether to save it and leave.

    All processes leave at the same step.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # JAX's own handler of SIGTERM tells the other processes, and all agree on a step that none
        # has passed.
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()

    def note(number: int, frame: Any) -> None:
        log.info("%s: the run ends after this step.", signal.Signals(number).name)
        asked.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
