"""Reinforcement of the diffusion part as pure functions: where velocities are compared, and the
loss there (docs/model.md §7.5).

A method says how images are drawn, at which K noise levels of each of the B images velocities are
compared ("points": arrays [K,B,...]), and what the loss of one level is, given three velocities
[B,Y,X,C] of the same points: the trained one's, that of the policy which drew the images, and that
of the first one. All are without guidance, all in f32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from blip3o_jax.sample import flow, stochastic
from blip3o_jax.train.sections import DiffusionRlConfig

Points = dict[str, Array]
MOST = 5.0  # advantages beyond are cut, where a method cuts them

fixed = jax.lax.stop_gradient


@dataclass(frozen=True)
class Method:
    """How images are drawn, and the loss; `cfg` is the run's DiffusionRlConfig."""

    # Whether images are drawn by stochastic steps, of which the batch then holds the "path"; else
    # by Euler's, and the batch holds their latents "x0".
    stochastic: bool
    # (cfg, batch, levels of the sampler [steps + 1], key) -> points
    points: Callable[[DiffusionRlConfig, dict, Array, Array], Points]
    # (cfg, velocity, old, reference, a level's points, advantages [B]) -> (losses [B], metrics)
    loss: Callable[..., tuple[Array, dict[str, Array]]]


def mean(x: Array) -> Array:
    """Of each sample, [B]."""
    return jnp.mean(x, axis=(1, 2, 3))


def noisy(x0: Array, sigma: Array, key: Array) -> Points:
    """x0 [B,Y,X,C] with fresh noise at levels sigma [K,B]."""
    noise = jax.random.normal(key, (*sigma.shape, *x0.shape[1:]))
    x = jax.vmap(flow.add_noise, (None, 0, 0))(x0, noise, sigma)
    clean = jnp.broadcast_to(x0, noise.shape)
    return {"x": x, "sigma": sigma, "x0": clean, "noise": noise}


def drawn_steps(key: Array, count: int, steps: int, batch: int) -> Array:
    """`count` different ones of the first `steps` steps for each sample, [count,B]."""
    order = jnp.argsort(jax.random.uniform(key, (steps, batch)), axis=0)
    return order[:count]


def ram_points(cfg: DiffusionRlConfig, batch: dict, schedule: Array, key: Array) -> Points:
    """More of the high levels: their density is proportional to sigma."""
    level_key, noise_key = jax.random.split(key)
    shape = cfg.num_train_timesteps, len(batch["x0"])
    # Of 1 - u in (0, 1]: no level is 0.
    sigma = jnp.sqrt(1 - jax.random.uniform(level_key, shape))
    return noisy(batch["x0"], sigma, noise_key)


def ram_loss(
    cfg: DiffusionRlConfig,
    velocity: Array,
    old: Array,
    reference: Array,
    point: Points,
    advantages: Array,
) -> tuple[Array, dict[str, Array]]:
    """Reinforce Adjoint Matching (arXiv 2605.10759): the velocity is regressed to the first
    policy's, plus a share of what the drawn images say beyond the policy that drew them."""
    step = cfg.strength * flow.per_sample(advantages)
    target = reference + step * (flow.velocity_target(point["x0"], point["noise"]) - old)
    return mean(jnp.square(velocity - fixed(target))), {}


def nft_points(cfg: DiffusionRlConfig, batch: dict, schedule: Array, key: Array) -> Points:
    """Levels that the sampler went through, but its last."""
    level_key, noise_key = jax.random.split(key)
    x0 = batch["x0"]
    steps = drawn_steps(level_key, cfg.num_train_timesteps, len(schedule) - 2, len(x0))
    return noisy(x0, schedule[steps], noise_key)


