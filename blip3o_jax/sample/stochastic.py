"""Steps of the flow that draw noise, and the log-probability of each: what reinforcement learning
of the diffusion part explores with (docs/model.md §7.5).

All samplers have one form. With the estimate e = x + (1 - sigma) v of the noise in x, a step is
Euler's, less `pull` times e, plus `std` times fresh noise. A noise level of 0 is Euler's step, byte
for byte. All in f32; latents are [B,Y,X,C], a sigma is a number or [B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.sample import flow
from blip3o_jax.sample.flow import Scalar


def _diffusion(g: Scalar, sigma: Scalar, next_sigma: Scalar) -> tuple[Array, Array]:
    """Of the stochastic equation whose noise has the strength g."""
    down = sigma - next_sigma
    return g**2 * down / (2 * sigma), g * jnp.sqrt(down)


def _flow_grpo(level: Scalar, sigma: Scalar, next_sigma: Scalar) -> tuple[Array, Array]:
    # The first level, where g would be infinite, takes that of the second.
    below = jnp.where(sigma == 1, next_sigma, sigma)
    return _diffusion(level * jnp.sqrt(sigma / (1 - below)), sigma, next_sigma)


def _cps(level: Scalar, sigma: Scalar, next_sigma: Scalar) -> tuple[Array, Array]:
    angle = level * jnp.pi / 2
    return next_sigma * (1 - jnp.cos(angle)), next_sigma * jnp.sin(angle)


# (noise level, sigma, next sigma) -> (pull, std): Flow-GRPO (arXiv 2505.05470); DanceGRPO (arXiv
# 2505.07818), whose noise is equally strong at all levels; the coefficient-preserving steps, after
# which there is as much noise in x as the next level says, and in the result none.
SAMPLERS: dict[str, Callable[[Scalar, Scalar, Scalar], tuple[Array, Array]]] = {
    "flow_grpo": _flow_grpo,
    "dance": _diffusion,
    "cps": _cps,
}


def transition(
    sampler: str, level: Scalar, x: Array, velocity: Array, sigma: Scalar, next_sigma: Scalar
) -> tuple[Array, Array]:
    """Mean, like x, and standard deviation, broadcastable to it, of x at the next sigma."""
    sigma, next_sigma = flow.per_sample(sigma), flow.per_sample(next_sigma)
    pull, std = SAMPLERS[sampler](level, sigma, next_sigma)
    noise = x + (1 - sigma) * velocity
    return x + (next_sigma - sigma) * velocity - pull * noise, std


def logprob(sampler: str, x: Array, mean: Array, std: Array) -> Array:
    """Log-probability [B] of x, the mean over its numbers; of "cps" without the constants and the
    division by the variance, as it is published."""
    squares = jnp.square(x - mean)
    if sampler != "cps":
        squares = squares / (2 * std**2) + jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi)
    return -jnp.mean(squares, axis=(1, 2, 3))


def step(sampler: str, level: Scalar, keys: Array) -> flow.Step:
    """A step for `flow.integrate` that keeps {"latents" before it, its "logprobs" [B]}, and whose
    noise is drawn with each sample's own of the keys [B]."""

    def take(
        x: Array, velocity: Array, sigma: Array, next_sigma: Array, index: Array
    ) -> tuple[Array, dict[str, Array]]:
        mean, std = transition(sampler, level, x, velocity, sigma, next_sigma)
        drawn = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, index), x.shape[1:]))
        new = mean + std * drawn(keys)
        return new, {"latents": x, "logprobs": logprob(sampler, new, mean, std)}

    return take
