"""Batches over a mesh: which rows a process feeds, and global arrays from them."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax.errors import multiples, require
from blip3o_jax.parallel.mesh import BATCH, dividing


def batch_shards(mesh: Mesh) -> int:
    """Number of parts that a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, mesh: Mesh, count: int = 1, parts: str = "micro-batches") -> None:
    """InputError naming the nearest sizes unless the mesh divides a batch, or each of its parts."""
    shards = batch_shards(mesh)
    each = f" x {count} {parts}" if count > 1 else ""
    sentence = f"batch_size {batch_size} does not divide by the mesh's {shards} batch shards{each}"
    nearest = multiples(batch_size, shards * count)
    require(batch_size % (shards * count) == 0, f"{sentence}; {nearest}")


def batch_hosts(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal runs of the batch's rows; processes that share
    rows feed the same."""
    shards = batch_shards(mesh)
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((shards,)).values()
    rows = sorted({place[0].indices(shards)[0] for place in places})
    # Consecutive rows, of which a whole number of such runs come before.
    is_run = rows == list(range(rows[0], rows[0] + len(rows))) and rows[0] % len(rows) == 0
    devices = f"Mesh {dict(mesh.shape)}: the devices of process {jax.process_index()}"
    require(is_run, f"{devices} do not hold a run of the batch; reorder axes.")
    return rows[0] // len(rows), shards // len(rows)


def put_batch(batch, mesh: Mesh):
    """This process's rows [b,...] of a batch, as `batch_hosts` counts them -> global arrays [B,...]
    sharded along the batch."""
    sharding, hosts = NamedSharding(mesh, BATCH), batch_hosts(mesh)[1]

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * hosts, *x.shape[1:]))

    return jax.tree.map(put, batch)


def rows_of_host(count: int, mesh: Mesh) -> slice:
    """Which of `count` rows along the batch are this process's."""
    i, hosts = batch_hosts(mesh)
    return slice(i * count // hosts, (i + 1) * count // hosts)


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded along the batch alone."""
    # Devices along other axes hold the same rows.
    pieces = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start].data) for start in sorted(pieces)])


def gathered(tree):
    """Arrays on the host, whole in every process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def put_replicated(batch, mesh: Mesh):
    """Arrays [B,...] of which every process holds all rows -> global arrays, sharded along the
    batch over as many axes as divide B."""

    def put(x):
        x = np.asarray(x)
        sharding = NamedSharding(mesh, PartitionSpec(dividing(len(x), mesh)))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)
