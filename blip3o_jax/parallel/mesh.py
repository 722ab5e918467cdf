"""The mesh: its axes and sizes, and the devices that it is made of."""

import math
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from blip3o_jax.errors import InputError, multiples, require

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that a batch is sharded along
BATCH = PartitionSpec(ROWS)


def dividing(count: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that divide a batch of `count` rows: both of `ROWS`, else the larger that does."""
    single = sorted((("data",), ("fsdp",)), key=lambda axes: -mesh.shape[axes[0]])
    divide = (a for a in (ROWS, *single) if count % math.prod(mesh.shape[n] for n in a) == 0)
    return next(divide, ())


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=4,fsdp=2"` -> {"data": 4, "fsdp": 2}; InputError for another axis, one that is there
    twice, or no size."""
    sizes: dict[str, int] = {}
    for item in text.split(",") if text else ():
        axis, _, size = item.partition("=")
        is_size = axis in AXES and bool(re.fullmatch(r"-1|[1-9][0-9]{0,8}", size))
        expected = "is not one of data=N, fsdp=N, tensor=N with N above 0, or -1 for what is left"
        require(is_size, f"Mesh {text!r}: {item!r} {expected}.")
        require(axis not in sizes, f"Mesh {text!r}: {axis} is there twice.")
        sizes[axis] = int(size)
    return sizes


def mesh_shape(sizes: dict[str, int] | None, count: int) -> tuple[int, int, int]:
    """Sizes of (data, fsdp, tensor) over `count` devices; one may be -1 and takes what is left
    (`data` by default).

    InputError names the axis that does not fit, and the nearest sizes that do.
    """
    sizes = {"data": -1, "fsdp": 1, "tensor": 1, "dcn": 1, **(sizes or {})}
    for axis, size in sizes.items():
        known = "known: data, fsdp, tensor, and dcn for slices"
        require(axis in (*AXES, "dcn"), f"Mesh: there is no axis {axis!r}; {known}.")
        # True is an int too.
        is_size = type(size) is int and (size >= 1 or (size == -1 and axis != "dcn"))
        sentence = f"Mesh: {axis}={size!r} is not a valid size; sizes are positive, and one of data"
        require(is_size, f"{sentence}, fsdp, tensor may be -1.")
    open_axes = [axis for axis in AXES if sizes[axis] == -1]
    both = " and ".join(open_axes[:2])
    require(len(open_axes) < 2, f"Mesh: both {both} are -1; one of them takes what is left.")

    # Fixed axes take their devices one after the other, data last; the last of them, unless an open
    # one follows, takes all that are left.
    left = count
    fixed = sorted((axis for axis in AXES if sizes[axis] != -1), key=lambda axis: axis == "data")
    for axis in fixed:
        last = axis == fixed[-1] and not open_axes
        if left % sizes[axis] or (last and left != sizes[axis]):
            fitting = [left] if last else [n for n in range(1, left + 1) if left % n == 0]
            below = [n for n in fitting if n <= sizes[axis]][-1:]
            above = [n for n in fitting if n > sizes[axis]][:1]
            before = [f" after {a}={sizes[a]}" for a in fixed[: fixed.index(axis)] if sizes[a] > 1]
            raise InputError(
                f"Mesh: {axis}={sizes[axis]} does not fit the {left} of {count} devices that are "
                f"left{''.join(before)}; take {' or '.join(map(str, below + above))}."
            )
        left //= sizes[axis]
    data, fsdp, tensor = (left if sizes[axis] == -1 else sizes[axis] for axis in AXES)
    slices = sizes["dcn"]
    sentence = f"Mesh: data={data} does not divide over dcn={slices} slices; "
    require(data % slices == 0, sentence + multiples(data, slices))
    return data, fsdp, tensor


def make_mesh(sizes: dict[str, int] | None = None, devices: list | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices, with sizes as `mesh_shape` takes them.

    `dcn` is the number of slices, between which the network is slow: `data` is divided among the
    slices first, so that each slice holds whole copies of the parameters and only gradients travel
    between them. Where there are no such slices (CPU, one GPU host for two) devices are divided
    into equal runs. Raises InputError when the sizes do not fit the devices, or the slices of a
    TPU.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape, slices = mesh_shape(sizes, len(devices)), (sizes or {}).get("dcn", 1)
    present = {getattr(device, "slice_index", None) for device in devices} - {None}
    # A GPU's slice is its host.
    fits = len(present) in (0, 1, slices) or devices[0].platform != "tpu"
    sentence = f"Mesh: dcn={slices}, but the devices are of {len(present)} slices"
    require(fits, f"{sentence}; take dcn={len(present)}.")
    inner = (shape[0] // slices, *shape[1:])
    if slices == 1:
        # Split where need be: a pod of 16x16 chips may be tensor=2 too, which is not a side of it.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif len(present) == slices:
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        runs = np.split(np.asarray(devices), slices)
        grid = np.concatenate([mesh_utils.create_device_mesh(inner, list(run)) for run in runs])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def cores() -> int:
    """Number of the CPU's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cpu_into_devices(batch_size: int) -> bool:
    """Lets JAX take a CPU's cores as devices: the largest number of them that divides `batch_size`.

    Call it before anything touches a device. One device shares every operation out among the cores
    and waits for all; these work side by side, each at its rows of the batch. False, and nothing
    done, where the environment sets the number of devices, or the process has touched them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in flags:
        return False
    count = max(n for n in range(1, cores() + 1) if batch_size % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return False
    return True
