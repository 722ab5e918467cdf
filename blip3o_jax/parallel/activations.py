"""Where activations lie on the mesh: the constraints that models put on their arrays."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice_in_dim
from jax.sharding import PartitionSpec as P

from blip3o_jax.parallel.mesh import ROWS, dividing

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
    mesh = _mesh()
    if axes is None or mesh is None:
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


def rows_of_a_step(batch: int) -> int:
    """How many rows of a batch meet a device's part of the weights in the layout STEP."""
    mesh = _mesh()
    return -(-batch // (1 if mesh is None else mesh.shape["data"]))


def row_shards() -> int:
    """How many parts a batch is divided into."""
    mesh = _mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def read_rows(x: Array, start: Array, size: int) -> Array:
    """x [B,N,...] -> [B,size,...] from each row's own `start` [B] on."""

    def read(x: Array, start: Array) -> Array:
        slices = [dynamic_slice_in_dim(row, at, size) for row, at in zip(x, start, strict=True)]
        return jnp.stack(slices)

    return per_shard(read, x, start, batch_axes=(0, 0))


@jax.vmap
def write_rows(row: Array, new: Array, start: Array) -> Array:
    """x [B,N,...] with new [B,size,...] from each row's own `start` [B] on."""
    return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0)


def update_rows(x: Array, new: Array, start: list[Array | int], axis: int, index: Array) -> Array:
    """x [L,B,...] with new [B,...] written at `start`, in each row at its own index [B] of an axis.

    Every device writes its own rows, one after the other and in place: one scatter of all rows
    would gather what is sharded along another axis.
    """

    def write(x: Array, new: Array, index: Array) -> Array:
        for row in range(len(new)):
            places = list(start)
            places[1], places[axis] = row, index[row]
            x = jax.lax.dynamic_update_slice(x, new[None, row : row + 1], places)
        return x

    return per_shard(write, x, new, index, batch_axes=(1, 0, 0))


def interleaved(tree: Any, count: int, axes: tuple[str, ...] = ROWS) -> Any:
    """Arrays [B,...] -> [count,B/count,...]: piece i has rows i, i + count, ..., so that each
    device, which holds consecutive rows, has rows of every piece; rows lie along `axes`."""
    return jax.tree.map(
        lambda x: pin(x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), (None, axes)), tree
    )


def piecewise(function: Callable, tree: Any, count: int, axes: tuple[str, ...] = ROWS) -> Any:
    """function(tree), which treats every row of arrays [B,...] by itself, for `count` pieces of
    them one after the other, as `interleaved` cuts them."""
    results = jax.lax.map(function, interleaved(tree, count, axes))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), results)


def row_by_row(function: Callable[[Array], Array], x: Array) -> Array:
    """The same for one row of each device after the other: temporary arrays are those of one."""
    mesh = _mesh()
    axes = () if mesh is None else dividing(len(x), mesh)
    return piecewise(function, x, len(x) // math.prod(mesh.shape[axis] for axis in axes), axes)


def per_shard(function: Callable, *arrays: Array, batch_axes: tuple[int, ...] = (0,)):
    """function(*arrays), which treats every row of the batch by itself; `batch_axes` say which axis
    of each array is the batch, and results have that of the first.

    Every device computes its own rows, also where XLA cannot shard an operation (`top_k`, except on
    a TPU) and would gather all rows everywhere.
    """
    if _mesh() is None or arrays[0].shape[batch_axes[0]] % row_shards():
        return function(*arrays)
    specs = tuple(P(*(None,) * axis, ROWS) for axis in batch_axes)
    mapped = jax.shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=set(ROWS))
    return mapped(*arrays)


def per_device(function: Callable, weights: Any, *inputs: Any) -> Any:
    """function(weights, *inputs), which treats every row of the batch by itself: inputs, trees of
    arrays [B,...], go with their rows.

    Where every device has the whole weights, each runs the function on its own rows, and no device
    waits for another: a loop ends on each when its own rows are done.
    """
    mesh = _mesh()
    if mesh is None or mesh.size != mesh.shape["data"]:
        return function(weights, *inputs)
    if any(x.shape[0] % mesh.size for x in jax.tree.leaves(inputs)):
        return function(weights, *inputs)
    specs = P(), *(P(ROWS) for _ in inputs)
    mapped = jax.shard_map(function, in_specs=specs, out_specs=P(ROWS), check_vma=False)
    return mapped(weights, *inputs)


def _mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh along which arrays can be placed: that of `jax.set_mesh` if it has the batch's axes,
    but not inside of `per_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(ROWS) <= set(mesh.axis_names) and not mesh.are_all_axes_manual else None
