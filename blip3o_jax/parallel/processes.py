"""Several processes of one job: joining them, barriers, and what only the first one does."""

import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from blip3o_jax.errors import InputError

log = logging.getLogger(__name__)


TIMEOUT = 300  # seconds that a process waits for the others


def _cluster() -> dict | None:
    """Arguments of `jax.distributed.initialize` for the cluster that the environment describes, or
    None."""
    names = ("BLIP3O_COORDINATOR", "BLIP3O_NUM_PROCESSES", "BLIP3O_PROCESS_ID")
    given = [os.environ.get(name, "") for name in names]
    if given[0] == "auto":
        return {}
    if any(given):
        if not (
            ":" in given[0]
            and given[1].isdigit()
            and given[2].isdigit()
            and int(given[2]) < int(given[1])
        ):
            raise InputError(
                f"Processes: {', '.join(names)} are HOST:PORT, N and a number below N (or "
                f"the first alone 'auto'), not {given}."
            )
        return {
            "coordinator_address": given[0],
            "num_processes": int(given[1]),
            "process_id": int(given[2]),
        }
    slurm = (
        int(os.environ.get("SLURM_NTASKS", "1")) > 1
        and "SLURM_PROCID" in os.environ
        and "SLURM_STEP_NODELIST" in os.environ
    )
    pod = (
        "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    )
    return {} if slurm or pod else None


def start_processes(timeout: int = TIMEOUT) -> None:
    """Joins the processes of this job, if there are others; call it before anything touches a
    device.

    Told by BLIP3O_COORDINATOR=HOST:PORT, BLIP3O_NUM_PROCESSES and BLIP3O_PROCESS_ID; or found by
    JAX in the variables of a SLURM step or of a TPU pod, or, with BLIP3O_COORDINATOR=auto, wherever
    JAX looks. InputError when they cannot be joined. When they do not come within `timeout` seconds
    the process says so and ends with 2: JAX would abort it, which no caller can catch.
    """
    arguments = _cluster()
    if arguments is None:
        return
    from jax._src import distributed

    host, where = (
        socket.gethostname(),
        arguments.get("coordinator_address", "the coordinator that JAX finds"),
    )
    which = (
        f"{arguments['process_id']} of {arguments['num_processes']}"
        if arguments
        else os.environ.get("SLURM_PROCID", "?")
    )
    log.info(
        "Process %s on %s: waiting up to %d s for the others at %s.", which, host, timeout, where
    )
    watchdog = threading.Timer(
        timeout,
        _give_up,
        [f"Process {which} on {host}: the others did not come to {where} within {timeout} s."],
    )
    watchdog.start()
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=timeout + 60, shutdown_timeout_seconds=60
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"Process {which} on {host} cannot join the others at {where}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        watchdog.cancel()
    state = distributed.global_state
    log.info("Process %d of %d on %s joined.", state.process_id, state.num_processes, host)
    barrier("start", timeout)
    log.info(
        "Process %d: %d of %d devices are local.",
        state.process_id,
        jax.local_device_count(),
        jax.device_count(),
    )


def _give_up(sentence: str) -> None:
    print(f"blip3o-jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(2)


def barrier(what: str, timeout: int = TIMEOUT) -> None:
    """Waits until every process is here; InputError after `timeout` seconds.

    The name `what` is met at any number of times.
    """
    from jax._src import distributed

    state = distributed.global_state  # which, unlike jax.process_count(), touches no device
    if state.num_processes in (None, 1):
        return
    _met[what] = _met.get(what, 0) + 1
    try:
        state.client.wait_at_barrier(f"blip3o/{what}/{_met[what]}", timeout_in_ms=1000 * timeout)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"Process {state.process_id} waited {timeout} s for the others before {what}: {reason}"
        ) from error
    log.info("Process %d of %d: all are ready for %s.", state.process_id, state.num_processes, what)


_met: dict[str, int] = {}


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
    from jax._src import distributed

    return not distributed.global_state.process_id
