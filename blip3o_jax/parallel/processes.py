"""Several processes of one job: joining them, barriers, and what only the first one does."""

import collections
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from blip3o_jax.errors import InputError, require

log = logging.getLogger(__name__)

TIMEOUT = 300  # seconds that a process waits for the others
NAMES = ("BLIP3O_COORDINATOR", "BLIP3O_NUM_PROCESSES", "BLIP3O_PROCESS_ID")


def _state():
    """JAX's record of the processes, which, unlike jax.process_count(), touches no device."""
    from jax._src import distributed

    return distributed.global_state


def _cluster() -> dict | None:
    """Arguments of `jax.distributed.initialize` for the environment's cluster, if there is one."""
    address, count, index = given = [os.environ.get(name, "") for name in NAMES]
    if address == "auto":
        return {}
    if any(given):
        are_numbers = count.isdigit() and index.isdigit() and int(index) < int(count)
        expected = "HOST:PORT, N and a number below N (or the first alone 'auto')"
        sentence = f"Processes: {', '.join(NAMES)} are {expected}, not {given}."
        require(":" in address and are_numbers, sentence)
        names = ("coordinator_address", "num_processes", "process_id")
        return dict(zip(names, (address, int(count), int(index)), strict=True))
    # Clusters that JAX knows by their variables: a SLURM step, a TPU pod.
    step = {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(os.environ)
    slurm = step and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    pod = "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return {} if slurm or pod else None


def start_processes(timeout: int = TIMEOUT) -> None:
    """Joins the processes of this job, if there are others; call it before anything touches a
    device.

    They are named by BLIP3O_COORDINATOR=HOST:PORT, BLIP3O_NUM_PROCESSES and BLIP3O_PROCESS_ID, or
    JAX finds them in the variables of a SLURM step or of a TPU pod, or, with
    BLIP3O_COORDINATOR=auto, wherever JAX looks. InputError when they cannot be joined. When they do
    not come within `timeout` seconds the process says so and ends with 2: JAX would abort it, which
    no caller can catch.
    """
    arguments = _cluster()
    if arguments is None:
        return
    host = socket.gethostname()
    where = arguments.get("coordinator_address", "the coordinator that JAX finds")
    which = os.environ.get("SLURM_PROCID", "?")
    if arguments:
        which = f"{arguments['process_id']} of {arguments['num_processes']}"
    # Wait for the others, no longer than the watchdog allows.
    me = f"Process {which} on {host}"
    log.info("%s: waiting up to %d s for the others at %s.", me, timeout, where)
    late = f"{me}: the others did not come to {where} within {timeout} s."
    watchdog = threading.Timer(timeout, _give_up, [late])
    watchdog.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=timeout + 60, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{me} cannot join the others at {where}: {reason}") from error
    finally:
        watchdog.cancel()
    # Everyone is connected; the barrier makes sure that everyone knows.
    index, count = _state().process_id, _state().num_processes
    log.info("Process %d of %d on %s joined.", index, count, host)
    barrier("start", timeout)
    local, devices = jax.local_device_count(), jax.device_count()
    log.info("Process %d: %d of %d devices are local.", index, local, devices)


def _give_up(sentence: str) -> None:
    print(f"blip3o-jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(2)


_passed: collections.Counter = collections.Counter()  # barriers, by name


def barrier(what: str, timeout: int = TIMEOUT) -> None:
    """Waits until every process is here; InputError after `timeout` seconds. The name `what` may be
    used any number of times."""
    state = _state()
    if state.num_processes in (None, 1):
        return
    _passed[what] += 1
    name = f"blip3o/{what}/{_passed[what]}"
    try:
        state.client.wait_at_barrier(name, timeout_in_ms=1000 * timeout)
    except RuntimeError as error:
        waited = f"Process {state.process_id} waited {timeout} s for the others before {what}"
        raise InputError(f"{waited}: {str(error).splitlines()[0]}") from error
    log.info("Process %d of %d: all are ready for %s.", state.process_id, state.num_processes, what)


@contextlib.contextmanager
def process_zero_first(what: str) -> Iterator[bool]:
    """Runs the body in process 0 (given True), then in the others, which find its files."""
    first = is_process_zero()
    if not first:
        barrier(what)
    yield first
    if first:
        barrier(what)


def is_process_zero() -> bool:
    """Whether this is process 0, which writes what is written once. Touches no device."""
    return not _state().process_id
