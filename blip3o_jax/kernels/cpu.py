"""The same values, in the forms that XLA compiles well for a CPU."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from blip3o_jax.kernels.platform import on_cpu

FEW = 8  # rows of a device for which sums are faster than a product on a CPU, see `_rows_product`


# rows, and numbers of a matrix, for which one row at a time is faster still
FEWER, SMALL = 4, 1 << 17


def in_memory(tree):
    """On CPU: arrays that are in memory, in the order of their axes, before anything reads them.

    XLA's CPU backend fuses and transposes for fewer arrays, also where that computes a thing many
    times, on one core, or number by number.
    """
    return jax.lax.optimization_barrier(tree) if on_cpu() else tree


def unrolled(length: int) -> bool:
    """Whether `scan_layers` writes a stack of this many layers out, instead of a loop.

    On CPU a loop copies each layer's weights before it uses them; programs of deep stacks would be
    long.
    """
    return on_cpu() and length <= 16


def product(equation: str, x, kernel, reused: bool = False):
    """`jnp.einsum(equation, x, kernel)`; on CPU as one product of two matrices where the axes allow
    it. `reused`: a loop comes back to the kernel with a few rows each time, in a program of
    `kernels.platform.jit` that generates; then it is laid out for them, once.

    XLA's CPU backend takes twice as long for the gradients when several axes number the rows.
    """
    inputs, output = equation.split("->")
    x_axes, axes = inputs.split(",")
    summed = "".join(axis for axis in axes if axis not in output)
    kept, rows = axes.removeprefix(summed), x_axes.removesuffix(summed)
    if not on_cpu() or summed + kept != axes or rows + summed != x_axes or output != rows + kept:
        return jnp.einsum(equation, x, kernel)
    matrix = jax.lax.optimization_barrier(
        kernel.reshape(math.prod(kernel.shape[: len(summed)]), -1)
    )
    return _rows_product(x.reshape(-1, matrix.shape[0]), matrix, reused).reshape(
        *x.shape[: len(rows)], *kernel.shape[len(summed) :]
    )


def _rows_product(x, matrix, reused: bool):
    """x [R,K] @ matrix [K,N] on CPU.

    For more than one row XLA's and YNNPACK's products first lay the matrix out anew, which takes
    longer than to multiply a few rows by it. So a few rows of a device go through a small matrix,
    which a cache holds, one after the other, and through a large one as sums.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = sizes.get("data", 1)
    rows = len(x) // parts
    if len(x) % parts or rows < 2 or any(sizes[axis] > 1 for axis in sizes if axis != "data"):
        return x @ matrix
    if rows <= FEWER and matrix.size <= SMALL:
        x = x.reshape(parts, rows, -1)
        return jnp.stack([x[:, i] @ matrix for i in range(rows)], axis=1).reshape(
            -1, matrix.shape[1]
        )
    if rows > FEW or not reused:
        return x @ matrix
    if parts == 1:
        return _sums_of_products(x, matrix)
    return jax.shard_map(
        _sums_of_products, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"}
    )(x, matrix)


def _sums_of_products(x, matrix):
    """x [R,K] @ matrix [K,N] as sums over K, the rows innermost: the matrix is read once, as it
    lies in memory when transposed.

    The products with ones on the diagonal are there to write their results. Without them XLA
    computes x anew for each of the sums, and the sums in the order of the result, for which it
    reads the matrix once a row.
    """
    same = jnp.eye(len(x), dtype=x.dtype)
    sums = jnp.sum(in_memory(same @ x) * in_memory(matrix.T)[:, None], axis=-1)  # [N,R]
    return jnp.einsum("qr,nr->qn", same, in_memory(sums))


def add_bias(y, bias):
    """y [...,*] + bias [*], the last axes of y.

    On CPU written as a product with ones, so that the bias's gradient is one too: XLA's own sum
    over so many rows runs on one core, and computes what it sums anew for each of the numbers.
    """
    if not on_cpu():
        return y + bias
    ones = jnp.ones((y.size // bias.size, 1), y.dtype)
    return y + (ones @ bias.reshape(1, -1)).reshape(y.shape)


def _shifted(x, size: int):
    """The size*size views of zero-padded x [B,Y,X,C], row-major over the window. x is padded once,
    whatever its producer."""
    rows, columns, pad = x.shape[1], x.shape[2], size // 2
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    return [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]


@jax.custom_vjp
def depthwise_shift(x, kernel):
    """x [B,Y,X,C] * kernel [k,k,1,C] as a sum of shifted products.

    The gradients are written out, and padded input and output barred from fusing with what
    surrounds them: left to itself XLA computes the producer of x anew for every tap, which takes
    twice as long, or for the middle one, which reads no padding.
    """
    views = _shifted(x, kernel.shape[0])
    taps = kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.optimization_barrier(
        sum(view * tap for view, tap in zip(views, taps, strict=True))
    )


def _depthwise_forward(x, kernel):
    return depthwise_shift(x, kernel), (x, kernel)


def _depthwise_backward(residuals, g):
    x, kernel, g = jax.lax.optimization_barrier((*residuals, g))
    batch, _, columns, channels = g.shape
    # Over rows in the pass that multiplies, then as a product with ones: XLA's own reduction to so
    # few numbers runs on one core.
    ones = jnp.ones(batch * columns, g.dtype)
    taps = [
        ones @ jnp.sum(view * g, axis=1).reshape(-1, channels)
        for view in _shifted(x, kernel.shape[0])
    ]
    return depthwise_shift(g, kernel[::-1, ::-1]), jnp.stack(taps).reshape(kernel.shape)


depthwise_shift.defvjp(_depthwise_forward, _depthwise_backward)
