"""Rectified flow: x_sigma = (1 - sigma) x0 + sigma noise, whose velocity noise - x0 the diffusion
model learns (docs/model.md §5).

diffusers' FlowMatchEulerDiscreteScheduler as pure functions, all f32. Latents are [B,Y,X,C], a
sigma lies in [0,1], a timestep is 1000 sigma. A `shift` above 1, which may be traced, moves sigmas
towards 1; BLIP3o-NEXT trains and samples with 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

NUM_TRAIN_TIMESTEPS = 1000


def _shifted(sigma: np.ndarray, shift):
    return jnp.asarray(shift * sigma / (1 + (shift - 1) * sigma), jnp.float32)


def training_sigmas(shift=1.0):
    """The 1000 noise levels of training, from 1 down."""
    return _shifted(
        np.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=np.float32) / np.float32(NUM_TRAIN_TIMESTEPS),
        shift,
    )


def sigmas(num_steps: int, shift=1.0):
    """The noise levels [num_steps + 1] of sampling: num_steps of them from 1 to 1/num_steps before
    the shift, then 0."""
    return jnp.append(
        _shifted(np.linspace(1, 1 / num_steps, num_steps).astype(np.float32), shift), 0.0
    )


def _per_sample(x):
    """[B] or a scalar, broadcastable to latents."""
    return jnp.reshape(jnp.asarray(x, jnp.float32), (-1, 1, 1, 1))


def sample_timesteps(key, batch: int, shift=1.0):
    """Noise levels for training, uniform over the table: (t [B], sigma [B])."""
    sigma = training_sigmas(shift)[jax.random.randint(key, (batch,), 0, NUM_TRAIN_TIMESTEPS)]
    return sigma * NUM_TRAIN_TIMESTEPS, sigma


def add_noise(x0, noise, sigma):
    """x0 and noise [B,Y,X,C], sigma [B] -> what the model sees."""
    sigma = _per_sample(sigma)
    return (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def velocity_target(x0, noise):
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def flow_loss(velocity, x0, noise):
    """Mean squared error of the model's velocity per sample, [B]."""
    return jnp.mean(
        jnp.square(velocity.astype(jnp.float32) - velocity_target(x0, noise)), axis=(1, 2, 3)
    )


def drop_condition(hidden, dropped):
    """Zeroes the samples of hidden [B,T,D] that are `dropped` [B], so that the model also learns to
    go without a condition.

    For the states before the connector: generation feeds zeros through the connector too.
    """
    return jnp.where(dropped[:, None, None], 0, hidden)


def guided(unconditional, conditional, guidance_scale):
    """Classifier-free guidance: 1 gives `conditional`, more goes beyond it.

    `guidance_scale` is a scalar or [B].
    """
    return unconditional + _per_sample(guidance_scale) * (conditional - unconditional)


def pairs(x, y):
    """x and y [B,...] in turns, [2B,...]: both rows of a sample stay on its device when the batch
    is cut."""
    return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])


def euler_sample(velocity_fn, noise, schedule, guidance_scale=None):
    """Integrates from noise [B,Y,X,C] at schedule[0] to latents at schedule[-1], in f32;
    `velocity_fn(x, t [B]) -> velocity`.

    With a guidance_scale, a scalar or [B] that may be traced, `velocity_fn` is given the 2B rows of
    `pairs(x, x)`, a sample's first to be seen without condition, its second with it. With None it
    is given the samples once, at half the work.
    """
    twice = guidance_scale is not None

    def step(x, levels):
        sigma, next_sigma = levels
        rows = pairs(x, x) if twice else x
        velocity = velocity_fn(rows, jnp.full(rows.shape[:1], NUM_TRAIN_TIMESTEPS * sigma)).astype(
            jnp.float32
        )
        if twice:
            velocity = velocity.reshape(-1, 2, *velocity.shape[1:])
            velocity = guided(velocity[:, 0], velocity[:, 1], guidance_scale)
        return x + (next_sigma - sigma) * velocity, None

    schedule = jnp.asarray(schedule, jnp.float32)
    with jax.named_scope("euler_sample"):
        return jax.lax.scan(step, noise.astype(jnp.float32), (schedule[:-1], schedule[1:]))[0]
