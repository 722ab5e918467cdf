"""Which steps are skipped: decided on the device, from counters in the training state."""

from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.train.sections import GuardConfig

MEMORY = 0.98  # of the running average of the gradient's norm
SETTLED = 50  # steps before that average says what is usual


def init() -> dict:
    """Counters of a run: `skipped` steps so far, those `in_a_row` now, and the gradient norm's
    running average over the others."""
    return {
        "skipped": jnp.zeros((), jnp.int32),
        "in_a_row": jnp.zeros((), jnp.int32),
        "usual": jnp.zeros(()),
    }


def judge(
    cfg: GuardConfig, counters: dict, step: jax.Array, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, dict]:
    """(whether the step counts, the counters after it): it does not when loss or gradient norm is
    not finite, or the norm a spike.

    `step` is the number of steps before this one; all are scalars.
    """
    taken = step - counters["skipped"]
    usual = counters["usual"]
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if cfg.spike:
        good &= (taken < SETTLED) | (norm <= cfg.spike * usual)
    # Skipped steps do not change what is usual.
    average = jnp.where(taken == 0, norm, MEMORY * usual + (1 - MEMORY) * norm)
    return good, {
        "skipped": counters["skipped"] + ~good,
        "in_a_row": jnp.where(good, 0, counters["in_a_row"] + 1),
        "usual": jnp.where(good, average, usual),
    }


def keep(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step counts, else `old`: two trees of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
