"""Layers that several networks share.

Axis letters, used in every equation and shape comment of this package:
    B batch   T query tokens   S key and value tokens   N query heads   K key-value heads   G query heads per key-value head
    H head dim   D model width   F hidden width of an MLP   V vocabulary   L layers   C channels   Y X rows and columns

Parameters are f32 (or what the caller holds); `dtype` is the dtype of the matrix products. Norms, angles and softmax are f32 inside.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from blip3o_jax.config import ConfigError

ROWS = ("data", "fsdp")  # the mesh axes that a batch is cut along
FEW = 8  # rows of a device for which sums are faster than a product on a CPU, see `_rows_product`
FEWER, SMALL = 4, 1 << 17  # rows, and numbers of a matrix, for which one row at a time is faster still


def gelu_tanh(x):
    return nn.gelu(x, approximate=True)


def fan_in_normal(fan_in: int):
    """Normal(0, 1/fan_in): keeps the scale of a layer's input."""
    return nn.initializers.normal(fan_in**-0.5)


def platform() -> str:
    """What a program is traced for, "cpu", "gpu" or "tpu": the devices of the mesh of `jax.set_mesh`, which may be those of a topology
    that is not here; without one, this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def on_cpu() -> bool:
    """Whether programs are compiled for the CPU, whose XLA wants a few things said differently to be fast."""
    return platform() == "cpu"


def in_memory(tree):
    """On CPU: arrays that are in memory, in the order of their axes, before anything reads them. XLA's CPU backend fuses and transposes for
    fewer arrays, also where that computes a thing many times, on one core, or number by number."""
    return jax.lax.optimization_barrier(tree) if on_cpu() else tree


def cut(x, *axes):
    """x, laid out by the mesh axes named for its own: an axis without a name is whole on every device. Without the mesh of `jax.set_mesh`,
    or one that lacks the batch's axes, x itself. An axis whose size the mesh does not divide is left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(ROWS) <= set(mesh.axis_names):
        return x

    def place(size, names):
        names = tuple(name for name in (names if isinstance(names, tuple) else (names,)) if name in mesh.axis_names)
        return names if size % math.prod(mesh.shape[name] for name in names) == 0 else P.UNCONSTRAINED

    axes += (None,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, P(*map(place, x.shape, axes)))


def keep_rows(x, *axes):
    """x [B,...] cut along the batch and by `axes` along the others. Said where activations begin and at each block's end: left to itself
    XLA lets them follow the weights, cuts the model width instead and computes the whole batch on every device."""
    return cut(x, ROWS, *axes)


def keep_width(x):
    """x [B,...,D] cut along "data" by its rows and along "fsdp" by its width, as the weights that it meets are. For few tokens a row: what
    is sent then are sums of activations, and every device reads its own part of the weights only."""
    return cut(x, "data", *(None,) * (x.ndim - 2), "fsdp")


