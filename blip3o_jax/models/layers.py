"""Layers that several networks share.

Axis letters, used in every equation and shape comment of this package:
    B batch   T query tokens   S key and value tokens   N query heads   K key-value heads   G query
    heads per key-value head
    H head dim   D model width   F hidden width of an MLP   V vocabulary   L layers   C channels   Y
    X rows and columns

Parameters are f32 (or what the caller holds); `dtype` is the dtype of the matrix products. Norms,
angles and softmax are f32 inside.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.errors import InputError
from blip3o_jax.kernels.cpu import add_bias, depthwise_shift, in_memory, product, unrolled
from blip3o_jax.kernels.platform import on_cpu


def gelu_tanh(x):
    return nn.gelu(x, approximate=True)


def fan_in_normal(fan_in: int):
    """Normal(0, 1/fan_in): keeps the scale of a layer's input."""
    return nn.initializers.normal(fan_in**-0.5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits_product(equation: str, hidden, table):
    """`jnp.einsum(equation, hidden, table)` with an f32 result and gradients by products in the
    inputs' dtype, as every other layer has.

    JAX's own gradients are f32 products: beside bfloat16 twice the memory for the largest array of
    a step, and twice the traffic for the largest gradient.
    """
    return jnp.einsum(equation, hidden, table, preferred_element_type=jnp.float32)


def _logits_forward(equation, hidden, table):
    return logits_product(equation, hidden, table), (hidden, table)


def _logits_backward(equation, inputs, g):
    return jax.vjp(functools.partial(jnp.einsum, equation), *inputs)[1](g.astype(inputs[0].dtype))


logits_product.defvjp(_logits_forward, _logits_backward)


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
    in_axes=nn.broadcast,
    remat: str = "none",
    others: dict | None = None,
):
    """`block`, a scan step (carry, *inputs) -> (carry, output), `length` times with parameters of
    its own each, stacked along L.

    `remat` says what the backward pass computes again: "none" nothing, "full" each block, "dots"
    all but the matrix products. `others` are methods of the block that are scan steps too, and the
    axes of their inputs; nothing of them is computed again. InputError for an unknown `remat`.
    """
    if remat not in REMAT:
        raise InputError(f"Unknown remat {remat!r}; known: {', '.join(REMAT)}.")
    unroll = length if unrolled(length) else 1
    stacked = {
        "variable_axes": {"params": 0},
        "split_rngs": {"params": True},
        "length": length,
        "unroll": unroll,
    }
    methods = {
        name: stacked | {"in_axes": axes}
        for name, axes in {"__call__": in_axes, **(others or {})}.items()
    }
    return nn.scan(REMAT[remat](block), methods=methods)


class Linear(nn.Module):
    """A matrix product written as an einsum, e.g. `Linear("btd,dnh->btnh", (D, N, H))`;
    torch.nn.Linear with its axes named.

    `shape` is the kernel's; the bias, if any, has the kernel's axes that appear in the output.
    `reused`: see `product`.
    """

    equation: str
    shape: tuple[int, ...]
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    std: float | None = None  # of fresh weights; None keeps the scale of the input
    reused: bool = False

    @nn.compact
    def __call__(self, x):
        inputs, output = self.equation.split("->")
        axes = inputs.split(",")[1]
        sizes = dict(zip(axes, self.shape, strict=True))
        fan_in = math.prod(sizes[axis] for axis in axes if axis not in output)
        kernel = self.param(
            "kernel",
            nn.initializers.normal(fan_in**-0.5 if self.std is None else self.std),
            self.shape,
        )
        y = product(self.equation, x.astype(self.dtype), kernel.astype(self.dtype), self.reused)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, tuple(sizes[a] for a in output if a in sizes))
            y = add_bias(y, bias.astype(self.dtype))
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale (+ bias) over the last axis; statistics in f32, result in x's dtype."""

    eps: float
    use_bias: bool = False
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", self.scale_init, x.shape[-1:])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y.astype(x.dtype) * scale.astype(x.dtype)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(x.dtype)
        return y


