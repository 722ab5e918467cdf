"""Devices: the mesh, moving host arrays onto it, and several processes that work as one."""

import contextlib
import logging
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blip3o_jax.config import ConfigError, multiples

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
TIMEOUT = 300  # seconds that a process waits for the others


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=4,fsdp=2"` -> {"data": 4, "fsdp": 2}; raises ConfigError on an unknown axis or a size that is not a number."""
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise ConfigError(f"Mesh {text!r}: {item!r} is not one of data=N, fsdp=N, tensor=N.")
        sizes[axis] = int(size)
    return sizes


def mesh_shape(sizes: dict[str, int] | None, count: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) over `count` devices; one may be -1 and takes what is left (`data` by default).

    ConfigError names the axis that does not fit, and the nearest sizes that do.
    """
    sizes = {"data": -1, "fsdp": 1, "tensor": 1, "dcn": 1, **(sizes or {})}
    for axis, size in sizes.items():
        if axis not in (*AXES, "dcn"):
            raise ConfigError(f"Mesh: there is no axis {axis!r}; known: data, fsdp, tensor, and dcn for slices.")
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and (size != -1 or axis == "dcn")):
            raise ConfigError(f"Mesh: {axis}={size!r} is no size; sizes are positive, and one of data, fsdp, tensor may be -1.")
    open_axes = [axis for axis in AXES if sizes[axis] == -1]
    if len(open_axes) > 1:
        raise ConfigError(f"Mesh: both {open_axes[0]} and {open_axes[1]} are -1; one of them takes what is left.")
    left = count
    fixed = sorted((axis for axis in AXES if sizes[axis] != -1), key=lambda axis: axis == "data")
    for axis in fixed:
        last = axis == fixed[-1] and not open_axes
        if left % sizes[axis] or (last and left != sizes[axis]):
            fitting = [left] if last else [n for n in range(1, left + 1) if left % n == 0]
            below = [n for n in fitting if n <= sizes[axis]][-1:]
            above = [n for n in fitting if n > sizes[axis]][:1]
            taken = "".join(f" after {a}={sizes[a]}" for a in fixed[: fixed.index(axis)] if sizes[a] > 1)
            wanted = " or ".join(map(str, below + above))
            raise ConfigError(f"Mesh: {axis}={sizes[axis]} does not fit the {left} of {count} devices that are left{taken}; take {wanted}.")
        left //= sizes[axis]
    shape = tuple(left if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    if shape[0] % sizes["dcn"]:
        raise ConfigError(f"Mesh: data={shape[0]} does not divide over dcn={sizes['dcn']} slices; {multiples(shape[0], sizes['dcn'])}")
    return shape


def make_mesh(sizes: dict[str, int] | None = None, devices=None) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices, with sizes as `mesh_shape` takes them.

    `dcn` is the number of slices, between which the network is slow: `data` is cut over the slices first, so that each slice holds whole
    copies of the parameters and only gradients travel between them. Where there are no such slices (CPU, one GPU host for two) devices are
    cut into equal runs. Raises ConfigError when the sizes do not fit the devices, or the slices of a TPU.
    """
    devices = jax.devices() if devices is None else devices
    shape, slices = mesh_shape(sizes, len(devices)), (sizes or {}).get("dcn", 1)
    known = {getattr(device, "slice_index", None) for device in devices} - {None}
    if len(known) > 1 and len(known) != slices and devices[0].platform == "tpu":  # a GPU's slice is its host
        raise ConfigError(f"Mesh: dcn={slices}, but the devices are of {len(known)} slices; take dcn={len(known)}.")
    axis_types = (AxisType.Auto,) * 3
    if slices == 1:
        # Split where need be: a pod of 16x16 chips may be tensor=2 too, which is not a side of it.
        return Mesh(mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True), AXES, axis_types=axis_types)
    inner = (shape[0] // slices, *shape[1:])
    if len(known) == slices:
        return Mesh(mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices), AXES, axis_types=axis_types)
    runs = np.split(np.asarray(devices), slices)
    return Mesh(np.concatenate([mesh_utils.create_device_mesh(inner, list(run)) for run in runs]), AXES, axis_types=axis_types)


def cores() -> int:
    """Number of the CPU's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def a_device_per_core(batch_size: int) -> bool:
    """Lets JAX take a CPU's cores as devices, as many as `batch_size` divides by. Call it before anything touches a device.

    One device shares every operation out among the cores and waits for all; these work side by side, each at its rows of the batch.
    False, and nothing done, where the environment counts the devices, or the process has touched them.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        jax.config.update("jax_num_cpu_devices", max(n for n in range(1, cores() + 1) if batch_size % n == 0))
    except RuntimeError:
        return False
    return True


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """ConfigError naming the nearest sizes when the mesh does not cut a batch, or its micro-batches, into equal parts."""
    shards = batch_shards(mesh)
    if batch_size % (shards * accumulate):
        pieces = f"the mesh's {shards} batch shards" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
        raise ConfigError(f"batch_size {batch_size} does not divide by {pieces}; {multiples(batch_size, shards * accumulate)}")


