"""The same values and gradients, in the forms that XLA compiles well for a CPU."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero, linear_call
from jax.lax import optimization_barrier
from jax.sharding import PartitionSpec as P

from blip3o_jax.kernels.masks import masked

# Rows on a device up to which, and numbers in a matrix from which on, sums are faster than a
# product, see `_rows_product`.
FEW = 8
SMALL = 1 << 17


def product(equation: str, x: Array, kernel: Array, loop_invariant: bool) -> Array:
    """`products.product` as one product of two matrices, where the axes allow it: gradients
    take twice as long when several axes number the rows."""
    inputs, output = equation.split("->")
    x_axes, axes = inputs.split(",")
    summed = "".join(axis for axis in axes if axis not in output)
    columns = axes.removeprefix(summed)
    rows = x_axes.removesuffix(summed)
    if summed + columns != axes or rows + summed != x_axes or output != rows + columns:
        return jnp.einsum(equation, x, kernel)
    size = math.prod(kernel.shape[: len(summed)])
    matrix = optimization_barrier(kernel.reshape(size, -1))
    y = _rows_product(x.reshape(-1, matrix.shape[0]), matrix, loop_invariant)
    return y.reshape(*x.shape[: len(rows)], *kernel.shape[len(summed) :])


def _rows_product(x: Array, matrix: Array, loop_invariant: bool) -> Array:
    """x [R,K] @ matrix [K,N].

    For a few rows XLA's products first re-lay the matrix out, which takes longer than to multiply
    them by it, unless a cache holds the matrix. So a few rows on a device go through a large one as
    sums.
    """
    # Only rows on devices that each hold the whole matrix can be treated by themselves.
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.are_all_axes_manual else mesh.shape
    shards = sizes.get("data", 1)
    rows = len(x) // shards
    if len(x) % shards or not loop_invariant or matrix.size <= SMALL or not 2 <= rows <= FEW:
        return x @ matrix
    if any(sizes[axis] > 1 for axis in sizes if axis != "data"):
        return x @ matrix
    if shards == 1:
        return _sums_of_products(x, matrix)
    sharded = jax.shard_map(
        _sums_of_products, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
    )
    return sharded(x, matrix)


def _sums_of_products(x: Array, matrix: Array) -> Array:
    """x [R,K] @ matrix [K,N] as sums over K, the rows innermost: the transposed matrix is read
    once, in the order in which it is stored.

    The products with the identity are there to write their results. Without them XLA computes x
    again for each of the sums, and the sums in the order of the result, for which it reads the
    matrix once a row.
    """
    identity = jnp.eye(len(x), dtype=x.dtype)
    rows = optimization_barrier(identity @ x)
    sums = jnp.sum(rows * optimization_barrier(matrix.T)[:, None], axis=-1)  # [N,R]
    return jnp.einsum("qr,nr->qn", identity, optimization_barrier(sums))


def add_bias(y: Array, bias: Array) -> Array:
    """`products.add_bias` with a product of ones, so that the bias's gradient is a product too:
    XLA's own sum over so many rows runs on one core, and computes each summand anew."""
    ones = jnp.ones((y.size // bias.size, 1), y.dtype)
    return y + (ones @ bias.reshape(1, -1)).reshape(y.shape)


def sum_of_squares(x: Array) -> Array:
    """`products.sum_of_squares`, the layers of a stack first, where squaring and adding are one
    pass: XLA cuts a sum of more than 32 numbers into windows, and writes the squares before it."""
    squares = jnp.square(x.astype(jnp.float32))
    if x.ndim > 1:
        squares = optimization_barrier(jnp.sum(squares, axis=0))
    return jnp.sum(squares)


def one_query_attention(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """`attention.softmax_attention` of q [B,1,N,H], as sums over H and S.

    They read keys [B,K,S,H] and values [B,K,H,S] once, in the order in which a cache stores them;
    products of a few rows would re-lay them out, and copy the layer's part of the cache before (see
    `_sums_of_products`).
    """
    dtype = q.dtype
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)))
    # The scale comes as a product, which writes its result.
    q = optimization_barrier(q @ (scale * jnp.eye(head_dim)))
    q = q.reshape(batch, kv_heads, heads // kv_heads, 1, head_dim)
    logits = masked(jnp.sum(q * k[:, :, None], axis=-1)[..., None, :], mask)
    weights = optimization_barrier(jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True)))
    out = jnp.sum(weights * v[:, :, None], axis=-1) / jnp.sum(weights, axis=-1)
    return out.reshape(batch, 1, heads, head_dim).astype(dtype)


