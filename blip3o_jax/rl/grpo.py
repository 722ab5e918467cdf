"""GRPO as pure functions: advantages of rewards, and the loss of log-probabilities (docs/model.md
§7.1; the formulas of TRL's GRPOTrainer).

A group is the G images of one prompt; a batch of B = prompts x G rows holds group after group, each
row with n image tokens.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.train.sections import GrpoConfig

EPS = 1e-4  # beside standard deviations
NOTHING = 1e-8  # an advantage below this is none


def advantages(
    rewards: np.ndarray, weights: Sequence[float], cfg: GrpoConfig
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rewards [B,R] of R kinds, NaN where one does not apply, and a weight of each kind -> (f32
    [B], {"zero_spread", "saturated"}: bool [B], the rows of groups to leave out).

    Standard deviations are unbiased. By GDPO's order (arXiv 2601.05242) each kind is normalised in
    its group before the sum, and the sum in the batch. A row without any reward has advantage 0.
    """
    rewards = np.asarray(rewards, np.float64)
    groups = rewards.reshape(-1, cfg.num_generations, len(weights))
    nothing, total = np.isnan(groups).all(axis=2), weighted(groups, weights)
    mean, std = _moments(total, axis=1)
    if cfg.multi_objective_aggregation == "normalize_then_sum":
        centers, spreads = _moments(groups, axis=1)
        summed = np.nansum((groups - centers) / (spreads + EPS) * weights, axis=2)
        summed = np.where(nothing, np.nan, summed)
        center, spread = _moments(summed)
        result = (summed - center) / (spread + EPS)
    else:
        scales = {"group": std + EPS, "batch": _moments(total)[1] + EPS, "none": 1.0}
        result = (total - mean) / scales[cfg.scale_rewards]
    result = np.nan_to_num(result, nan=0.0)

    # Groups whose images are all equally good, or almost all good.
    flat = np.abs(result).max(axis=1, keepdims=True) < NOTHING
    done = np.zeros_like(flat)
    if cfg.saturated_mean is not None:
        done = (mean > cfg.saturated_mean) & (std < cfg.saturated_std) & ~flat
    dropped = {"zero_spread": flat, "saturated": done}
    rows = {name: np.broadcast_to(x, result.shape).ravel() for name, x in dropped.items()}
    return result.ravel().astype(np.float32), rows


def weighted(rewards: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The weighted sum [...] of the rewards [...,R] that are not NaN; NaN where all are."""
    nothing = np.isnan(rewards).all(axis=-1)
    return np.where(nothing, np.nan, np.nansum(rewards * np.asarray(weights), axis=-1))


def _moments(x: np.ndarray, axis: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased standard deviation along an axis, which is kept, of what is not NaN; 0
    where that is too little."""
    count = np.sum(~np.isnan(x), axis=axis, keepdims=True)
    mean = np.nansum(x, axis=axis, keepdims=True) / np.maximum(count, 1)
    squares = np.nansum((x - mean) ** 2, axis=axis, keepdims=True)
    return mean, np.sqrt(squares / np.maximum(count - 1, 1))


def policy_loss(
    cfg: GrpoConfig,
    logprobs: jax.Array,
    old: jax.Array,
    reference: jax.Array | None,
    advantages: jax.Array,
    mask: jax.Array,
    entropies: jax.Array,
    whole: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss + beta x divergence from the reference -> (loss, metrics).

    logprobs, old, reference (unless beta is 0), mask and entropies [B,n]; advantages [B]. The
    divergence is the estimate exp(d) - d - 1 with d = reference - logprobs. `whole` is the mask of
    all rows of the step, those of other micro-batches as well: loss and metrics are these rows'
    shares.
    """
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    gains, count = advantages[:, None], jnp.maximum(jnp.sum(whole), 1.0)
    log_ratio = logprobs - old
    if cfg.importance_sampling_level == "sequence":
        log_ratio = _row_mean(log_ratio, mask)[:, None]
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - cfg.epsilon, 1 + high)
    # The smaller of both: a gain counts up to the clip, a loss beyond it too.
    losses = -jnp.minimum(ratio * gains, clipped * gains) * jnp.ones_like(mask)
    if cfg.top_entropy_quantile < 1:
        losses = losses * _least_certain(entropies, mask, cfg.top_entropy_quantile)

    metrics = {}
    if cfg.beta:
        difference = reference - logprobs
        divergence = jnp.exp(difference) - difference - 1
        losses = losses + cfg.beta * divergence
        metrics["kl"] = jnp.sum(divergence * mask) / count
    loss = aggregate(cfg.loss_type, losses, mask, whole)
    for name, outside in {
        "clipped_low": (ratio < 1 - cfg.epsilon) & (gains < 0),
        "clipped_high": (ratio > 1 + high) & (gains > 0),
    }.items():
        metrics[name] = jnp.sum(outside * mask) / count
    return loss, {"loss": loss, "entropy": jnp.sum(entropies * mask) / count, **metrics}


def aggregate(loss_type: str, losses: jax.Array, mask: jax.Array, whole: jax.Array) -> jax.Array:
    """Losses of tokens [B,n] -> their sum where the mask is 1, divided by the number of those
    tokens ("bnpo" and "dapo"), by B n ("dr_grpo"), or first row by row ("grpo"); numbers of tokens
    and rows are those of the mask of the whole batch."""
    if loss_type == "grpo":
        return jnp.sum(_row_mean(losses, mask)) / len(whole)
    count = whole.size if loss_type == "dr_grpo" else jnp.maximum(jnp.sum(whole), 1.0)
    return jnp.sum(losses * mask) / count


def _row_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean [B] of x [B,n] where the mask is 1; 0 in rows without any."""
    return jnp.sum(x * mask, axis=1) / jnp.maximum(jnp.sum(mask, axis=1), 1.0)


def _least_certain(entropies: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """Where the entropy is among the largest `share` of those where the mask is 1."""
    entropies = jax.lax.stop_gradient(entropies)
    least = jnp.nanquantile(jnp.where(mask > 0, entropies, jnp.nan), 1 - share)
    return (entropies >= least) & (mask > 0)
