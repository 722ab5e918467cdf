"""Matrix products and the sums around them: plain formulas, and on a CPU the forms of cpu.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.kernels import cpu
from blip3o_jax.kernels.platform import on_cpu


def product(equation: str, x: Array, kernel: Array, loop_invariant: bool = False) -> Array:
    """`jnp.einsum(equation, x, kernel)`.

    `loop_invariant`: a loop around this product meets the same kernel each time, with a few rows of
    x. Then a CPU prepares the kernel once, before the loop.
    """
    if on_cpu():
        return cpu.product(equation, x, kernel, loop_invariant)
    return jnp.einsum(equation, x, kernel)


def add_bias(y: Array, bias: Array) -> Array:
    """y [...,*] + bias [*], the last axes of y."""
    return cpu.add_bias(y, bias) if on_cpu() else y + bias


def sum_of_squares(x: Array) -> Array:
    """The sum of all squares, f32."""
    return cpu.sum_of_squares(x) if on_cpu() else jnp.sum(jnp.square(x.astype(jnp.float32)))


def materialized(tree: Any) -> Any:
    """The tree itself. On a CPU its arrays are in memory, in the order of their axes, before
    anything reads them: XLA's CPU backend would fuse and transpose for fewer arrays, also where
    that computes a value many times, on one core, or number by number."""
    return jax.lax.optimization_barrier(tree) if on_cpu() else tree


def unstack(x: Array, axis: int) -> tuple[Array, ...]:
    """The slices of x along an axis, each an array (and its gradient a sum) of its own."""
    return materialized(tuple(jnp.moveaxis(x, axis, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits_product(equation: str, hidden: Array, table: Array) -> Array:
    """`jnp.einsum(equation, hidden, table)` with an f32 result, and gradients by products in the
    inputs' dtype, as in every other layer.

    JAX's own gradients are f32 products: beside bfloat16 twice the memory for the largest array of
    a step, and twice the traffic for the largest gradient.
    """
    return jnp.einsum(equation, hidden, table, preferred_element_type=jnp.float32)


def _logits_forward(equation, hidden, table):
    return logits_product(equation, hidden, table), (hidden, table)


def _logits_backward(equation, inputs, g):
    return jax.vjp(functools.partial(jnp.einsum, equation), *inputs)[1](g.astype(inputs[0].dtype))


logits_product.defvjp(_logits_forward, _logits_backward)
