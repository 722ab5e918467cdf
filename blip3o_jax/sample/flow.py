"""Rectified flow: x_sigma = (1 - sigma) x0 + sigma noise, whose velocity noise - x0 the diffusion
model learns (docs/model.md §5).

diffusers' FlowMatchEulerDiscreteScheduler as pure functions, all f32. Latents are [B,Y,X,C], a
sigma lies in [0,1], a timestep is 1000 sigma. A `shift` above 1, which may be traced, moves sigmas
towards 1; BLIP3o-NEXT trains and samples with 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_TRAIN_TIMESTEPS = 1000

Scalar = float | Array


def _shifted(sigma: np.ndarray, shift: Scalar) -> Array:
    return jnp.asarray(shift * sigma / (1 + (shift - 1) * sigma), jnp.float32)


def training_sigmas(shift: Scalar = 1.0) -> Array:
    """The 1000 noise levels of training, from 1 down."""
    levels = np.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=np.float32)
    return _shifted(levels / np.float32(NUM_TRAIN_TIMESTEPS), shift)


def sigmas(num_steps: int, shift: Scalar = 1.0) -> Array:
    """The noise levels [num_steps + 1] of sampling: num_steps of them from 1 to 1/num_steps before
    the shift, then 0."""
    levels = np.linspace(1, 1 / num_steps, num_steps).astype(np.float32)
    return jnp.append(_shifted(levels, shift), 0.0)


def _per_sample(x: Scalar) -> Array:
    """[B] or a scalar, broadcastable to latents."""
    return jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 1, 1, 1))


def sample_timesteps(key: Array, batch: int, shift: Scalar = 1.0) -> tuple[Array, Array]:
    """Noise levels for training, uniform over the table: (t [B], sigma [B])."""
    sigma = training_sigmas(shift)[jax.random.randint(key, (batch,), 0, NUM_TRAIN_TIMESTEPS)]
    return sigma * NUM_TRAIN_TIMESTEPS, sigma


def add_noise(x0: Array, noise: Array, sigma: Array) -> Array:
    """x0 and noise [B,Y,X,C], sigma [B] -> what the model sees."""
    sigma = _per_sample(sigma)
    return (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def velocity_target(x0: Array, noise: Array) -> Array:
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def clean_estimate(x: Array, velocity: Array, sigma: Scalar) -> Array:
    """The latents x0 that x at noise level sigma would become if the velocity stayed as it is."""
    return x - sigma * velocity


def flow_loss(velocity: Array, x0: Array, noise: Array) -> Array:
    """Mean squared error of the model's velocity per sample, [B]."""
    error = velocity.astype(jnp.float32) - velocity_target(x0, noise)
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def drop_condition(hidden: Array, dropped: Array) -> Array:
    """Zeroes the samples of hidden [B,T,D] that are `dropped` [B], before the connector, as
    generation does: the model also learns to go without a condition."""
    return jnp.where(dropped[:, None, None], 0, hidden)


def guided(unconditional: Array, conditional: Array, guidance_scale: Scalar) -> Array:
    """Classifier-free guidance, by a scalar or [B]: 1 gives `conditional`, more goes beyond."""
    return unconditional + _per_sample(guidance_scale) * (conditional - unconditional)


def pairs(x: Array, y: Array) -> Array:
    """x and y [B,...] alternating, [2B,...]: both rows of a sample stay on its device when the
    batch is sharded."""
    return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])


def euler_sample(
    velocity_fn: Callable[[Array, Array], Array],
    noise: Array,
    schedule: Array,
    guidance_scale: Scalar | None = None,
    trajectory: bool = False,
):
    """Integrates from noise [B,Y,X,C] at schedule[0] to latents at schedule[-1], in f32;
    `velocity_fn(x, t [B]) -> velocity`.

    With a guidance_scale, a scalar or [B], `velocity_fn` is given the 2B rows of `pairs(x, x)`: a
    sample's first goes without condition, its second with it; with None the samples alone. With
    `trajectory` the result is (latents, (latents before each step, guided velocities of the
    steps)), the latter two [steps,B,Y,X,C].
    """
    twice = guidance_scale is not None

    def step(x, levels):
        sigma, next_sigma = levels
        rows = pairs(x, x) if twice else x
        t = jnp.full(rows.shape[:1], NUM_TRAIN_TIMESTEPS * sigma)
        velocity = velocity_fn(rows, t).astype(jnp.float32)
        if twice:
            velocity = velocity.reshape(-1, 2, *velocity.shape[1:])
            velocity = guided(velocity[:, 0], velocity[:, 1], guidance_scale)
        return x + (next_sigma - sigma) * velocity, (x, velocity) if trajectory else None

    schedule = jnp.asarray(schedule, jnp.float32)
    with jax.named_scope("euler_sample"):
        x, steps = jax.lax.scan(step, noise.astype(jnp.float32), (schedule[:-1], schedule[1:]))
    return (x, steps) if trajectory else x