def by_rows(function, x):
    """function(x) for x [B,...], a function whose results have a row for each of x and mix none. Every device computes its own rows, also
    where XLA does not know how to cut an operation (`top_k`, but on a TPU) and would gather all rows everywhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if not set(ROWS) <= set(mesh.axis_names) or x.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS):
        return function(x)
    return jax.shard_map(function, in_specs=P(ROWS), out_specs=P(ROWS), axis_names=set(ROWS))(x)


def lookup(table, ids, dtype):
    """table [V,D], ids [B,T] -> [B,T,D] in `dtype`, cut as `keep_width` says: a device looks up its part of the width for all rows of its
    fsdp group. Let the results change places (`keep_rows`), and no device gathers the whole table."""
    return keep_width(table[cut(ids, "data")].astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits_product(equation: str, hidden, table):
    """`jnp.einsum(equation, hidden, table)` with an f32 result and gradients by products in the inputs' dtype, as every other layer has.

    JAX's own gradients are f32 products: beside bfloat16 twice the memory for the largest array of a step, and twice the traffic for the
    largest gradient.
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
    "dots": lambda block: nn.remat(block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


def in_a_row(length: int) -> bool:
    """Whether `scan_layers` writes a stack of this many layers out, instead of a loop. On CPU a loop copies each layer's weights before it
    uses them; programs of deep stacks would be long."""
    return on_cpu() and length <= 16


def scan_layers(block: type[nn.Module], length: int, in_axes=nn.broadcast, remat: str = "none", others: dict | None = None):
    """`block`, a scan step (carry, *inputs) -> (carry, output), `length` times with parameters of its own each, stacked along L.

    `remat` says what the backward pass computes again: "none" nothing, "full" each block, "dots" all but the matrix products.
    `others` are methods of the block that are scan steps too, and the axes of their inputs; nothing of them is computed again.
    ConfigError for an unknown `remat`.
    """
    if remat not in REMAT:
        raise ConfigError(f"Unknown remat {remat!r}; known: {', '.join(REMAT)}.")
    unroll = length if in_a_row(length) else 1
    stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": length, "unroll": unroll}
    methods = {name: stacked | {"in_axes": axes} for name, axes in {"__call__": in_axes, **(others or {})}.items()}
    return nn.scan(REMAT[remat](block), methods=methods)


def product(equation: str, x, kernel, repeats: bool = False):
    """`jnp.einsum(equation, x, kernel)`; on CPU as one product of two matrices where the axes allow it. `repeats`: a loop comes back to the
    kernel with a few rows each time, in a program of `compilation.jit` that generates; then it is laid out for them, once.

    XLA's CPU backend takes twice as long for the gradients when several axes number the rows.
    """
    inputs, output = equation.split("->")
    x_axes, axes = inputs.split(",")
    summed = "".join(axis for axis in axes if axis not in output)
    kept, rows = axes.removeprefix(summed), x_axes.removesuffix(summed)
    if not on_cpu() or summed + kept != axes or rows + summed != x_axes or output != rows + kept:
        return jnp.einsum(equation, x, kernel)
    matrix = jax.lax.optimization_barrier(kernel.reshape(math.prod(kernel.shape[: len(summed)]), -1))
    return _rows_product(x.reshape(-1, matrix.shape[0]), matrix, repeats).reshape(*x.shape[: len(rows)], *kernel.shape[len(summed) :])


def _rows_product(x, matrix, repeats: bool):
    """x [R,K] @ matrix [K,N] on CPU.

    For more than one row XLA's and YNNPACK's products first lay the matrix out anew, which takes longer than to multiply a few rows by it.
    So a few rows of a device go through a small matrix, which a cache holds, one after the other, and through a large one as sums.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = sizes.get("data", 1)
    rows = len(x) // parts
    if len(x) % parts or rows < 2 or any(sizes[axis] > 1 for axis in sizes if axis != "data"):
        return x @ matrix
    if rows <= FEWER and matrix.size <= SMALL:
        x = x.reshape(parts, rows, -1)
        return jnp.stack([x[:, i] @ matrix for i in range(rows)], axis=1).reshape(-1, matrix.shape[1])
    if rows > FEW or not repeats:
        return x @ matrix
    if parts == 1:
        return _sums_of_products(x, matrix)
    return jax.shard_map(_sums_of_products, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})(x, matrix)


def _sums_of_products(x, matrix):
    """x [R,K] @ matrix [K,N] as sums over K, the rows innermost: the matrix is read once, as it lies in memory when transposed.

    The products with ones on the diagonal are there to write their results. Without them XLA computes x anew for each of the sums, and the
    sums in the order of the result, for which it reads the matrix once a row.
    """
    same = jnp.eye(len(x), dtype=x.dtype)
    sums = jnp.sum(in_memory(same @ x) * in_memory(matrix.T)[:, None], axis=-1)  # [N,R]
    return jnp.einsum("qr,nr->qn", same, in_memory(sums))


def add_bias(y, bias):
    """y [...,*] + bias [*], the last axes of y.

    On CPU written as a product with ones, so that the bias's gradient is one too: XLA's own sum over so many rows runs on one core, and
    computes what it sums anew for each of the numbers.
    """
    if not on_cpu():
        return y + bias
    ones = jnp.ones((y.size // bias.size, 1), y.dtype)
    return y + (ones @ bias.reshape(1, -1)).reshape(y.shape)


class Linear(nn.Module):
    """A matrix product written as an einsum, e.g. `Linear("btd,dnh->btnh", (D, N, H))`; torch.nn.Linear with its axes named.

    `shape` is the kernel's; the bias, if any, has the kernel's axes that appear in the output. `repeats`: see `product`.
    """

    equation: str
    shape: tuple[int, ...]
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    std: float | None = None  # of fresh weights; None keeps the scale of the input
    repeats: bool = False

    @nn.compact
    def __call__(self, x):
        inputs, output = self.equation.split("->")
        axes = inputs.split(",")[1]
        sizes = dict(zip(axes, self.shape, strict=True))
        fan_in = math.prod(sizes[axis] for axis in axes if axis not in output)
        kernel = self.param("kernel", nn.initializers.normal(fan_in**-0.5 if self.std is None else self.std), self.shape)
        y = product(self.equation, x.astype(self.dtype), kernel.astype(self.dtype), self.repeats)
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
    """positions [B,T] -> (cos, sin), each [B,T,H/2], f32. Frequencies theta^(-2i/H), as Qwen3RotaryEmbedding."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x, angles):
    """x [B,T,N,H], angles from `rotary_angles`; rotates the two halves of H against each other (not interleaved)."""
    cos, sin = (a[:, :, None, :].astype(x.dtype) for a in angles)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def timestep_embedding(t, dim: int = 256):
    """t [B] in (0, 1000] -> [B,dim] f32: cosines first, then sines (diffusers Timesteps, flip_sin_to_cos, shift 0)."""
    half = dim // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _shifted(x, size: int):
    """The size*size views of zero-padded x [B,Y,X,C], row-major over the window. x is padded once, whatever its producer."""
    rows, columns, pad = x.shape[1], x.shape[2], size // 2
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    return [x[:, i : i + rows, j : j + columns] for i in range(size) for j in range(size)]


@jax.custom_vjp
def _depthwise_shift(x, kernel):
    """x [B,Y,X,C] * kernel [k,k,1,C] as a sum of shifted products.

    The gradients are written out, and padded input and output barred from fusing with what surrounds them: left to itself XLA computes the
    producer of x anew for every tap, which takes twice as long, or for the middle one, which reads no padding.
    """
    views = _shifted(x, kernel.shape[0])
    taps = kernel.reshape(-1, kernel.shape[-1])
    return jax.lax.optimization_barrier(sum(view * tap for view, tap in zip(views, taps, strict=True)))


def _depthwise_shift_forward(x, kernel):
    return _depthwise_shift(x, kernel), (x, kernel)


def _depthwise_shift_backward(residuals, g):
    x, kernel, g = jax.lax.optimization_barrier((*residuals, g))
    batch, _, columns, channels = g.shape
    # Over rows in the pass that multiplies, then as a product with ones: XLA's own reduction to so few numbers runs on one core.
    ones = jnp.ones(batch * columns, g.dtype)
    taps = [ones @ jnp.sum(view * g, axis=1).reshape(-1, channels) for view in _shifted(x, kernel.shape[0])]
    return _depthwise_shift(g, kernel[::-1, ::-1]), jnp.stack(taps).reshape(kernel.shape)


_depthwise_shift.defvjp(_depthwise_shift_forward, _depthwise_shift_backward)


def conv2d(x, kernel, stride: int = 1, groups: int = 1, lowering: str | None = None):
    """x [B,Y,X,C] * kernel [k,k,C/groups,C'] -> [B,Y/stride,X/stride,C'], zero padding k//2: torch conv2d with odd k.

    `lowering` of a depth-wise kernel is "conv" (XLA's convolution) or "shift" (a sum over shifted views); both give the same values
    up to rounding. The default is the faster one: "shift" on CPU, where XLA's depth-wise convolution takes over ten times as long.
    """
    size, _, per_group, out = kernel.shape
    depthwise = per_group == 1 and groups == x.shape[-1] == out
    if size == 1 and groups == 1 and stride == 1:
        return product("byxc,cd->byxd", x, kernel[0, 0])
    if size == 1 and stride == 1:
        # Groups first, by copies that move whole groups: XLA's CPU backend would lay the pixels innermost.
        x = in_memory(jnp.moveaxis(x.reshape(*x.shape[:-1], groups, per_group), -2, 0))
        y = in_memory(jnp.einsum("gbyxc,cgd->gbyxd", x, kernel[0, 0].reshape(per_group, groups, out // groups)))
        return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:4], out)
    if depthwise and stride == 1 and (lowering or ("shift" if on_cpu() else "conv")) == "shift":
        return _depthwise_shift(x, kernel)
    pad = size // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)), feature_group_count=groups, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# Which of two neighbouring rows r-1+i and r+i the three taps of row 2r+i read, when every row stands twice: [i, neighbour, tap].
TWICE = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


def conv2d_of_doubled(x, kernel):
    """x [B,Y,X,C], every pixel repeated to 2x2, * kernel [3,3,C,D] with zero padding -> [B,2Y,2X,D].

    The repeated pixels are never made: taps that read the same one are added first, which leaves four of nine. One convolution with a
    window of 2x2 has the results of all four places in a doubled pixel side by side, each to be cut out at its own offset.
    """
    rows, columns, features = *x.shape[1:3], kernel.shape[-1]
    folded = jnp.einsum("iak,jbl,klcd->abcijd", TWICE, TWICE, kernel, precision="highest")  # sums of taps, not to be rounded on the way
    folded = folded.reshape(2, 2, x.shape[-1], -1).astype(x.dtype)
    y = jax.lax.conv_general_dilated(x, folded, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = y.reshape(*y.shape[:3], 2, 2, features)
    places = [jnp.stack([y[:, i : i + rows, j : j + columns, i, j] for j in (0, 1)], axis=3) for i in (0, 1)]
    return jnp.stack(places, axis=2).reshape(-1, 2 * rows, 2 * columns, features)


class Conv2d(nn.Module):
    """torch.nn.Conv2d with odd kernel and padding k//2, channels last; `doubled`: of the input with every pixel repeated to 2x2."""

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
        kernel = self.param("kernel", fan_in_normal(k * k * per_group), (k, k, per_group, self.features))
        x = x.astype(self.dtype)
        y = conv2d_of_doubled(x, kernel) if self.doubled else conv2d(x, kernel.astype(self.dtype), self.stride, self.groups)
        if self.use_bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype))
        return y