def nft_loss(
    cfg: DiffusionRlConfig,
    velocity: Array,
    old: Array,
    reference: Array,
    point: Points,
    advantages: Array,
) -> tuple[Array, dict[str, Array]]:
    """DiffusionNFT (arXiv 2509.16117): a mixture with the old velocity explains good images, and
    its mirror image bad ones."""
    share = jnp.clip(advantages / MOST / 2 + 0.5, 0, 1)
    old, b = fixed(old), cfg.mix
    sigma = flow.per_sample(point["sigma"])

    def error(mixed: Array) -> Array:
        difference = point["x"] - sigma * mixed - point["x0"]
        weight = jnp.maximum(fixed(mean(jnp.abs(difference))), 1e-5)
        return mean(jnp.square(difference)) / weight

    good = error(b * velocity + (1 - b) * old)
    bad = error((1 + b) * old - b * velocity)
    return MOST * (share * good + (1 - share) * bad) / b, {}


def path_points(cfg: DiffusionRlConfig, batch: dict, schedule: Array, key: Array) -> Points:
    """Steps that were taken, but the last, which "cps" takes without noise."""
    path = batch["path"]
    samples = jnp.arange(path.shape[1])
    steps = drawn_steps(key, cfg.num_train_timesteps, len(schedule) - 2, len(samples))
    return {
        "x": path[steps, samples],
        "next": path[steps + 1, samples],
        "sigma": schedule[steps],
        "next_sigma": schedule[steps + 1],
    }


def flow_grpo_loss(
    cfg: DiffusionRlConfig,
    velocity: Array,
    old: Array,
    reference: Array,
    point: Points,
    advantages: Array,
) -> tuple[Array, dict[str, Array]]:
    """Flow-GRPO (arXiv 2505.05470): the clipped policy loss, an action being a step of the
    sampler."""

    def logprob(velocity: Array) -> Array:
        levels = point["sigma"], point["next_sigma"]
        moments = stochastic.transition(cfg.sampler, cfg.noise_level, point["x"], velocity, *levels)
        return stochastic.logprob(cfg.sampler, point["next"], *moments)

    ratio = jnp.exp(logprob(velocity) - logprob(fixed(old)))
    gains = jnp.clip(advantages, -MOST, MOST)
    clipped = jnp.clip(ratio, 1 - cfg.epsilon, 1 + cfg.epsilon)
    outside = (jnp.abs(ratio - 1) > cfg.epsilon).astype(jnp.float32)
    return -jnp.minimum(ratio * gains, clipped * gains), {"ratio": ratio, "clipped": outside}


METHODS = {
    "ram": Method(stochastic=False, points=ram_points, loss=ram_loss),
    "nft": Method(stochastic=False, points=nft_points, loss=nft_loss),
    "flow_grpo": Method(stochastic=True, points=path_points, loss=flow_grpo_loss),
}


def loss(
    cfg: DiffusionRlConfig,
    velocity: Array,
    old: Array,
    reference: Array,
    point: Points,
    advantages: Array,
    mask: Array,
    count: Array,
) -> tuple[Array, dict[str, Array]]:
    """The method's loss at one level and what holds the velocity near the first one, the sum over
    the samples where the mask [B] is 1 by their `count` in all -> (loss, metrics).

    The divergence is the velocity's mean squared distance (UniGRPO, arXiv 2603.23500), whatever the
    level; the norm's excess over the first one's is punished alone (NormGuard, arXiv 2606.27771).
    """
    reference = fixed(reference)
    losses, metrics = METHODS[cfg.method].loss(cfg, velocity, old, reference, point, advantages)
    divergence = mean(jnp.square(velocity - reference))
    norms = [jnp.sqrt(mean(jnp.square(x)) + 1e-12) for x in (velocity, reference)]
    ratio = norms[0] / norms[1]
    losses = losses + cfg.beta * divergence + cfg.norm_penalty * jnp.maximum(ratio - 1, 0)
    metrics = {"kl": divergence, "norm_ratio": ratio, **metrics, "loss": losses}
    metrics = {name: jnp.sum(x * mask) / count for name, x in metrics.items()}
    return metrics["loss"], metrics


def old_decay(cfg: DiffusionRlConfig, step: Array) -> Array:
    """Share that the average of past policies keeps after `step` steps: nothing at first, so that
    it follows fast, and more and more."""
    return jnp.minimum(cfg.old_ramp * step, cfg.old_decay)
