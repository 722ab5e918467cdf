"""Rectified flow: x_sigma = (1 - sigma) x0 + sigma noise, whose velocity noise - x0 the diffusion
model learns (docs/model.md §5).

diffusers' FlowMatchEulerDiscreteScheduler as pure functions, all f32. Latents are [B,Y,X,C], a
sigma lies in [0,1], a timestep is 1000 sigma. A `shift` above 1, which may be traced, moves sigmas
towards 1; BLIP3o-NEXT trains and samples with 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_TRAIN_TIMESTEPS = 1000

Scalar = float | Array
# (x [B,Y,X,C], sigma, next sigma) -> the velocity at x, or the mean one to the next level
Velocity = Callable[[Array, Array, Array], Array]
# (x, velocity, sigma, next sigma, index of the step) -> (x at the next sigma, what is kept)
Step = Callable[[Array, Array, Array, Array, Array], tuple[Array, Any]]


def shifted(sigma: np.ndarray | Array, shift: Scalar) -> Array:
    """Noise levels moved towards 1, where 0 and 1 stay."""
    return jnp.asarray(shift * sigma / (1 + (shift - 1) * sigma), jnp.float32)


def training_sigmas(shift: Scalar = 1.0) -> Array:
    """The 1000 noise levels of training, from 1 down."""
    levels = np.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=np.float32)
    return shifted(levels / np.float32(NUM_TRAIN_TIMESTEPS), shift)


def sigmas(num_steps: int, shift: Scalar = 1.0) -> Array:
    """The noise levels [num_steps + 1] of sampling: num_steps of them from 1 to 1/num_steps before
    the shift, then 0."""
    return jnp.append(shifted(_evenly(num_steps), shift), 0.0)


def levels(num_steps: int, length: int) -> np.ndarray:
    """`sigmas` without a shift, f32 [length], with as many zeros behind as are missing."""
    return np.pad(_evenly(num_steps), (0, length - num_steps))


def _evenly(num_steps: int) -> np.ndarray:
    return np.linspace(1, 1 / num_steps, num_steps).astype(np.float32)


def per_sample(x: Scalar) -> Array:
    """[B] or a scalar, broadcastable to latents."""
    return jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 1, 1, 1))


def sample_timesteps(key: Array, batch: int, shift: Scalar = 1.0) -> tuple[Array, Array]:
    """Noise levels for training, uniform over the table: (t [B], sigma [B])."""
    sigma = training_sigmas(shift)[jax.random.randint(key, (batch,), 0, NUM_TRAIN_TIMESTEPS)]
    return sigma * NUM_TRAIN_TIMESTEPS, sigma


def add_noise(x0: Array, noise: Array, sigma: Array) -> Array:
    """x0 and noise [B,Y,X,C], sigma [B] -> what the model sees."""
    sigma = per_sample(sigma)
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


def alternating(*arrays: Array) -> Array:
    """R arrays [B,...] -> [B*R,...], the rows of a sample one after the other: all of them stay on
    its device when the batch is sharded."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])


def guided(
    velocities: Array, scales: tuple[Scalar, ...], renorm_min: Scalar | None = None
) -> Array:
    """Classifier-free guidance over R = 1 + len(scales) velocities [B,R,Y,X,C] of each sample, from
    the one without any condition to the one with all of it -> [B,Y,X,C].

    Each scale, a number or [B], multiplies one condition's difference: 1 adds it as it is, more
    goes beyond. (With text and source InstructPix2Pix's order, arXiv 2211.09800.) With `renorm_min`
    a sample longer than the wholly conditional one is shortened to its norm, but at most by that
    factor (BAGEL, arXiv 2505.14683).
    """
    result = velocities[:, 0]
    for i, scale in enumerate(scales):
        result = result + per_sample(scale) * (velocities[:, i + 1] - velocities[:, i])
    if renorm_min is None:
        return result
    norms = [jnp.sqrt(jnp.sum(x * x, axis=(1, 2, 3))) for x in (velocities[:, -1], result)]
    return result * per_sample(jnp.clip(norms[0] / (norms[1] + 1e-8), renorm_min, 1.0))


def guided_velocity(
    velocity_fn: Callable[[Array, Array], Array],
    scales: tuple[Scalar, ...] = (),
    renorm_min: Scalar | None = None,
) -> Velocity:
    """The velocity that sampling follows, of the model's `velocity_fn(x, t [R*B]) -> velocity`,
    which is given R rows of each sample, `alternating`, for `guided`; without `scales` the samples
    alone."""
    rows = len(scales) + 1

    def velocity(x: Array, sigma: Array, next_sigma: Array) -> Array:
        repeated = alternating(*[x] * rows)
        t = jnp.full(repeated.shape[:1], NUM_TRAIN_TIMESTEPS * sigma)
        every = velocity_fn(repeated, t).astype(jnp.float32)
        return guided(every.reshape(-1, rows, *x.shape[1:]), scales, renorm_min)

    return velocity


def span(
    sigma: Scalar, next_sigma: Scalar, scale: Scalar = 1.0, begin: Scalar = 0.0, end: Scalar = 1.0
) -> Array:
    """What a model of few steps is told of a step, numbers or [B] each -> [B or 1,4]: its length,
    the guidance as a number in [0, 1), and the noise levels between which it guides; see `Sana`."""
    numbers = sigma - next_sigma, 1 - 1 / jnp.asarray(scale, jnp.float32), begin, end
    rows = jnp.broadcast_arrays(*(jnp.ravel(jnp.asarray(x, jnp.float32)) for x in numbers))
    return jnp.stack(rows, axis=-1)


def mean_velocity(
    velocity_fn: Callable[[Array, Array, Array], Array], scale: Scalar = 1.0
) -> Velocity:
    """The velocity that sampling follows of a model of few steps, `velocity_fn(x, t, span)`, one
    forward each; it guides by itself."""

    def velocity(x: Array, sigma: Array, next_sigma: Array) -> Array:
        t = jnp.full(x.shape[:1], NUM_TRAIN_TIMESTEPS * sigma)
        step = jnp.broadcast_to(span(sigma, next_sigma, scale), (len(x), 4))
        return velocity_fn(x, t, step).astype(jnp.float32)

    return velocity


def euler(
    x: Array, velocity: Array, sigma: Scalar, next_sigma: Scalar, index: Scalar
) -> tuple[Array, None]:
    """The step of the ordinary differential equation, which keeps nothing."""
    return x + (next_sigma - sigma) * velocity, None


def integrate(
    velocity: Velocity, x: Array, schedule: Array, step: Step = euler
) -> tuple[Array, Any]:
    """From x [B,Y,X,C] at schedule[0] to (latents at schedule[-1], what the steps kept, stacked
    [steps,...]), in f32."""

    def body(x: Array, levels: tuple) -> tuple[Array, Any]:
        sigma, next_sigma, index = levels
        return step(x, velocity(x, sigma, next_sigma), sigma, next_sigma, index)

    schedule = jnp.asarray(schedule, jnp.float32)
    levels = schedule[:-1], schedule[1:], jnp.arange(len(schedule) - 1)
    with jax.named_scope("integrate"):
        return jax.lax.scan(body, x.astype(jnp.float32), levels)
