"""Leaving in the middle. SIGTERM (pre-emption, a scheduler's time limit) and SIGUSR1 end a run with
`RESTART` at any time, SIGINT (the keyboard) with `KEYBOARD`: between steps everything is saved
first, and before the first step, where nothing is new, the process ends at once. A second SIGINT
does not wait for the save.

Imports nothing heavy: the handlers are set before anything else of a command.
"""

import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger(__name__)

RESTART = 75  # EX_TEMPFAIL of sysexits.h: the launchers run the same command again
KEYBOARD = 130  # as shells say it
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# seconds in which Python must notice a signal: a compiler, for one, does not return to it
PATIENCE = 10.0

_received: list[int] = []  # signals so far
_stepping = threading.Event()  # set while the loop looks at them after each step


class Preempted(SystemExit):
    """Leaves with `RESTART` or `KEYBOARD`; the workdir holds a checkpoint of the last step."""

    def __init__(self, step: int):
        super().__init__(_code())
        self.step = step


def _code() -> int:
    return KEYBOARD if signal.SIGINT in _received else RESTART


def is_asked() -> bool:
    """Whether there was a signal that ends this process: for whoever waits within a step. One of
    several goes on until all know."""
    return bool(_received) and not _is_one_of_several()


def _leaves_at_once() -> bool:
    return not _stepping.is_set() or _received.count(signal.SIGINT) > 1


def _note(number: int, frame: Any) -> None:
    """The handler of all `SIGNALS`."""
    _received.append(number)
    name = signal.Signals(number).name
    if _leaves_at_once() and _is_collecting(frame):
        # What is raised in a callback of the garbage collector, of which JAX has one, is lost.
        _received.pop()
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
        return
    if _leaves_at_once():
        log.info("%s: the run ends without a save.", name)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(RESTART)
    log.info("%s: the run is saved after the steps that are under way, and ends.", name)
    if number != signal.SIGTERM and _is_one_of_several():
        os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler, which tells the other processes


def _is_collecting(frame: Any) -> bool:
    """Whether a frame is in a callback of the garbage collector."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None and frame.f_code not in callbacks:
        frame = frame.f_back
    return frame is not None


def _is_one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.process_count() > 1


def _end_late(pipe: int) -> None:
    """Ends the process `PATIENCE` seconds after a signal that Python has not noticed by then; runs
    in a thread of its own, which reads the signals' numbers."""
    interrupts = 0
    while number := os.read(pipe, 1):
        interrupts += number[0] == signal.SIGINT
        if number[0] in SIGNALS and (not _stepping.is_set() or interrupts > 1):
            code = KEYBOARD if number[0] == signal.SIGINT else RESTART
            timer = threading.Timer(PATIENCE, os._exit, [code])
            timer.daemon = True
            timer.start()


@contextlib.contextmanager
def handled(process: bool = False) -> Iterator[None]:
    """Handles the signals in its body; where that is the whole `process`, nothing that comes later
    changes its exit code. In another thread than the main one, which has no handlers, does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGTERM] is _note:
        yield
        return
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, _note)
    if process:
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=_end_late, args=[read_end], daemon=True).start()
    try:
        yield
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if process else before[number])


@contextlib.contextmanager
def watch(together: bool = True) -> Iterator[Callable[[int], bool]]:
    """Gives a function of the step just dispatched: whether to save it and leave.

    All processes leave at the same step if they work `together`. Raises `Preempted` at its end for
    a signal that came after the last step.
    """
    import jax

    several, last = together and jax.process_count() > 1, 0
    if several:
        from jax.experimental import multihost_utils

    def leaves(step: int) -> bool:
        nonlocal last
        last = step
        _stepping.set()
        # JAX's handler of SIGTERM tells the other processes, and all agree on a step that none has
        # passed.
        return multihost_utils.reached_preemption_sync_point(step) if several else bool(_received)

    # JAX's handler stays where it is.
    with contextlib.nullcontext() if several else handled():
        try:
            yield leaves
            if _received:
                raise Preempted(last)
        finally:
            _stepping.clear()
