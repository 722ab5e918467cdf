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


def rows_of_host(count: int, mesh: Mesh) -> np.ndarray:
    """Which of `count` rows along the batch are this process's, ascending; processes whose devices
    share a shard have the same ones. They need not follow each other: a TPU's host has a block of
    chips, whose shards lie in several rows of the mesh."""
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((count,)).values()
    return np.unique([np.arange(count)[place] for place in places])


def put_batch(batch, mesh: Mesh):
    """This process's rows [b,...] of a batch, those of `rows_of_host` -> global arrays [B,...]
    sharded along the batch."""
    sharding, shards = NamedSharding(mesh, BATCH), batch_shards(mesh)
    own = rows_of_host(shards, mesh)

    def put(x):
        pieces = dict(zip(own, np.split(np.asarray(x), len(own)), strict=True))
        size = len(x) // len(own)  # of a shard
        shape = (size * shards, *np.shape(x)[1:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: pieces[(index[0].start or 0) // size]
        )

    return jax.tree.map(put, batch)


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
