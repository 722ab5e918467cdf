"""Layers that several networks share.

Axis letters, used in every equation and shape comment of this package:

    B  batch              T  query tokens         S  key and value tokens
    N  query heads        K  key-value heads      G  query heads per key-value head
    H  head dim           D  model width          F  hidden width of an MLP
    V  vocabulary         L  layers               C  channels
    Y, X  rows and columns

Parameters are f32 (or what the caller holds); `dtype` is the dtype of the matrix products. Norms,
angles and softmax are f32 inside.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.kernels.convolutions import conv2d, conv2d_of_doubled
from blip3o_jax.kernels.platform import is_unrolled
from blip3o_jax.kernels.products import add_bias, product
from blip3o_jax.parallel.activations import Axes, pin

Initializer = nn.initializers.Initializer
Dtype = jax.typing.DTypeLike


# What the backward pass computes again: nothing, each block, or all but its matrix products.
REMAT = {
    "none": lambda block: block,
    "full": lambda block: nn.remat(block, prevent_cse=False),
    "dots": lambda block: nn.remat(
        block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}


def scan_layers(
    block: type[nn.Module],
    length: int,
    in_axes: tuple | object = nn.broadcast,
    remat: str = "none",
    others: dict | None = None,
) -> type[nn.Module]:
    """`block`, a scan step (carry, *inputs) -> (carry, output), `length` times with parameters of
    its own each, stacked along L.

    `remat` is a key of REMAT; ValueError for another. `others` are methods of the block that are
    scan steps too, with the axes of their inputs; nothing of them is computed again.
    """
    if remat not in REMAT:
        raise ValueError(f"unknown remat {remat!r}; known: {', '.join(REMAT)}")
    stacked = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True},
        "length": length,
        "unroll": length if is_unrolled(length) else 1,
    }
    # The same parameters for every method.
    axes = {"__call__": in_axes, **(others or {})}
    methods = {name: stacked | {"in_axes": axes[name]} for name in axes}
    return nn.scan(REMAT[remat](block), methods=methods)


class Linear(nn.Module):
    """A matrix product written as an einsum, e.g. `Linear("btd,dnh->btnh", (D, N, H))`;
    torch.nn.Linear with its axes named.

    `shape` is the kernel's; the bias, if any, has the kernel's axes that appear in the output.
    """

    equation: str
    shape: tuple[int, ...]
    use_bias: bool = False
    dtype: Dtype = jnp.float32
    bias_init: Initializer = nn.initializers.zeros
    std: float | None = None  # of fresh weights; None keeps the scale of the input
    out: Axes | None = None  # mesh axes of the result, see `activations.pin`
    loop_invariant: bool = False  # see `products.product`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, output = self.equation.split("->")
        axes = inputs.split(",")[1]
        sizes = dict(zip(axes, self.shape, strict=True))
        # The axes that are summed over say how large fresh weights are.
        fan_in = math.prod(sizes[axis] for axis in axes if axis not in output)
        std = fan_in**-0.5 if self.std is None else self.std
        kernel = self.param("kernel", nn.initializers.normal(std), self.shape)
        kernel = kernel.astype(self.dtype)
        # One of `sample.int8` has a scale for each output channel.
        if self.has_variable("params", "kernel_scale"):
            kernel = kernel * self.get_variable("params", "kernel_scale").astype(self.dtype)
        y = product(self.equation, x.astype(self.dtype), kernel, self.loop_invariant)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, tuple(sizes[a] for a in output if a in sizes))
            y = add_bias(y, bias.astype(self.dtype))
        return pin(y, self.out)


class RMSNorm(nn.Module):
    """x / rms(x) * scale (+ bias) over the last axis; statistics in f32, result in x's dtype."""

    eps: float
    use_bias: bool = False
    scale_init: Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y.astype(x.dtype) * scale.astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(x.dtype)
        return y


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm without parameters over the last axis, in f32; result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, self.eps) * scale.astype(x.dtype) + bias.astype(x.dtype)


class Conv2d(nn.Module):
    """torch.nn.Conv2d with odd kernel and padding k//2, channels last; `doubled`: of the input with
    every pixel repeated to 2x2."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    doubled: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, per_group = self.kernel_size, x.shape[-1] // self.groups
        init = nn.initializers.normal((size * size * per_group) ** -0.5)
        kernel = self.param("kernel", init, (size, size, per_group, self.features))
        x = x.astype(self.dtype)
        if self.doubled:
            y = conv2d_of_doubled(x, kernel)
        else:
            y = conv2d(x, kernel.astype(self.dtype), self.stride, self.groups)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = add_bias(y, bias.astype(self.dtype))
        return y
