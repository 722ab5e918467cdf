"""The optax chain and the learning-rate schedule (spec S6.2)."""

import jax
import jax.numpy as jnp
import optax

from blip3o_jax.models.layers import on_cpu
from blip3o_jax.train.config import OptimizerConfig


def norm(tree):
    """Root of the sum of all squares, f32. On CPU the layers of a stack are added first, where squaring and adding are one pass: XLA cuts
    a sum of more than 32 numbers into windows, and writes the squares before it."""

    def squares(x):
        found = jnp.square(x.astype(jnp.float32))
        return jax.lax.optimization_barrier(jnp.sum(found, axis=0)) if on_cpu() and x.ndim > 1 else found

    return jnp.sqrt(sum(jnp.sum(squares(x)) for x in jax.tree.leaves(tree)))


def clip_by_norm(largest: float) -> optax.GradientTransformation:
    """Gradients times min(1, largest / their norm). One factor for all, where `optax.clip_by_global_norm` divides every number, which XLA
    would rather keep in memory than compute for both moments."""

    def clip(grads, _):
        factor = jnp.minimum(1.0, largest / norm(grads))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(clip)


def schedule(cfg: OptimizerConfig, num_steps: int):
    """Step -> learning rate: linear warm-up from 0, then cosine from the peak to the floor at `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if cfg.warmup_steps else cfg.learning_rate,
        peak_value=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        decay_steps=num_steps,
        end_value=cfg.final_learning_rate,
    )


def optimizer(cfg: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weight decay spares vectors (norms and biases). A part's factor scales its whole update."""
    chain = [clip_by_norm(cfg.clip_norm)] if cfg.clip_norm else []
    chain.append(
        optax.adamw(
            schedule(cfg, num_steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params),
        )
    )
    if factors := cfg.part_learning_rates:
        scale = optax.tree.scale
        chain.append(optax.stateless(lambda updates, _: {part: scale(factors.get(part, 1.0), tree) for part, tree in updates.items()}))
    return optax.chain(*chain) if len(chain) > 1 else chain[0]


def update_ema(ema, params, step, decay: float):
    """Average of the weights; early on the decay is at most (1 + step) / (10 + step), so that it forgets the start."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
