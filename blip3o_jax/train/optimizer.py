"""AdamW and the learning-rate schedule (docs/model.md §6.2).

The arithmetic of `optax.clip_by_global_norm` and `optax.adamw` with its steps apart, so that the
guard decides between moments and update. As one chain with the decision behind it XLA's CPU backend
copies all moments in every step (`steps.advance`).
"""

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.kernels.products import sum_of_squares
from blip3o_jax.train.sections import OptimizerConfig


def norm(tree: dict) -> jax.Array:
    """Root of the sum of all squares, f32."""
    return jnp.sqrt(sum(sum_of_squares(x) for x in jax.tree.leaves(tree)))


def schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then cosine from the peak to the floor at
    `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if cfg.warmup_steps else cfg.learning_rate,
        peak_value=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        decay_steps=num_steps,
        end_value=cfg.final_learning_rate,
    )


def init(params: dict) -> optax.ScaleByAdamState:
    """Moments of zero, after no step."""
    return optax.scale_by_adam().init(params)


def moments(
    cfg: OptimizerConfig, grads: dict, whole: jax.Array, before: optax.ScaleByAdamState
) -> optax.ScaleByAdamState:
    """Adam's moments with one more step's gradients, which are first clipped to `clip_norm`;
    `whole` is their norm."""
    factor = jnp.minimum(1.0, cfg.clip_norm / whole) if cfg.clip_norm else 1.0
    clipped = jax.tree.map(lambda g: g * factor, grads)
    mu = optax.tree.update_moment(clipped, before.mu, cfg.b1, 1)
    nu = optax.tree.update_moment(clipped, before.nu, cfg.b2, 2)
    return optax.ScaleByAdamState(before.count + 1, mu, nu)


def updates(
    cfg: OptimizerConfig, num_steps: int, after: optax.ScaleByAdamState, params: dict
) -> dict:
    """What AdamW adds to `params` once the step's gradients are in the moments: `optax.adamw`'s
    update. A function of the moments alone, so that its size can be computed later.

    Weight decay spares vectors (norms and biases). A part's factor scales its whole update.
    """
    # Both moments start at zero, which the division by 1 - b^count makes up for.
    count = jnp.maximum(after.count, 1)
    rate = schedule(cfg, num_steps)(count - 1)
    first, second = 1 - cfg.b1**count, 1 - cfg.b2**count

    def update(path: tuple, param: jax.Array, mu: jax.Array, nu: jax.Array) -> jax.Array:
        step = mu / first / (jnp.sqrt(nu / second) + cfg.eps)
        if path[-1].key in ("kernel", "embedding"):
            step += cfg.weight_decay * param
        return -rate * cfg.part_learning_rates.get(path[0].key, 1.0) * step

    return jax.tree_util.tree_map_with_path(update, params, after.mu, after.nu)


def update_ema(ema: dict, params: dict, step: jax.Array, decay: float) -> dict:
    """Average of the weights; early on the decay is at most (1 + step) / (10 + step), so that it
    forgets the start."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
