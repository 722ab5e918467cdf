"""The loss of a diffusion part of few steps: pure functions, as those of `losses`.

MeanFlow (arXiv 2505.13447) with the two changes of its improved form (arXiv 2512.02012): the model
learns the mean velocity u over a step from level t down to r, which obeys v = u + (t - r) du/dt
along the path, and so what is regressed to the known velocity is that sum; and the guidance is an
input, so that sampling needs one forward a step. No teacher, no second network: the velocity at a
level is u over a step of no length.
"""

import dataclasses

import jax
import jax.numpy as jnp

from blip3o_jax.models.blip3o import Blip3o, condition_slice
from blip3o_jax.sample import condition, flow
from blip3o_jax.train import losses, sections
from blip3o_jax.train.losses import Batch, LossAndMetrics

fixed = jax.lax.stop_gradient


def distill_draws(
    model: Blip3o, cfg: sections.DistillConfig, batch: Batch, key: jax.Array
) -> Batch:
    """`dropped` [B], the rows without a condition, and of those `source_dropped` [B]; `noise` of
    the latents; the step's levels `sigma` and `next_sigma` [B], which are equal in
    `instant_share` of the rows; and the guidance, `scale`, `begin` and `end` [B], 1 where there is
    no condition."""
    rows = len(batch["tokens"])
    keys = iter(jax.random.split(key, 9))
    dropped = jax.random.bernoulli(next(keys), cfg.condition_dropout, (rows,))
    normal = cfg.level_mean + cfg.level_std * jax.random.normal(next(keys), (2, rows))
    levels = jnp.sort(jax.nn.sigmoid(normal), axis=0)
    instant = jax.random.bernoulli(next(keys), cfg.instant_share, (rows,))
    # No guidance in a tenth of the rows, and everywhere in half of the others, as `generate` asks
    # for it.
    scale = jax.random.uniform(next(keys), (rows,), minval=1.0, maxval=cfg.max_scale)
    scale = jnp.where(dropped | jax.random.bernoulli(next(keys), 0.1, (rows,)), 1.0, scale)
    everywhere = (scale == 1) | jax.random.bernoulli(next(keys), 0.5, (rows,))
    begin = jnp.where(everywhere, 0.0, jax.random.uniform(next(keys), (rows,), maxval=0.5))
    end = jnp.where(everywhere, 1.0, jax.random.uniform(next(keys), (rows,), minval=0.5))
    return {
        "dropped": dropped,
        "source_dropped": dropped,
        "noise": jax.random.normal(next(keys), losses.latents_shape(model, batch)),
        "sigma": levels[1],
        "next_sigma": jnp.where(instant, levels[1], levels[0]),
        "scale": scale,
        "begin": begin,
        "end": end,
    }


def distill_loss(
    model: Blip3o, cfg: sections.DistillConfig, params: dict, batch: Batch, key: jax.Array
) -> LossAndMetrics:
    """How far u + (t - r) du/dt is from the guided velocity, each row by its own measure."""
    batch = distill_draws(model, cfg, batch, key) | batch
    own = fixed(params)
    # What the transformer's states say, and the latents to be reached.
    _, hidden, sources = losses.read_captions(model, own, batch)
    states = condition_slice(hidden, batch["start"], model.config.num_condition_tokens)
    states = flow.drop_condition(states, batch["dropped"])
    x0 = losses.latents_of(model, own, batch)
    t, r, scale = batch["sigma"], batch["next_sigma"], batch["scale"]
    guidance = scale, batch["begin"], batch["end"]
    x = flow.add_noise(x0, batch["noise"], t)

    def build(params: dict, states: jax.Array, dropped: jax.Array) -> condition.Condition:
        return condition.build(model, params, states, sources, dropped)

    given = build(own, states, batch["source_dropped"])
    nothing = build(own, jnp.zeros_like(states), jnp.ones_like(batch["dropped"]))

    # In f32: a derivative of bfloat16 products is mostly their rounding.
    exact = dataclasses.replace(model, dtype=jnp.float32)

    def u(
        model: Blip3o, params: dict, x: jax.Array, t: jax.Array, r: jax.Array, given: object, *how
    ) -> jax.Array:
        timestep, span = flow.NUM_TRAIN_TIMESTEPS * t, flow.span(t, r, *how)
        velocity = condition.velocity(model, params, x, timestep, given, span)
        return velocity.astype(jnp.float32)

    # The velocity at t: guided by the model itself, where the guidance applies.
    along = u(model, own, x, t, t, given, *guidance)
    without = u(model, own, x, t, t, nothing)
    applies = (batch["begin"] <= t) & (t <= batch["end"])
    share = flow.per_sample(jnp.where(applies, 1 - 1 / scale, 0.0))
    target = flow.velocity_target(x0, batch["noise"]) + share * (along - without)

    # How u changes along the path, as t does and r does not.
    with jax.default_matmul_precision("float32"):
        _, change = jax.jvp(
            lambda x, t: u(exact, own, x, t, r, given, *guidance), (x, t), (along, jnp.ones_like(t))
        )
    change = flow.per_sample(t - r) * change

    trained = u(model, params, x, t, r, build(params, states, batch["source_dropped"]), *guidance)
    error = jnp.mean(jnp.square(trained + fixed(change - target)), axis=(1, 2, 3))
    loss = jnp.mean(error / fixed(error + cfg.softness))
    instant = (t == r).astype(jnp.float32)
    metrics = {
        "loss": loss,
        "error": jnp.mean(error),
        "flow": jnp.sum(error * instant) / jnp.maximum(jnp.sum(instant), 1.0),
        "change": jnp.sqrt(jnp.mean(jnp.square(change))),
        "latent_std": jnp.std(x0),
    }
    return loss, metrics