def layer_norm(x, eps: float):
    """LayerNorm without parameters over the last axis, in f32; result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x, self.eps) * scale.astype(x.dtype) + bias.astype(x.dtype)


def rotary_angles(positions, head_dim: int, theta: float):
    """positions [B,T] -> (cos, sin), each [B,T,H/2], f32.

    Frequencies theta^(-2i/H), as Qwen3RotaryEmbedding.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x, angles):
    """x [B,T,N,H], angles from `rotary_angles`; rotates the two halves of H against each other (not
    interleaved)."""
    cos, sin = (a[:, :, None, :].astype(x.dtype) for a in angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def timestep_embedding(t, dim: int = 256):
    """t [B] in (0, 1000] -> [B,dim] f32: cosines first, then sines (diffusers Timesteps,
    flip_sin_to_cos, shift 0)."""
    half = dim // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def conv2d(x, kernel, stride: int = 1, groups: int = 1, lowering: str | None = None):
    """x [B,Y,X,C] * kernel [k,k,C/groups,C'] -> [B,Y/stride,X/stride,C'], zero padding k//2: torch
    conv2d with odd k.

    `lowering` of a depth-wise kernel is "conv" (XLA's convolution) or "shift" (a sum over shifted
    views); both give the same values up to rounding. The default is the faster one: "shift" on CPU,
    where XLA's depth-wise convolution takes over ten times as long.
    """
    size, _, per_group, out = kernel.shape
    depthwise = per_group == 1 and groups == x.shape[-1] == out
    if size == 1 and groups == 1 and stride == 1:
        return product("byxc,cd->byxd", x, kernel[0, 0])
    if size == 1 and stride == 1:
        # Groups first, by copies that move whole groups: XLA's CPU backend would lay the pixels
        # innermost.
        x = in_memory(jnp.moveaxis(x.reshape(*x.shape[:-1], groups, per_group), -2, 0))
        y = in_memory(
            jnp.einsum(
                "gbyxc,cgd->gbyxd", x, kernel[0, 0].reshape(per_group, groups, out // groups)
            )
        )
        return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:4], out)
    if depthwise and stride == 1 and (lowering or ("shift" if on_cpu() else "conv")) == "shift":
        return depthwise_shift(x, kernel)
    pad = size // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((pad, pad), (pad, pad)),
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# Which of two neighbouring rows r-1+i and r+i the three taps of row 2r+i read, when every row
# stands twice: [i, neighbour, tap].
TWICE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def conv2d_of_doubled(x, kernel):
    """x [B,Y,X,C], every pixel repeated to 2x2, * kernel [3,3,C,D] with zero padding ->
    [B,2Y,2X,D].

    The repeated pixels are never made: taps that read the same one are added first, which leaves
    four of nine. One convolution with a window of 2x2 has the results of all four places in a
    doubled pixel side by side, each to be cut out at its own offset.
    """
    rows, columns, features = *x.shape[1:3], kernel.shape[-1]
    # sums of taps, not to be rounded on the way
    folded = jnp.einsum("iak,jbl,klcd->abcijd", TWICE, TWICE, kernel, precision="highest")
    folded = folded.reshape(2, 2, x.shape[-1], -1).astype(x.dtype)
    y = jax.lax.conv_general_dilated(
        x, folded, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = y.reshape(*y.shape[:3], 2, 2, features)
    places = [
        jnp.stack([y[:, i : i + rows, j : j + columns, i, j] for j in (0, 1)], axis=3)
        for i in (0, 1)
    ]
    return jnp.stack(places, axis=2).reshape(-1, 2 * rows, 2 * columns, features)


class Conv2d(nn.Module):
    """torch.nn.Conv2d with odd kernel and padding k//2, channels last; `doubled`: of the input with
    every pixel repeated to 2x2."""

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    doubled: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        k, per_group = self.kernel_size, x.shape[-1] // self.groups
        kernel = self.param(
            "kernel", fan_in_normal(k * k * per_group), (k, k, per_group, self.features)
        )
        x = x.astype(self.dtype)
        y = (
            conv2d_of_doubled(x, kernel)
            if self.doubled
            else conv2d(x, kernel.astype(self.dtype), self.stride, self.groups)
        )
        if self.use_bias:
            y = add_bias(
                y, self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
            )
        return y
