"""Batches over a mesh: which rows a process feeds, and global arrays from them."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax.errors import InputError, multiples
from blip3o_jax.parallel.mesh import BATCH


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """InputError naming the nearest sizes when the mesh does not cut a batch, or its micro-batches,
    into equal parts."""
    shards = batch_shards(mesh)
    if batch_size % (shards * accumulate):
        pieces = f"the mesh's {shards} batch shards" + (
            f" x {accumulate} micro-batches" if accumulate > 1 else ""
        )
        raise InputError(
            f"batch_size {batch_size} does not divide by {pieces}; "
            f"{multiples(batch_size, shards * accumulate)}"
        )


def batch_hosts(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal runs of the batch's rows.

    Processes that share rows feed the same.
    """
    shards = batch_shards(mesh)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((shards,)).values()
    rows = sorted({place[0].indices(shards)[0] for place in places})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise InputError(
            f"Mesh {dict(mesh.shape)}: the devices of process {jax.process_index()} do not "
            "hold a run of the batch; reorder axes."
        )
    return rows[0] // len(rows), shards // len(rows)


def put_batch(batch, mesh: Mesh):
    """This process's rows [b,...] of a batch, as `batch_hosts` counts them -> global arrays [B,...]
    cut along the batch."""
    sharding, hosts = NamedSharding(mesh, BATCH), batch_hosts(mesh)[1]

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * hosts, *x.shape[1:]))

    return jax.tree.map(put, batch)


def put_replicated(batch, mesh: Mesh):
    """Arrays [B,...] that every process holds whole -> global arrays, cut along the batch over as
    many axes as divide B."""

    cuts = (BATCH[0], *sorted((("data",), ("fsdp",)), key=lambda axes: -mesh.shape[axes[0]]))

    def put(x):
        x = np.asarray(x)
        axes = next(
            (axes for axes in cuts if len(x) % math.prod(mesh.shape[axis] for axis in axes) == 0),
            None,
        )
        return jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, PartitionSpec(axes)), lambda index: x[index]
        )

    return jax.tree.map(put, batch)
