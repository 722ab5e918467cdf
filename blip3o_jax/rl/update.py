"""One step of reinforcement on the device: the updates that a rollout gives each half of the model
(docs/model.md §7.1, §7.5).

The arrays of a batch stand under the halves that the step trains. A half is updated by its own
gradients, moments and guard; what belongs to the other one stays as it is.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o, Params
from blip3o_jax.rl import diffusion, grpo
from blip3o_jax.rl.logprobs import image_logprobs
from blip3o_jax.sample import condition, flow
from blip3o_jax.train import optimizer
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.steps import advance, group_state, with_group

SHARED = ("learning_rate", "skipped", "skipped_in_a_row")  # metrics of a step, whatever it trains

fixed = jax.lax.stop_gradient


def update(
    model: Blip3o, cfg: TrainConfig, state: dict, frozen: dict, reference: dict, batch: dict
) -> tuple[dict, dict]:
    """(state, batch) -> (state, metrics), after `num_iterations` updates of each half in the batch;
    those of the diffusion part are called diffusion/NAME.

    `reference` holds the trained parts as the run began with them, Qwen3 unless beta is 0.
    """
    new, metrics = state, {}
    if arrays := batch.get("transformer"):
        own = group_state(cfg, state, "transformer")
        own, metrics = update_transformer(model, cfg, own, reference, arrays)
        new = with_group(cfg, new, "transformer", own)
    if arrays := batch.get("diffusion"):
        own = group_state(cfg, state, "diffusion")
        key = jax.random.fold_in(jax.random.key(cfg.seed), state["step"])
        policies = frozen | reference, state.get("old")
        own, others = update_diffusion(model, cfg, own, frozen, policies, arrays, key)
        new = with_group(cfg, new, "diffusion", own)
        if "old" in state:
            new = new | {"old": _moved(cfg, state, own["params"])}
        counted = {name: others.pop(name) for name in SHARED}
        if metrics:
            counted["skipped"] += metrics["skipped"]
            worse = jnp.maximum(counted["skipped_in_a_row"], metrics["skipped_in_a_row"])
            counted["skipped_in_a_row"] = worse
        norms = {name: others.pop(name) for name in list(others) if "grad_norm" in name}
        named = {f"diffusion/{name}": value for name, value in others.items()}
        metrics = metrics | named | norms | counted
    return new | {"step": state["step"] + 1}, metrics


def unchanged(cfg: TrainConfig, state: dict) -> tuple[dict, dict]:
    """As `update`, for a batch that teaches nothing: only the step is counted."""
    metrics = {"skipped": 0, "skipped_in_a_row": 0}
    for half in cfg.grpo.halves_at(int(state["step"]) + 1):
        own = group_state(cfg, state, half)
        rates = optimizer.schedule(cfg.optimizer, cfg.updates_of(half))
        metrics["learning_rate"] = rates(own["opt_state"].count)
        metrics["skipped"] += own["guard"]["skipped"]
        in_a_row = own["guard"]["in_a_row"]
        metrics["skipped_in_a_row"] = jnp.maximum(metrics["skipped_in_a_row"], in_a_row)
    return state | {"step": state["step"] + 1}, metrics


def _moved(cfg: TrainConfig, state: dict, params: dict) -> dict:
    """The average of past policies after this step."""
    decay = diffusion.old_decay(cfg.grpo.diffusion, state["step"])
    return jax.tree.map(lambda old, new: new + decay * (old - new), state["old"], params)


def update_transformer(
    model: Blip3o, cfg: TrainConfig, state: dict, reference: dict, batch: dict
) -> tuple[dict, dict]:
    """`batch`: tokens [B,T], start, advantages and mask [B], and the rollout's own logprobs [B,n].

    The policy that drew the tokens is that of the first update's own forward pass, so that its
    ratio is 1 with a gradient. The metric `logprob_gap` compares that pass with decoding.
    """
    section = cfg.grpo
    rows = batch["tokens"], batch["start"], section.temperature, section.full_vocabulary
    first = image_logprobs(model, reference["qwen3"], *rows)[0] if section.beta else None
    mask = jnp.broadcast_to(batch["mask"][:, None], batch["logprobs"].shape)

    def one(carry: tuple, iteration: jax.Array) -> tuple[tuple, dict]:
        state, old = carry

        def loss(params: dict) -> tuple[jax.Array, tuple]:
            logprobs, entropies = image_logprobs(model, params["qwen3"], *rows)
            before = jnp.where(iteration == 0, fixed(logprobs), old)
            inputs = logprobs, before, first, batch["advantages"], mask, entropies
            value, metrics = grpo.policy_loss(section, *inputs)
            return value, (metrics, before)

        gradients, (metrics, old) = jax.grad(loss, has_aux=True)(state["params"])
        new, metrics = advance(cfg, state, gradients, metrics, "transformer")
        return (state | new, old), metrics

    (new, old), metrics = _iterated(section.num_iterations, one, (state, batch["logprobs"]))
    if not section.full_vocabulary:
        # Decoding gives them among the image tokens.
        metrics["logprob_gap"] = jnp.max(jnp.abs(old - batch["logprobs"]))
    return new, metrics


def update_diffusion(
    model: Blip3o,
    cfg: TrainConfig,
    state: dict,
    frozen: dict,
    policies: tuple[Params, dict | None],
    batch: dict,
    key: jax.Array,
) -> tuple[dict, dict]:
    """`batch`: hidden [B,n+1,D] of the drawn tokens, which stay as they are, advantages and mask
    [B], what the method draws ("x0" or "path"), and "sources" where there are any. `policies` are
    the first one and the average of past ones, if the method has it.

    A policy that drew the images itself is that of the first update's own forward pass.
    """
    section, lagged = cfg.grpo.diffusion, policies[1] is not None
    schedule = flow.sigmas(cfg.grpo.num_inference_steps)
    points = diffusion.METHODS[section.method].points(section, batch, schedule, key)
    given = batch["hidden"], batch.get("sources")

    def velocity(params: dict, point: diffusion.Points) -> jax.Array:
        params = frozen | params
        t = flow.NUM_TRAIN_TIMESTEPS * point["sigma"]
        whole = condition.build(model, params, *given)
        return condition.velocity(model, params, point["x"], t, whole).astype(jnp.float32)

    def fixed_policy(params: dict) -> jax.Array:
        """Velocities [K,B,Y,X,C], one level after the other."""
        return jax.lax.map(functools.partial(velocity, params), points)

    first = fixed_policy(policies[0])
    drew = fixed_policy(policies[1]) if lagged else jnp.zeros_like(first)
    whole = batch["advantages"], batch["mask"]

    def one(carry: tuple, iteration: jax.Array) -> tuple[tuple, dict]:
        state, drew = carry

        def loss(params: dict, level: tuple) -> tuple[jax.Array, tuple]:
            point, before, first = level
            present = velocity(params, point)
            if not lagged:
                before = jnp.where(iteration == 0, fixed(present), before)
            value, metrics = diffusion.loss(section, present, before, first, point, *whole)
            return value, (metrics, before)

        def add(total: dict, level: tuple) -> tuple[dict, tuple]:
            gradients, aux = jax.grad(loss, has_aux=True)(state["params"], level)
            return jax.tree.map(jnp.add, total, gradients), aux

        # The mean over the levels, of which one is in memory at a time.
        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        total, (metrics, drew) = jax.lax.scan(add, zeros, (points, drew, first))
        gradients = jax.tree.map(lambda x: x / len(first), total)
        metrics = jax.tree.map(jnp.mean, metrics)
        new, metrics = advance(cfg, state, gradients, metrics, "diffusion")
        return (state | new, drew), metrics

    (new, _), metrics = _iterated(cfg.grpo.num_iterations, one, (state, drew))
    return new, metrics


def _iterated(count: int, one: Callable, carry: tuple) -> tuple[tuple, dict]:
    """`one(carry, iteration) -> (carry, metrics)`, `count` times: the last counters, and the means
    of the other metrics."""
    if count == 1:
        return one(carry, jnp.int32(0))
    carry, every = jax.lax.scan(one, carry, jnp.arange(count))
    return carry, {
        name: x[-1] if jnp.issubdtype(x.dtype, jnp.integer) else jnp.mean(x)
        for name, x in every.items()
    }


def compile_update(model: Blip3o, cfg: TrainConfig, state_shardings: dict | None) -> Callable:
    """The jitted update: the state is donated and comes back where it was."""
    step = functools.partial(update, model, cfg)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