def few_query_attention(q: Array, k: Array, v: Array, mask: Array | None, scale: float) -> Array:
    """`attention.softmax_attention` of few queries q [B,T,N,H], which are on the right of both
    products: these read keys [B,K,S,H] and values [B,K,H,S] as a cache stores them. On the right
    keys and values would be transposed for every call."""
    dtype = q.dtype
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grid = heads // kv_heads, length
    q, k, v = (x.astype(jnp.float32) for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)))
    q = (scale * q).reshape(batch, length, kv_heads, grid[0], head_dim).transpose(0, 2, 4, 3, 1)
    logits = jnp.einsum("bksh,bkhr->bksr", k, q.reshape(batch, kv_heads, head_dim, -1))
    logits = jnp.moveaxis(logits.reshape(batch, kv_heads, -1, *grid), 2, -1)  # [B,K,G,T,S]
    logits = masked(logits, mask)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    columns = jnp.moveaxis(weights, -1, 2).reshape(batch, kv_heads, k.shape[2], -1)
    out = jnp.einsum("bkhs,bksr->bkhr", v, columns).reshape(batch, kv_heads, head_dim, *grid)
    out = out / jnp.sum(weights, axis=-1)[:, :, None]
    return out.transpose(0, 4, 1, 3, 2).reshape(batch, length, heads, head_dim).astype(dtype)


def _shifted(x: Array, size: int) -> list[Array]:
    """The size*size views of x [B,Y,X,C], zero-padded once, row-major over the window."""
    rows, columns, pad = x.shape[1], x.shape[2], size // 2
    x = optimization_barrier(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    return [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]


@jax.custom_jvp
def depthwise_conv(x: Array, kernel: Array) -> Array:
    """x [B,Y,X,C] * kernel [k,k,1,C] as a sum of shifted products; XLA's own depth-wise convolution
    takes over ten times as long.

    The gradients are written by hand, and barriers keep padded input and output from fusing with
    what surrounds them: XLA would compute the producer of x again for every tap, which takes twice
    as long, or for the middle one, which reads no padding.
    """
    views = _shifted(x, kernel.shape[0])
    taps = kernel.reshape(-1, kernel.shape[-1])
    return optimization_barrier(sum(view * tap for view, tap in zip(views, taps, strict=True)))


def _depthwise_of_input(kernel: Array, x: Array) -> Array:
    return depthwise_conv(x, kernel)


def _gradient_of_input(kernel: Array, g: Array) -> Array:
    return depthwise_conv(optimization_barrier(g), kernel[::-1, ::-1])


def _gradient_of_kernel(size: int, x: Array, g: Array) -> Array:
    x, g = optimization_barrier((x, g))
    batch, _, columns, channels = g.shape
    # Over rows in the pass that multiplies, then as a product with ones: XLA's own reduction to so
    # few numbers runs on one core.
    ones = jnp.ones(batch * columns, g.dtype)
    taps = [ones @ jnp.sum(view * g, axis=1).reshape(-1, channels) for view in _shifted(x, size)]
    return jnp.stack(taps).reshape(size, size, 1, channels)


def _depthwise_derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Linear in each of its two arguments, whose transposes are the gradients: so it has forward
    derivatives as well."""
    (x, kernel), (dx, dkernel) = primals, tangents
    parts = []
    if not isinstance(dx, SymbolicZero):
        parts.append(linear_call(_depthwise_of_input, _gradient_of_input, kernel, dx))
    if not isinstance(dkernel, SymbolicZero):
        transpose = functools.partial(_gradient_of_kernel, kernel.shape[0])
        parts.append(linear_call(depthwise_conv, transpose, x, dkernel))
    return depthwise_conv(x, kernel), sum(parts)


depthwise_conv.defjvp(_depthwise_derivative, symbolic_zeros=True)
