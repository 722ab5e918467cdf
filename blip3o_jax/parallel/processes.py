"""Several processes of one job: joining them, barriers, and what only the first one does."""

import atexit
import collections
import contextlib
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from blip3o_jax.errors import InputError, first_line, require

log = logging.getLogger(__name__)

TIMEOUT = 300  # seconds that a process waits for the others
LONGEST = 20  # characters of a share
ARRAY = ("ID", "MIN", "MAX", "STEP", "COUNT")  # what SLURM says of an array's task
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
        are_numbers = count.isdecimal() and index.isdecimal() and int(index) < int(count)
        expected = "HOST:PORT, N and a number below N (or the first alone 'auto')"
        sentence = f"Processes: {', '.join(NAMES)} are {expected}, not {given}."
        require(":" in address and are_numbers, sentence)
        names = ("coordinator_address", "num_processes", "process_id")
        return dict(zip(names, (address, int(count), int(index)), strict=True))
    # Clusters that JAX knows by their variables: a SLURM step, a TPU pod.
    _, tasks = _step()
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    pod = "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return {} if tasks > 1 or pod else None


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
        sentence = f"{me} cannot join the others at {where}: {first_line(error)}"
        raise InputError(sentence) from error
    finally:
        watchdog.cancel()
    # Everyone is connected; the barrier makes sure that everyone knows.
    index, count = _state().process_id, _state().num_processes
    log.info("Process %d of %d on %s joined.", index, count, host)
    barrier("start", timeout)
    local, devices = jax.local_device_count(), jax.device_count()
    log.info("Process %d: %d of %d devices are local.", index, local, devices)


def share(asked: str = "") -> tuple[int, int]:
    """Which of how many processes of a job this is, each of which works alone: `asked` as I/N, or
    by the variables of a SLURM array, a SLURM step, or what `start_processes` joins."""
    if asked:
        index, _, count = asked.partition("/")
        are_numbers = index.isdecimal() and count.isdecimal() and len(asked) <= LONGEST
        is_share = are_numbers and int(index) < int(count)
        require(is_share, f"A share is I/N with I from 0 to N-1, not {asked[:LONGEST]!r}.")
        return int(index), int(count)
    place, size = _array()
    task, tasks = _step()
    if size * tasks > 1:
        _divide_gpus()
        return place * tasks + task, size * tasks
    # A process that ends early must not end the others, and listens to its signals itself.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    start_processes()
    if _state().service is not None:
        atexit.register(wait_for_others, 60)  # before JAX's own end, which waits for nobody
    return _state().process_id or 0, _state().num_processes or 1


def wait_for_others(timeout: float | None = None) -> None:
    """Keeps the first of the processes that `share` joined until the others have left or are lost,
    at most `timeout` seconds: JAX ends those that the first one leaves behind."""
    state = _state()
    if state.service is None:
        return
    log.info("Process 0 waits until the others have ended.")
    # The call returns once no other process is there that could make it too; in a thread, so that
    # signals are heard.
    everyone = list(range(state.num_processes))
    call = threading.Thread(target=state.client.get_live_nodes, args=[everyone], daemon=True)
    call.start()
    call.join(timeout)


def _array() -> tuple[int, int]:
    """(place, size) of this task in its SLURM array, (0, 1) outside of one. InputError for numbers
    that are not evenly spaced, from which no task can tell its place."""
    values = (os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ARRAY)
    numbers = [int(value) for value in values if value.isdecimal()]
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    wrong = "The numbers of this SLURM array are not evenly spaced: take --array=0-N (what is done"
    wrong += " is not made again), or give --share I/N."
    require(len(numbers) == len(ARRAY), wrong)
    task, first, last, step, count = numbers
    is_even = step > 0 and (last - first) // step + 1 == count and (task - first) % step == 0
    require(is_even, wrong)
    return (task - first) // step, count


def _step() -> tuple[int, int]:
    """(rank, size) of this task in its SLURM step, (0, 1) outside of one."""
    if not {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= set(os.environ):
        return 0, 1
    # In a shell that salloc opens, SLURM_NTASKS is the allocation's.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    rank = os.environ["SLURM_PROCID"]
    are_numbers = rank.isdecimal() and tasks.isdecimal() and int(rank) < int(tasks)
    given = f"SLURM_PROCID={rank} and SLURM_STEP_NUM_TASKS={tasks}"
    require(are_numbers, f"{given} are not a number and a larger one.")
    return int(rank), int(tasks)


def _divide_gpus() -> None:
    """Leaves to this task of a SLURM step its part of the GPUs, where all tasks of the node see
    all of them."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    sees_all = os.environ.get("SLURM_GPUS_ON_NODE", "") == str(len(gpus))
    # "8(x2),4": eight tasks on each of two nodes, four on the third.
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    nodes = [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]
    node = int(os.environ.get("SLURM_NODEID", "0"))
    each = len(gpus) // nodes[node] if node < len(nodes) else 0
    if sees_all and each:
        first = each * int(os.environ.get("SLURM_LOCALID", "0"))
        own = ",".join(str(gpu) for gpu in range(first, first + each))
        jax.config.update("jax_cuda_visible_devices", own)


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
        raise InputError(f"{waited}: {first_line(error)}") from error
    log.info("Process %d of %d: all are ready for %s.", state.process_id, state.num_processes, what)


@contextlib.contextmanager
def process_zero_first(what: str, timeout: int = TIMEOUT) -> Iterator[bool]:
    """Runs the body in process 0 (given True), then in the others, which find its files within
    `timeout` seconds."""
    first = is_process_zero()
    if not first:
        barrier(what, timeout)
    yield first
    if first:
        barrier(what, timeout)


def is_process_zero() -> bool:
    """Whether this is process 0, which writes what is written once. Touches no device."""
    return not _state().process_id
