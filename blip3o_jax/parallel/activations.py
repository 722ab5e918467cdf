"""Where activations lie on the mesh: the constraints that models put on their arrays."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import Array
from jax.sharding import PartitionSpec as P

from blip3o_jax.parallel.mesh import ROWS

Axes = tuple[str | tuple[str, ...] | None, ...]  # mesh axes of an array's leading axes


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """Mesh axes of a transformer's activations; None leaves an array to the compiler."""

    stream: Axes  # hidden states [B,T,D] between blocks
    heads: Axes | None = None  # queries [B,T,N,H], keys and values [B,T,K,H]
    inner: Axes | None = None  # [B,T,N,H] and [B,T,F], which the last projection of a branch reads
    # Whether a loop around the call meets the same kernels each time, see `products.product`.
    loop_invariant: bool = False


# Whole rows of tokens. Weights that are sharded along "fsdp" are gathered.
WHOLE = Layout(stream=(ROWS,))
# One token a row, behind a cache: rows along "data" and the width along "fsdp", as the weights that
# they meet. Every device reads its own part of the weights only, and sums of activations travel;
# gathering every weight for every token would send many times as much.
STEP = Layout(
    stream=("data", None, "fsdp"), heads=(ROWS, None, "tensor"), inner=("data", None, "tensor")
)


def pin(x: Array, axes: Axes | None) -> Array:
    """x, sharded by the mesh axes named for its leading axes, and replicated along the others.

    x itself for None, and without a mesh of `jax.set_mesh` that has the batch's axes. An axis whose
    size the mesh does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axes is None or not set(ROWS) <= set(mesh.axis_names):
        return x

    def place(size, names):
        names = names if isinstance(names, tuple) else (names,)
        names = tuple(name for name in names if name in mesh.axis_names)
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        return names if divides else P.UNCONSTRAINED

    axes += (None,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, P(*map(place, x.shape, axes)))


def pin_rows(x: Array, *axes: str | None) -> Array:
    """x [B,...] sharded along the batch, and by `axes` along the others.

    For where activations begin and for each block's end: by itself XLA lets them follow the
    weights, shards the model width instead and computes the whole batch on every device.
    """
    return pin(x, (ROWS, *axes))


def lookup(table: Array, ids: Array, dtype: jax.typing.DTypeLike, out: Axes) -> Array:
    """table [V,D], ids [B,T] -> [B,T,D] in `dtype`, sharded as `out`.

    A device looks up its part of the width for all rows of its fsdp group; then the results change
    places, and no device gathers the whole table.
    """
    x = pin(table[pin(ids, ("data",))].astype(dtype), STEP.stream)
    return x if out == STEP.stream else pin(x, out)


def per_shard(function: Callable[[Array], Array], x: Array):
    """function(x) for x [B,...], a function whose results have a row for each of x and mix none.

    Every device computes its own rows, also where XLA cannot shard an operation (`top_k`, except on
    a TPU) and would gather all rows everywhere.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(ROWS) <= set(mesh.axis_names):
        return function(x)
    if x.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS):
        return function(x)
    return jax.shard_map(function, in_specs=P(ROWS), out_specs=P(ROWS), axis_names=set(ROWS))(x)
