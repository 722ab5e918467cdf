"""One step of GRPO on the device: the updates that a rollout gives the transformer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax.kernels.platform import jit
from blip3o_jax.models.blip3o import Blip3o
from blip3o_jax.rl import grpo
from blip3o_jax.rl.logprobs import image_logprobs
from blip3o_jax.train.config import TrainConfig
from blip3o_jax.train.steps import advance


def update(
    model: Blip3o, cfg: TrainConfig, state: dict, reference: dict, batch: dict
) -> tuple[dict, dict]:
    """(state, batch) -> (state, metrics), after `num_iterations` updates.

    `batch`: tokens [B,T], start, advantages and mask [B], and the rollout's own logprobs [B,n].
    `reference`: Qwen3's parameters at the start.

    The policy that drew the tokens is that of the first update's own forward pass, so that its
    ratio is 1 with a gradient. The metric `logprob_gap` compares that pass with decoding.
    """
    section, fixed = cfg.grpo, jax.lax.stop_gradient
    rows = batch["tokens"], batch["start"], section.temperature, section.full_vocabulary
    first = image_logprobs(model, reference, *rows)[0] if section.beta else None
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
        state, metrics = advance(cfg, state, gradients, metrics)
        return (state, old), metrics

    carry = state, batch["logprobs"]
    if section.num_iterations == 1:
        (new, old), metrics = one(carry, jnp.int32(0))
    else:
        (new, old), every = jax.lax.scan(one, carry, jnp.arange(section.num_iterations))
        # Counters as they are in the end, and means of the rest.
        metrics = {
            name: x[-1] if jnp.issubdtype(x.dtype, jnp.integer) else jnp.mean(x)
            for name, x in every.items()
        }
    if not section.full_vocabulary:
        # Decoding gives them among the image tokens.
        metrics["logprob_gap"] = jnp.max(jnp.abs(old - batch["logprobs"]))
    return new | {"step": state["step"] + 1}, metrics


def compile_update(model: Blip3o, cfg: TrainConfig, state_shardings: dict | None) -> Callable:
    """The jitted update: the state is donated and comes back where it was."""
    step = functools.partial(update, model, cfg)
    return jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