def batch_hosts(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal runs of the batch's rows. Processes that share rows feed the same."""
    shards = batch_shards(mesh)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((shards,)).values()
    rows = sorted({place[0].indices(shards)[0] for place in places})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise ConfigError(
            f"Mesh {dict(mesh.shape)}: the devices of process {jax.process_index()} do not hold a run of the batch; reorder axes."
        )
    return rows[0] // len(rows), shards // len(rows)


def put_batch(batch, mesh: Mesh):
    """This process's rows [b,...] of a batch, as `batch_hosts` counts them -> global arrays [B,...] cut along the batch."""
    sharding, hosts = NamedSharding(mesh, BATCH), batch_hosts(mesh)[1]

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * hosts, *x.shape[1:]))

    return jax.tree.map(put, batch)


def put_whole(batch, mesh: Mesh):
    """Arrays [B,...] that every process holds whole -> global arrays, cut along the batch over as many axes as divide B."""

    cuts = (BATCH[0], *sorted((("data",), ("fsdp",)), key=lambda axes: -mesh.shape[axes[0]]))

    def put(x):
        x = np.asarray(x)
        axes = next((axes for axes in cuts if len(x) % math.prod(mesh.shape[axis] for axis in axes) == 0), None)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(axes)), lambda index: x[index])

    return jax.tree.map(put, batch)


def _cluster() -> dict | None:
    """Arguments of `jax.distributed.initialize` for the cluster that the environment describes, or None."""
    names = ("BLIP3O_COORDINATOR", "BLIP3O_NUM_PROCESSES", "BLIP3O_PROCESS_ID")
    given = [os.environ.get(name, "") for name in names]
    if given[0] == "auto":
        return {}
    if any(given):
        if not (":" in given[0] and given[1].isdigit() and given[2].isdigit() and int(given[2]) < int(given[1])):
            raise ConfigError(
                f"Processes: {', '.join(names)} are HOST:PORT, N and a number below N (or the first alone 'auto'), not {given}."
            )
        return {"coordinator_address": given[0], "num_processes": int(given[1]), "process_id": int(given[2])}
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and "SLURM_STEP_NODELIST" in os.environ
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    return {} if slurm or pod else None


def start_processes(timeout: int = TIMEOUT) -> None:
    """Joins the processes of this job, if there are others; call it before anything touches a device.

    Told by BLIP3O_COORDINATOR=HOST:PORT, BLIP3O_NUM_PROCESSES and BLIP3O_PROCESS_ID; or found by JAX in the variables of a SLURM step or of
    a TPU pod, or, with BLIP3O_COORDINATOR=auto, wherever JAX looks. ConfigError when they cannot be joined. When they do not come within
    `timeout` seconds the process says so and ends with 2: JAX would abort it, which no caller can catch.
    """
    arguments = _cluster()
    if arguments is None:
        return
    from jax._src import distributed

    host, where = socket.gethostname(), arguments.get("coordinator_address", "the coordinator that JAX finds")
    which = f"{arguments['process_id']} of {arguments['num_processes']}" if arguments else os.environ.get("SLURM_PROCID", "?")
    log.info("Process %s on %s: waiting up to %d s for the others at %s.", which, host, timeout, where)
    watchdog = threading.Timer(timeout, _give_up, [f"Process {which} on {host}: the others did not come to {where} within {timeout} s."])
    watchdog.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout + 60, shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"Process {which} on {host} cannot join the others at {where}: {str(error).splitlines()[0]}") from error
    finally:
        watchdog.cancel()
    state = distributed.global_state
    log.info("Process %d of %d on %s joined.", state.process_id, state.num_processes, host)
    meet("start", timeout)
    log.info("Process %d: %d of %d devices are local.", state.process_id, jax.local_device_count(), jax.device_count())


def _give_up(sentence: str) -> None:
    print(f"blip3o-jax: {sentence}", file=sys.stderr, flush=True)
    os._exit(2)


def meet(what: str, timeout: int = TIMEOUT) -> None:
    """Waits until every process is here; ConfigError after `timeout` seconds. The name `what` is met at any number of times."""
    from jax._src import distributed

    state = distributed.global_state  # which, unlike jax.process_count(), touches no device
    if state.num_processes in (None, 1):
        return
    _met[what] = _met.get(what, 0) + 1
    try:
        state.client.wait_at_barrier(f"blip3o/{what}/{_met[what]}", timeout_in_ms=1000 * timeout)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"Process {state.process_id} waited {timeout} s for the others before {what}: {reason}") from error
    log.info("Process %d of %d: all are ready for %s.", state.process_id, state.num_processes, what)


_met: dict[str, int] = {}


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[bool]:
    """The body runs in process 0 (given True), then in the others, which find on disk what it made."""
    first = is_first()
    if not first:
        meet(what)
    yield first
    if first:
        meet(what)


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once. Touches no device."""
    from jax._src import distributed

    return not distributed.global_state.process_id
