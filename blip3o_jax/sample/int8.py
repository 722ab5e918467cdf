"""Weights of eight bits for sampling: the kernels of Qwen3's and SANA's layers as int8, and beside
each a scale for every output channel, which `layers.Linear` multiplies back when it uses them."""

import functools
import re

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from blip3o_jax.models.blip3o import Params

LARGEST = 127
STACKS = "(qwen3/layers|sana/transformer_blocks)"
# Name of a layer -> the axes of its kernel [L,...] that are summed over.
FIRST = "q_proj k_proj v_proj gate_proj up_proj down_proj to_q to_k to_v conv_inverted conv_point"
SUMMED = dict.fromkeys(FIRST.split(), (1,)) | {"o_proj": (1, 2), "to_out": (1, 2)}
KERNEL = re.compile(rf"{STACKS}/.*\b({'|'.join(SUMMED)})/kernel")


def quantized(params: Params) -> Params:
    """The parameters with these kernels as int8, and a `kernel_scale` of their dtype beside each;
    everything else as it is."""
    leaves = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        leaves[path] = leaf
        if match := KERNEL.fullmatch(path):
            leaves[path], leaves[f"{path}_scale"] = _quantized(leaf, SUMMED[match[2]])
    return unflatten_dict(leaves, sep="/")


@functools.partial(jax.jit, static_argnums=1)
def _quantized(kernel: Array, summed: tuple[int, ...]) -> tuple[Array, Array]:
    """(int8, scale): the largest weight of an output channel becomes 127 or -127."""
    wide = kernel.astype(jnp.float32)
    # A channel of zeros keeps a scale that divides.
    largest = jnp.max(jnp.abs(wide), summed, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1).astype(kernel.dtype)
    # A scale that was rounded down would take the largest beyond 127.
    rounded = jnp.clip(jnp.round(wide / scale), -LARGEST, LARGEST)
    return rounded.astype(jnp.int8), scale
