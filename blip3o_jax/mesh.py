"""Devices: the mesh, and moving host arrays onto it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blip3o_jax.config import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def parse_mesh(text: str) -> dict[str, int]:
    """`"data=4,fsdp=2"` -> {"data": 4, "fsdp": 2}; raises ConfigError on an unknown axis or a size that is not a number."""
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        if axis not in AXES or not size.lstrip("-").isdigit():
            raise ConfigError(f"Mesh {text!r}: {item!r} is not one of data=N, fsdp=N, tensor=N.")
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int] | None = None, devices=None) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices; one axis may be -1 and takes what is left (`data` by default).

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": -1, "fsdp": 1, "tensor": 1, **(sizes or {})}
    shape = [sizes[axis] for axis in AXES]
    known = int(np.prod([s for s in shape if s != -1]))
    if shape.count(-1) > 1 or min(s for s in (*shape, 1) if s != -1) < 1:
        raise ConfigError(f"Mesh {sizes}: sizes are positive, and at most one is -1.")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise ConfigError(f"Mesh {sizes} does not fit {len(devices)} devices.")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_batch(batch, mesh: Mesh):
    """Host-local numpy arrays [b,...] -> global arrays [b*hosts,...] cut along the batch."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
