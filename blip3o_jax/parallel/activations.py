"""Where activations lie on the mesh: the constraints that models put on their arrays."""

import math

import jax
from jax.sharding import PartitionSpec as P

ROWS = ("data", "fsdp")  # the mesh axes that a batch is cut along


def cut(x, *axes):
    """x, laid out by the mesh axes named for its own: an axis without a name is whole on every
    device. Without the mesh of `jax.set_mesh`, or one that lacks the batch's axes, x itself. An
    axis whose size the mesh does not divide is left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(ROWS) <= set(mesh.axis_names):
        return x

    def place(size, names):
        names = tuple(
            name
            for name in (names if isinstance(names, tuple) else (names,))
            if name in mesh.axis_names
        )
        return (
            names if size % math.prod(mesh.shape[name] for name in names) == 0 else P.UNCONSTRAINED
        )

    axes += (None,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, P(*map(place, x.shape, axes)))


def keep_rows(x, *axes):
    """x [B,...] cut along the batch and by `axes` along the others.

    Said where activations begin and at each block's end: left to itself XLA lets them follow the
    weights, cuts the model width instead and computes the whole batch on every device.
    """
    return cut(x, ROWS, *axes)


def keep_width(x):
    """x [B,...,D] cut along "data" by its rows and along "fsdp" by its width, as the weights that
    it meets are. For few tokens a row: what is sent then are sums of activations, and every device
    reads its own part of the weights only."""
    return cut(x, "data", *(None,) * (x.ndim - 2), "fsdp")


def per_shard(function, x):
    """function(x) for x [B,...], a function whose results have a row for each of x and mix none.

    Every device computes its own rows, also where XLA does not know how to cut an operation
    (`top_k`, but on a TPU) and would gather all rows everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(ROWS) <= set(mesh.axis_names) or x.shape[0] % math.prod(
        mesh.shape[axis] for axis in ROWS
    ):
        return function(x)
    return jax.shard_map(function, in_specs=P(ROWS), out_specs=P(ROWS), axis_names=set(ROWS))(x)


def lookup(table, ids, dtype):
    """table [V,D], ids [B,T] -> [B,T,D] in `dtype`, cut as `keep_width` says: a device looks up its
    part of the width for all rows of its fsdp group. Let the results change places (`keep_rows`),
    and no device gathers the whole table."""
    return keep_width(table[cut(ids, "data")].astype(dtype))
