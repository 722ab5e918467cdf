"""Two-dimensional convolutions, channels last: plain formulas, and on a CPU the forms of cpu.py."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from blip3o_jax.kernels import cpu
from blip3o_jax.kernels.platform import on_cpu
from blip3o_jax.kernels.products import materialized, product

LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv2d(x: Array, kernel: Array, stride: int = 1, groups: int = 1) -> Array:
    """x [B,Y,X,C] * kernel [k,k,C/groups,C'] -> [B,Y/stride,X/stride,C'], zero padding k//2: torch
    conv2d with odd k."""
    size, _, per_group, features = kernel.shape
    if size == stride == 1:
        return pointwise(x, kernel[0, 0], groups)
    if per_group == stride == 1 and groups == x.shape[-1] == features and on_cpu():
        return cpu.depthwise_conv(x, kernel)
    pads = [(size // 2, size // 2)] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, feature_group_count=groups, dimension_numbers=LAYOUT
    )


def pointwise(x: Array, kernel: Array, groups: int) -> Array:
    """x [B,Y,X,C] times kernel [C/groups,C'], whose columns belong to the groups in order."""
    if groups == 1:
        return product("byxc,cd->byxd", x, kernel)
    # Groups first, by copies that move whole groups: XLA's CPU backend would put the pixels
    # innermost.
    per_group, features = kernel.shape
    x = materialized(jnp.moveaxis(x.reshape(*x.shape[:-1], groups, per_group), -2, 0))
    kernel = kernel.reshape(per_group, groups, features // groups)
    y = materialized(jnp.einsum("gbyxc,cgd->gbyxd", x, kernel))
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:4], features)


# Which of two neighbouring rows r-1+i and r+i the three taps of row 2r+i read, when every row is
# repeated: [i, neighbour, tap].
TWICE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def conv2d_of_doubled(x: Array, kernel: Array) -> Array:
    """x [B,Y,X,C], every pixel repeated to 2x2, * kernel [3,3,C,D] with zero padding ->
    [B,2Y,2X,D].

    The repeated pixels are never made: taps that read the same one are added first, which leaves
    four of nine.
    """
    rows, columns, features = *x.shape[1:3], kernel.shape[-1]
    # Sums of taps, not to be rounded on the way.
    folded = jnp.einsum("iak,jbl,klcd->abcijd", TWICE, TWICE, kernel, precision="highest")
    folded = folded.reshape(2, 2, x.shape[-1], -1).astype(x.dtype)
    # One convolution with a window of 2x2 has the results of all four places in a doubled pixel
    # side by side, each to be cut out at its own offset.
    y = jax.lax.conv_general_dilated(
        x, folded, (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT
    ).reshape(-1, rows + 1, columns + 1, 2, 2, features)
    places = [
        jnp.stack([y[:, i : i + rows, j : j + columns, i, j] for j in (0, 1)], axis=3)
        for i in (0, 1)
    ]
    return jnp.stack(places, axis=2).reshape(-1, 2 * rows, 2 * columns, features)
